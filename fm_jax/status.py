"""Where runs are, as their folders tell: step, loss, speed, sign of life, or their end.

A folder is read while others write it, and never written. Imports no jax.
"""

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fm_jax import durations, events, jsonfiles, life, listing
from fm_jax.errors import UserError, printable, reason
from fm_jax.runs import Run

MOST_DEPTH = 3  # of runs in a folder
MOST_CELL = 120  # letters of a cell
RESOLVED = {"steps": int, "tokens_per_step": float}
HEADER = ("run", "state", "step", "loss, nats", "held out", "tokens/s", "MFU", "left",
          "heartbeat", "starts", "goodput", "")  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Status:
    """A run as it stands now; None, and 0 steps, where that is not known.

    state: waiting (not begun here), running, done, stopped (as asked; the same command
    goes on), diverged, failed, or lost (begun, and neither a sign of life nor an end).
    loss: of the last step that was logged; eval_loss: of the last evaluation, of a run
    that is done that on all held-out text; both in nats. seconds_left: of steps alone.
    heartbeat: seconds since the last sign of life, of several processes of the one that
    has been silent longest. goodput: as in `events`, up to the last event. why: what
    ended it.
    """

    path: Path
    state: str
    step: int = 0
    steps: int = 0
    loss: float | None = None
    eval_loss: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    seconds_left: float | None = None
    heartbeat: float | None = None
    attempts: int = 0
    goodput: float | None = None
    why: str = ""


def read(path: Path) -> Status:
    """Return where the run in a folder is; raises UserError on what no run wrote."""
    with _readable(path):
        return _read(path)


def seen(path: Path) -> Status:
    """Return where a run is; a folder that tells nonsense is `unreadable`."""
    try:
        return read(path)
    except UserError as error:
        return Status(path=path, state="unreadable", why=str(error))


def find(paths: Iterable[Path]) -> list[Path]:
    """Return the run folders among `paths` and at most MOST_DEPTH below, by name.

    Raises UserError on a path that is none and holds none.
    """
    found: set[Path] = set()
    for path in paths:
        with _readable(path):
            here = [path] if _is_run(path, "config.json") else [*_below(path)]
        if not here:
            got = "which holds none" if path.is_dir() else "which is no folder"
            raise UserError(
                "RUN must be a run's folder, or one that holds runs at most "
                f"{MOST_DEPTH} folders deep; got {path}, {got}. fm train prints the "
                "folder of its run."
            )
        found.update(here)
    return sorted(found)


def lines(found: Sequence[Status]) -> list[str]:
    """Return the lines of a table of runs, and a summary."""
    rows = [HEADER, *map(cells, found)]
    states = (status.state for status in found)
    return [
        *listing.columns(rows, left=(0, 1, len(HEADER) - 1)),
        listing.summary(states),
    ]


def cells(status: Status) -> tuple[str, ...]:
    """Return what a table shows of a run, in the order of HEADER."""
    why = printable(status.why.replace(f"{status.path}/", ""))  # which stands first
    return (
        printable(str(status.path)),
        status.state,
        f"{status.step:,}/{status.steps:,}" if status.steps else "",
        _number(status.loss, ".4f"),
        _number(status.eval_loss, ".4f"),
        _number(status.tokens_per_second, ",.0f"),
        _number(status.mfu, ".1%"),
        _clock(status.seconds_left),
        _clock(status.heartbeat),
        _number(status.attempts or None, ","),
        _number(status.goodput, ".1%"),
        why if len(why) <= MOST_CELL else why[:MOST_CELL] + "...",
    )


def _number(value: float | None, form: str) -> str:
    """Return a number in a form, shorter where it is huge."""
    text = "" if value is None else format(value, form)
    return text if len(text) <= 16 else f"{value:.3g}"


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return durations.clock(seconds) if seconds < 1e12 else f"{seconds:.3g} s"


# ---- what the folder tells


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} must be readable; got {reason(error)}.") from error


def _is_run(path: Path, *more: str) -> bool:
    return any((path / name).is_file() for name in (events.FILE, *more))


def _below(folder: Path, depth: int = MOST_DEPTH) -> Iterator[Path]:
    """Yield the runs in a folder; what may not be looked into holds none."""
    names = []
    with contextlib.suppress(OSError):
        names = os.listdir(folder)
    for path in (folder / name for name in names if not name.startswith(".")):
        with contextlib.suppress(OSError):
            if _is_run(path):
                yield path
            elif depth > 1 and path.is_dir():
                yield from _below(path, depth - 1)


def _read(path: Path) -> Status:
    state, heartbeat, why = life.read(path)
    if state == "waiting":
        return Status(path=path, state=state)
    record = Run(path).read_config()
    resolved = record["resolved"]
    jsonfiles.check(resolved, RESOLVED, f"resolved of {path / 'config.json'}")
    held_out = "final/loss" if state == "done" else "eval/loss"
    wanted = ["train/loss", "perf/tokens_per_second", "perf/mfu"]
    if state == "done" or record["config"].get("eval", {}).get("every") != 0:
        wanted.append(held_out)
    row = _last_values(path / "metrics.jsonl", wanted)
    attempts, goodput = _goodput(path / events.FILE)
    step, speed = row.get("step", 0), row.get("perf/tokens_per_second")
    tokens_left = (resolved["steps"] - step) * resolved["tokens_per_step"]
    return Status(
        path=path,
        state=state,
        step=step,
        steps=resolved["steps"],
        loss=row.get("train/loss"),
        eval_loss=row.get(held_out),
        tokens_per_second=speed,
        mfu=row.get("perf/mfu"),
        seconds_left=_seconds(tokens_left, speed) if state == "running" else None,
        heartbeat=heartbeat,
        attempts=attempts,
        goodput=goodput,
        why=why,
    )


def _seconds(tokens: float, speed: float | None) -> float | None:
    seconds = tokens / speed if speed and speed > 0 else math.inf
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _last_values(file: Path, names: Sequence[str]) -> dict[str, Any]:
    """Return the last step of metrics, and the last value of each that is there."""
    form = {"step": int} | {f"{name}?": float for name in names}
    found: dict[str, Any] = {}
    with contextlib.suppress(FileNotFoundError):
        for line in jsonfiles.last_lines(file):
            missing = [f'"{name}"'.encode() for name in names if name not in found]
            if found and not missing:
                break
            if not found or any(name in line for name in missing):
                row = _parsed(line, form, f"a line of {file}")
                found = {k: row[k] for k in ("step", *names) if k in row} | found
    return found


def _goodput(file: Path) -> tuple[int, float | None]:
    """Return how often a run was started, and its goodput where all is read."""
    rows = []
    with contextlib.suppress(FileNotFoundError):
        is_all = file.stat().st_size <= jsonfiles.TAIL_BYTES
        for line in jsonfiles.last_lines(file):
            rows.append(_parsed(line, events.FORM, f"a line of {file}"))
    if not rows:
        return 0, None
    good = events.goodput(rows[::-1])
    return rows[0]["attempt"], good.share if is_all and good.seconds > 0 else None


def _parsed(line: bytes, form: Any, where: str) -> dict[str, Any]:
    try:
        row = jsonfiles.parse(line)
    except ValueError as error:
        raise UserError(f"{where} must be JSON; got {reason(error)}.") from error
    jsonfiles.check(row, form, where)
    return row
