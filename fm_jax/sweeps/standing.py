"""How the runs of a sweep stand, whatever ran them, and how to repeat what failed."""

from pathlib import Path

from fm_jax import status
from fm_jax.runs import Run
from fm_jax.sweeps import arrays, children, lines, progress, records, workdir
from fm_jax.sweeps.plans import Planned
from fm_jax.sweeps.progress import Line

# Of the states of a run, those that a table of a sweep's tells by another word.
WORDS = {"stopped": "waiting"}
AGAIN, WAITS = ("failed", "lost"), ("waiting", "blocked")


def read(folder: Path) -> tuple[list[Planned], list[Line]]:
    """Return the runs of a sweep's file and where each is.

    A run folder says it, and of runs that this machine's runner started its records.
    Raises UserError where there is no such file or it is wrong.
    """
    runs = lines.read(folder)
    recorded = records.read(folder)
    now = {one.name: _record(folder, one, recorded) for one in runs}
    records.block(runs, now)
    return runs, [records.line(folder, one, now[one.name]) for one in runs]


def table(folder: Path, file: str) -> list[str]:
    """Return the lines of `fm sweep status`; file: what the user calls the sweep's."""
    runs, found = read(folder)
    said = progress.table(found)
    asks = {"to repeat what failed": AGAIN, "to run what waits": WAITS}
    for title, states in asks.items():
        if names := [line.name for line in found if line.state in states]:
            commands = arrays.commands(runs, names, file)
            said += ["", f"{title}, unless it is queued:", *commands]
    return said


def _record(folder: Path, one: Planned, recorded: dict) -> records.Record:
    path, record = workdir.run_path(folder, one.name), recorded.get(one.name, {})
    if children.is_ours(record.get("pid", 0), path):
        return record
    record = records.known(path, one, record)
    if record["state"] != "waiting" or not Run(path).exists():
        return record
    now = status.read(path)
    return {"state": WORDS.get(now.state, now.state), "why": now.why}
