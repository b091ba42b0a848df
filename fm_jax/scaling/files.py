"""The files of a fit: fit.json and draws.npz, written, read back, and refused."""

import json
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from fm_jax import configfile, jsonfiles
from fm_jax.errors import UserError, reason
from fm_jax.runs import Run
from fm_jax.scaling import laws

FORMAT = 1
FILE, DRAWS = "fit.json", "draws.npz"
MOST_BYTES = 1 << 32  # of draws, unpacked
# Of fit.json, what is read again; of a law's numbers, and of lines through optima.
ENDS = {
    "params": [float, float],
    "tokens": [float, float],
    "loss?": [float, float],
    "flops_6nd": [float, float],
    "flops_ratio": float,
}
THETA = {"residual_sd": float}
LINES = {"a": float, "b": float, "coefficient": float, "coefficient_tokens": float}
FORM = {
    "options": {
        "law": str,
        "fixed": {"*": float},
        "delta?": (None, float),
        "space?": str,
    },
    "inputs": {"path": str, "sha256": str, "rows": int, "count": str},
    "range": ENDS,
    "approach2?": (None, dict),
    "approach3?": (None, dict),
    "by_count?": {"*": {"range": ENDS, "warnings": [str]}},
    "warnings": [str],
    "sweep?": dict,
}


def prepare(out: Path) -> None:
    """Make the folder that a fit is written to; raises UserError where one cannot."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--out must be a folder to write in; got {out} ({error.strerror})."
        ) from error


def write(record: dict[str, Any], draws: dict[str, np.ndarray], out: Path) -> None:
    """Write fit.json and draws.npz into the folder `out`, each whole or not at all."""
    prepare(out)
    try:
        beside = out / f".{DRAWS}.writing.npz"
        np.savez(beside, **draws)
        beside.replace(out / DRAWS)
    except OSError as error:
        raise UserError(
            f"--out must be a folder to write in; got {out} ({error.strerror})."
        ) from error
    Run(out).write(FILE, json.dumps(record, indent=1) + "\n")


def folder_of(path: Path) -> Path:
    """Return the folder of a fit from its own path or that of its fit.json."""
    path = Path(path).expanduser()
    return path.parent if path.name == FILE else path


def load(
    folder: Path, *, law: str = ""
) -> tuple[dict[str, Any], dict[str, np.ndarray], laws.Law]:
    """Return fit.json, the draws and the law of a folder that `write` made.

    law: the file of the law, where it has one. What a fit says of it is not run, for
    the fit may be a stranger's. Raises UserError when it is no such folder, or one of
    another format.
    """
    folder = folder_of(folder)
    if not (folder / FILE).is_file():
        raise UserError(
            f"--fit must be a folder with {FILE}; got {folder}. fm fit --out makes one."
        )
    record = configfile.read_json(folder / FILE)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise UserError(
            f"{folder / FILE} must be a fit of format {FORMAT}; got another. Fit anew "
            "with fm fit."
        )
    jsonfiles.check(record, FORM, str(folder / FILE))
    named = record["options"]["law"]
    if (".py" in named) != bool(law):
        got = f"the law {named!r}" + (f" and --law={law}" if law else "")
        raise UserError(
            "--law must be given just where a fit is of a law's file, for that is "
            f"Python and is run; got {got}. "
            + ("Leave it out." if law else "Look at the file, then name it.")
        )
    found = laws.find(law or named)
    if record["options"]["fixed"]:
        found = laws.fixed(found, **record["options"]["fixed"])
    _check_numbers(record, found, str(folder / FILE))
    draws = _draws(folder / DRAWS)
    for name, array in draws.items():
        width = len(found.names) if name.startswith("approach3") else 4
        if array.shape[1:] != (width,) or array.dtype.kind != "f":
            raise UserError(
                f"--fit must have draws of {width} numbers each; got {array.dtype} "
                f"{list(array.shape)} as {name} in {folder / DRAWS}. Fit anew."
            )
    return record, draws, found


def _check_numbers(record: dict[str, Any], law: laws.Law, where: str) -> None:
    """Raise UserError unless a fit has the numbers that its law and lines are of."""
    by_count = record.get("by_count", {}).values()
    for fitted in filter(None, [record.get("approach3"), *by_count]):
        if "skipped" not in fitted:
            form = dict.fromkeys(law.names, float) | THETA
            jsonfiles.check(fitted, form, f"a law's fit in {where}")
    lines = record.get("approach2")
    if lines and "a" in lines:
        jsonfiles.check(lines, LINES, f"approach2 in {where}")
    for ends in (record["range"], *(fitted["range"] for fitted in by_count)):
        pairs = [ends[name] for name in ("params", "tokens", "flops_6nd")]
        numbers = [x for pair in pairs for x in pair] + [ends["flops_ratio"]]
        if not all(math.isfinite(x) and x > 0 for x in numbers):
            raise UserError(
                f"the range of {where} must be of numbers above 0; got {numbers}."
            )


def _draws(file: Path) -> dict[str, np.ndarray]:
    """Return the arrays of an .npz, each of numbers."""
    try:
        with zipfile.ZipFile(file) as kept:
            size = sum(one.file_size for one in kept.infolist())
        if size > MOST_BYTES:
            raise ValueError(f"{size:,} bytes, of at most {MOST_BYTES:,}")
        with np.load(file) as kept:
            found = {name: kept[name] for name in kept.files}
    except Exception as error:  # a damaged one ends the parsers in many ways
        raise UserError(
            f"--fit must have its draws; got {file} ({reason(error)}). Fit anew with "
            "fm fit."
        ) from error
    return found


def theta(record: dict[str, Any], law: laws.Law) -> np.ndarray:
    """Return the law's parameters [P] of a record of approach 3."""
    return np.array([record[name] for name in law.names], float)


def plain(value: Any) -> Any:
    """Return plain Python values; numbers that are none become null."""
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Path):
        return str(value)
    return value
