"""The files of a fit: fit.json and draws.npz, written, read back, and refused."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from fm_jax import configfile
from fm_jax.errors import UserError
from fm_jax.runs import Run
from fm_jax.scaling import laws

FORMAT = 1
FILE, DRAWS = "fit.json", "draws.npz"


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


def load(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray], laws.Law]:
    """Return fit.json, the draws and the law of a folder that `write` made.

    Raises UserError when it is no such folder, or one of another format.
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
    try:
        with np.load(folder / DRAWS) as kept:
            draws = {name: kept[name] for name in kept.files}
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"--fit must have its draws; got {folder / DRAWS} ({error}). Fit anew with "
            "fm fit."
        ) from error
    law = laws.find(record["options"]["law"])
    if record["options"]["fixed"]:
        law = laws.fixed(law, **record["options"]["fixed"])
    return record, draws, law


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
