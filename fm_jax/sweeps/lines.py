"""The file of a sweep, a run a line: line i, from 0, is run i.

It is all that a cluster's array, the local runner and a table need; a sweep's plan or
one config with other values makes it. The runs lie beside it, in runs/.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from fm_jax import configfile
from fm_jax.errors import UserError
from fm_jax.runs import Run
from fm_jax.sweeps import sweep as sweeps
from fm_jax.sweeps.plans import Planned
from fm_jax.tables.rows import SWEEP_FILE

# Of a line, what names folders and what a run is known again by.
LINE = {"name": str, "hash": str}
FORM = LINE | {
    "index": int,
    "config": {"*": dict},
    "overrides": {"*": object},
    "role?": str,
    "parent?": str,
    "branch_step?": int,
    "budget_flops?": (None, float),
    "replicate?": int,
    "dial?": int,
    "params?": {"*": int},
    "steps?": int,
    "tokens?": int,
    "flops?": float,
    "flops_exact?": float,
    "memory_bytes?": int,
    "disk_bytes?": int,
}
NAME = re.compile(r"\d{1,9}-[A-Za-z0-9][A-Za-z0-9.+-]{0,99}")
AGAIN = "fm sweep --config=... --out=... makes such a file."


def write(folder: Path, runs: Sequence[Planned]) -> None:
    """Write the file of `folder`, at once or not at all."""
    ordered = sorted(runs, key=lambda one: one.index)
    text = "".join(json.dumps(vars(one)) + "\n" for one in ordered)
    Run(folder).write(SWEEP_FILE, text)


def find(given: str) -> Path:
    """Return the folder of a sweep that is named by it or by its file.

    Raises UserError where there is no such file.
    """
    path = Path(given).expanduser().resolve()
    folder = path.parent if path.name == SWEEP_FILE else path
    if not (folder / SWEEP_FILE).is_file():
        raise UserError(
            f"a sweep must be a {SWEEP_FILE} or the folder with it; got {given}. "
            f"{AGAIN}"
        )
    return folder


def read(folder: Path) -> list[Planned]:
    """Return the runs of a folder's file; raises UserError on a line that is wrong."""
    runs: list[Planned] = []
    known: set[str] = set()
    for number, row in enumerate(rows(folder, FORM), 1):
        where = f"line {number} of {folder / SWEEP_FILE}"
        if row["index"] != number - 1:
            raise UserError(
                f"index of {where} must be {number - 1}, its place; got "
                f"{row['index']}. {AGAIN}"
            )
        parent = row.get("parent", "")
        if row["name"] in known or (parent and parent not in known):
            raise UserError(
                f"{where} must have a name of its own and go on from a line before "
                f"it; got {row['name']!r} and {parent!r}. {AGAIN}"
            )
        steps, begin = row.get("steps", 0), row.get("branch_step", 0)
        if (
            not 0 <= begin <= max(0, steps - 1)
            or steps < 0
            or (steps and "total" not in row.get("params", {}))
        ):
            raise UserError(
                f"{where} must have params with steps, and begin before its last step; "
                f"got steps {steps}, branch_step {begin}. {AGAIN}"
            )
        try:
            row["config"] = configfile.of_stranger(row["config"], where)
            sweeps.configs.check(row["config"])
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        known.add(row["name"])
        fields = {key.removesuffix("?") for key in FORM}
        runs.append(Planned(**{k: v for k, v in row.items() if k in fields}))
    if not runs:
        raise UserError(
            f"{folder / SWEEP_FILE} must have a run a line; got none. {AGAIN}"
        )
    return runs


def rows(folder: Path, form: dict = LINE) -> Iterator[dict]:
    """Yield the objects of a folder's file; raises UserError on one of another form."""
    file = folder / SWEEP_FILE
    if not file.exists():
        return
    with open(file, "rb") as stream:  # of which Run.rows would leave out the last line
        stream.seek(max(0, file.stat().st_size - 1))
        if stream.read(1) not in (b"\n", b""):
            raise UserError(f"{file} must end with a whole line; got one cut. {AGAIN}")
    for row in Run(folder).rows(SWEEP_FILE, form=form):
        if not NAME.fullmatch(row["name"]):
            raise UserError(
                f"{file} must name runs as 000-n1.2e6-d3e7-s0, their folders; got "
                f"{row['name'][:40]!r}. {AGAIN}"
            )
        yield row
