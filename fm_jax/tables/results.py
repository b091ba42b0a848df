"""Results: which rows of a table say how a run ended, and what became of the others."""

import numpy as np

from fm_jax.errors import UserError
from fm_jax.tables import schema
from fm_jax.tables.cells import Cells


def of(cells: Cells, *, curves: bool) -> np.ndarray:
    """Return the rows that are a result, or with `curves` on the way to one.

    Notes what became of the runs. Raises UserError where no row is left.
    """
    rows = np.arange(len(cells.places))
    if cells.own:
        rows = _that_hold(cells)
    is_final = cells.truths("is_final")
    if not curves:
        rows = rows[is_final[rows]]
    if len(rows):
        return rows
    states = {k: v if isinstance(v, int) else len(v) for k, v in cells.states.items()}
    said = ", ".join(f"{number} {state}" for state, number in states.items())
    raise UserError(
        f"{cells.path} must hold a run that came to its end; got none, but {said}. "
        "Wait for one to finish."
    )


def trunks(cells: Cells) -> np.ndarray:
    """Return the run [str] that each row's run branched from in the end, or itself."""
    run_ids = cells.texts("run_id")
    parents = dict.fromkeys(run_ids, "")
    if "parent_id" in cells.columns:
        parents = dict(zip(run_ids, cells.texts("parent_id"), strict=True))
    found = {}
    for run in parents:
        trunk, seen = run, {run}
        while parents.get(trunk) and parents[trunk] not in seen:
            trunk = parents[trunk]  # of a run that is not there too
            seen.add(trunk)
        found[run] = trunk
    return np.array([found[run] for run in run_ids], dtype=np.str_)


def _that_hold(cells: Cells) -> np.ndarray:
    """Return the rows of a run table that hold: the last of each step.

    Of a run that diverged they are those before.
    """
    run_ids, statuses = cells.texts("run_id"), cells.texts("status")
    names = cells.texts("name") if "name" in cells.columns else run_ids
    cells.demand(
        "status",
        np.arange(len(statuses)),
        np.array([status in schema.STATUSES for status in statuses]),
        f"one of {', '.join(schema.STATUSES)}",
    )
    steps, tokens = cells.floats("step"), cells.floats("tokens")
    cells.demand("step", np.arange(len(steps)), np.isfinite(steps), "a number")
    last: dict[tuple, int] = {}
    for i, key in enumerate(zip(run_ids, steps, strict=True)):
        last.pop(key, None)  # the order is that of writing: the end tells the status
        last[key] = i
    ends = {run_ids[i]: i for i in last.values()}
    diverged = {run: steps[i] for run, i in ends.items() if statuses[i] == "diverged"}
    cells.states["diverged"] = sorted(names[ends[run]] or run for run in diverged)
    cells.states["running"] += sum(
        statuses[i] == "running" and names[i] not in cells.states["failed"]
        for i in ends.values()
    )
    order = {run: number for number, run in enumerate(ends)}
    kept = sorted(
        (
            i
            for i in last.values()
            if statuses[i] != "diverged" and steps[i] < diverged.get(run_ids[i], np.inf)
        ),
        key=lambda i: (order[run_ids[i]], steps[i]),
    )
    trained = [i for i in kept if tokens[i] != 0]
    if len(trained) < len(kept):
        cells.notes.append(
            f"rows of untrained models left out: {len(kept) - len(trained)}"
        )
    return np.array(trained, dtype=np.int64)
