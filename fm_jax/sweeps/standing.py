"""How the runs of a sweep stand, whatever ran them, and how to repeat what failed."""

from pathlib import Path

from fm_jax import status
from fm_jax.runs import Run
from fm_jax.sweeps import arrays, children, lines, progress, records, task, workdir
from fm_jax.sweeps.plans import Planned
from fm_jax.sweeps.progress import Line

AGAIN, LEFT = ("failed", "lost"), ("failed", "lost", "waiting", "stopped", "blocked")


def read(folder: Path) -> tuple[list[Planned], list[Line]]:
    """Return the runs of a sweep's file and where each is.

    Its run folder says it; of one that never began, the task that was refused, or what
    this machine's runner noted. Raises UserError where there is no such file or it is
    wrong.
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
    states = {line.name: line.state for line in found}
    again = {name for name, state in states.items() if state in AGAIN}
    left = set()
    for one in runs:  # parents stand first
        if states[one.name] in LEFT and _may_begin(one, states, left):
            left.add(one.name)
    asks = {"to repeat what failed": again}
    if left != again:
        asks["to run what is left and can be"] = left
    for title, names in asks.items():
        if commands := arrays.commands(runs, names & left, file):
            said += ["", f"{title}, unless it is queued:", *commands]
    return said


def _may_begin(one: Planned, states: dict[str, str], left: set[str]) -> bool:
    """Return whether the run that it goes on from is done, or can be run before it."""
    return not one.parent or one.parent in left or states[one.parent] == "done"


def _record(folder: Path, one: Planned, recorded: dict) -> records.Record:
    path, record = workdir.run_path(folder, one.name), recorded.get(one.name, {})
    if children.is_ours(record.get("pid", 0), path):
        return record
    if not Run(path).exists():
        if why := task.refusal(folder, one):
            return {"state": "failed", "why": why}
        return records.known(path, one, record)
    now = status.seen(path)
    if now.state != "done":
        return {"state": now.state, "why": now.why}
    return records.known(path, one, record)  # of fewer steps it is to go on
