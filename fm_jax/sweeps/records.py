"""Records: the state that each run of a sweep is in, and what is known of it."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from fm_jax import jsonfiles
from fm_jax.runs import Run
from fm_jax.sweeps import progress, workdir
from fm_jax.sweeps.plans import Planned

FILE = "states.json"  # in the sweep's folder, by the names of runs
FORM = {
    "*": {
        "state?": str,
        "why?": str,
        "pid?": int,
        "exit?": int,
        "seconds?": float,
        "loss?": (None, float),
    }
}
LOST = ("failed", "diverged", "blocked")  # nothing can begin from their last step
TOLD = (*LOST, "lost", "unreadable")  # with a reason
Record = dict[str, Any]  # state, and by that pid, seconds, exit, loss, why


def read(folder: Path) -> dict[str, Record]:
    """Return the records of a sweep's folder, {} where there are none yet."""
    file = folder / FILE
    return jsonfiles.read(file, must=False, form=FORM)


def write(folder: Path, records: dict[str, Record]) -> None:
    """Write the records of a sweep's folder."""
    Run(folder).write(FILE, json.dumps(records, indent=1) + "\n")


def known(path: Path, one: Planned, record: Record) -> Record:
    """Return the record of a run that no process trains, a new one if that is old."""
    now = state(path, one, record)
    if record.get("state") != now:
        record = {"state": now, "why": reason(path)}
    if now == "done" and "loss" not in record:
        record = record | {"loss": final_loss(path)}
    return record


def state(path: Path, one: Planned, record: Record) -> str:
    """Return the state of a run that no process trains."""
    if one.is_done(Run(path)):
        return "done"
    why = reason(path)
    diverged = record.get("state") == "diverged" and path.exists()
    if diverged or why.startswith("DivergedError"):
        return "diverged"
    if why.startswith("KeyboardInterrupt"):
        return "waiting"
    return "failed" if why or record.get("state") == "failed" else "waiting"


def reason(path: Path) -> str:
    """Return the first line of what a run says has stopped it, "" where nothing has."""
    return first_line(path / "FAILED")


def first_line(file: Path) -> str:
    """Return the first line of a small file, "" where there is none to read."""
    try:
        return jsonfiles.text(file).partition("\n")[0]
    except (OSError, ValueError):
        return ""


def final_loss(path: Path) -> float | None:
    """Return the held-out loss that a run ended with, in nats per token."""
    return next(iter(Run(path).series("final/loss")[1]), None)


def block(runs: Collection[Planned], records: dict[str, Record]) -> list[str]:
    """Block the runs that wait for one that will not end; return their names."""
    blocked = []
    for one in runs:  # parents stand first
        parent = records[one.parent]["state"] if one.parent else ""
        if parent in LOST and records[one.name]["state"] == "waiting":
            why = f"{one.parent} {parent}"
            records[one.name] = {"state": "blocked", "why": why}
            blocked.append(one.name)
    return blocked


def line(folder: Path, one: Planned, record: Record) -> progress.Line:
    """Return what is shown of a run."""
    path, now = workdir.run_path(folder, one.name), record["state"]
    return progress.Line(
        name=one.name,
        state=now,
        step=(now == "done" and one.steps) or progress.last_step(path),
        steps=one.steps,
        loss=record.get("loss"),
        seconds=record.get("seconds"),
        why=record.get("why", "") if now in TOLD else "",
    )
