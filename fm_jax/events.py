"""What happened to a run, and when: events.jsonl, and the share of time that trained.

Each start is an attempt. An event has `time`, in seconds since 1970, `attempt`, and
what it is; where steps were taken also `step` and `trained`, the seconds of training
of this attempt so far. Metrics are cut back when a run goes on from a checkpoint;
events never are. Imports no jax.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

from fm_jax.errors import LostError, UserError
from fm_jax.runs import Run

FILE = "events.jsonl"
FORM = {"time": float, "attempt": int, "event": str, "step?": int, "trained?": float}
MAX_FRUITLESS = 5  # starts in a row that end without a word and saved nothing


def read(run: Run) -> list[dict[str, Any]]:
    """Return a run's events so far; raises UserError on a file that is none of ours."""
    return list(run.rows(FILE, form=FORM))


class Events:
    """Appends the events of one attempt, from `start` on.

    trained: returns the seconds of training so far.
    """

    def __init__(self, run: Run, trained: Callable[[], float]):
        self._run, self._trained = run, trained
        self.attempt = 1 + sum(row["event"] == "start" for row in read(run))

    def add(self, event: str, step: int | None = None, **more: Any) -> None:
        """Append an event that happens now."""
        row = {"time": round(time.time(), 3), "attempt": self.attempt, "event": event}
        if step is not None:
            row |= {"step": step, "trained": round(self._trained(), 3)}
        self._run.append(row | more, FILE)


@dataclasses.dataclass(frozen=True)
class Goodput:
    """Seconds since the first start, those of steps that were kept, and the starts."""

    seconds: float
    trained: float
    attempts: int

    @property
    def share(self) -> float:
        """The part of the time that trained what was kept; 0 where none has gone by."""
        return self.trained / self.seconds if self.seconds > 0 else 0.0


def goodput(rows: Sequence[dict]) -> Goodput:
    """Return what events tell of time: down time and repeated steps are no training.

    Steps count up to the one from which the next start, or the run when it went back,
    went on; of the last stretch all that it told.
    """
    if not rows:
        return Goodput(0.0, 0.0, 0)
    trained, kept, last = 0.0, float("inf"), None
    for row in reversed(rows):
        if not row.keys() >= {"step", "trained"} or row["step"] > kept:
            continue
        last = row["trained"] if last is None else last
        if row["event"] == "ready":  # here steps began, and all after it is counted
            trained += last - row["trained"]
            kept, last = row["step"], None
    starts = sum(row["event"] == "start" for row in rows)
    return Goodput(rows[-1]["time"] - rows[0]["time"], trained, starts)


def refuse_fruitless(rows: Sequence[dict], run: Run) -> None:
    """Raise UserError when the last starts all died and left nothing new.

    One that said why it ended, unless it was left by the others, and one that saved,
    break the row.
    """
    fruitless, first = 0, -1
    for row in rows:
        if row["event"] == "start":
            fruitless += 1
        elif row["event"] == "saved" or (
            row["event"] == "end" and row.get("status") != LostError.exit_status
        ):
            fruitless = 0
        elif row["event"] == "ready" and row["step"] > first:
            fruitless, first = 1, row["step"]  # the start before did save
    if fruitless >= MAX_FRUITLESS:
        raise UserError(
            f"a run must save something at one of {MAX_FRUITLESS} starts; got "
            f"{fruitless} in a row that died without a word and saved nothing in "
            f"{run.path}. See what killed them; checkpoint.every may be too long. "
            f"Remove {run.path / FILE} to start again."
        )
