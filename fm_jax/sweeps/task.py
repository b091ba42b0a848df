"""One run of a sweep's file, as a task of a cluster's array does it.

Which one, the array says: SLURM's task id, or the index of a Kubernetes job. A run that
is done stays done, so the whole array can be submitted again.
"""

import contextlib
from collections.abc import Mapping
from pathlib import Path

from fm_jax.errors import UserError
from fm_jax.runs import Run
from fm_jax.sweeps import lines, records, workdir
from fm_jax.sweeps.plans import Planned

INDEX_NAMES = ("FM_SWEEP_INDEX", "SLURM_ARRAY_TASK_ID", "JOB_COMPLETION_INDEX")
MOST_DIGITS = 9


def index_of(given: int, environ: Mapping[str, str]) -> int:
    """Return which line a task runs: as given (-1: not), else as its array says.

    Raises UserError where nothing says it.
    """
    if given >= 0:
        return given
    if given < -1:
        raise UserError(f"--index must be >= 0; got {given}.")
    for name in INDEX_NAMES:
        if text := environ.get(name, ""):
            if not text.isdecimal() or len(text) > MOST_DIGITS:
                raise UserError(f"{name} must be a whole number; got {text[:40]!r}.")
            return int(text)
    raise UserError(
        "a task must be told which line of the sweep it runs; got no --index and no "
        f"{', '.join(INDEX_NAMES)}. Write --index=0 for the first, or --workdir=... "
        "with fm sweep for all."
    )


def find(folder: Path, index: int) -> Planned:
    """Return the run of line `index`, from 0, of a folder's file.

    Raises UserError for one beyond the file, and for one that goes on from a run that
    is not done.
    """
    runs = lines.read(folder)
    if index >= len(runs):
        raise UserError(
            f"--index must be below {len(runs)}, the lines of "
            f"{folder / lines.SWEEP_FILE}; got {index}. An array of all is "
            f"0-{len(runs) - 1}."
        )
    one = runs[index]
    if one.parent:
        (parent,) = (other for other in runs if other.name == one.parent)
        if not parent.is_done(Run(workdir.run_path(folder, parent.name))):
            raise UserError(
                f"{one.name} must begin where {parent.name} ends, line "
                f"{parent.index}, which is not done. Run that one first: sbatch "
                "--dependency=afterany:JOB waits for it."
            )
    return one


def refused(folder: Path, one: Planned, why: str) -> None:
    """Leave word, beside the runs, of one that was refused, maybe for its folder.

    Where it cannot be left, or another process of the task does, the refusal stands.
    """
    word = _word(folder, one)
    with contextlib.suppress(OSError, UserError):
        word.parent.mkdir(exist_ok=True)
        Run(word.parent).write(word.name, f"{why}\n")


def begins(folder: Path, one: Planned) -> None:
    """Take away the word that an earlier task left."""
    with contextlib.suppress(OSError):
        _word(folder, one).unlink()


def refusal(folder: Path, one: Planned) -> str:
    """Return why the last task of a run was refused, "" where it was not."""
    return records.first_line(_word(folder, one))


def _word(folder: Path, one: Planned) -> Path:
    return folder / "logs" / f"{one.name}.refused"


def diverged(folder: Path, one: Planned) -> str:
    """Return what a run that diverged said; it would again. "" where it did not."""
    why = records.reason(workdir.run_path(folder, one.name))
    return why if why.startswith("DivergedError") else ""
