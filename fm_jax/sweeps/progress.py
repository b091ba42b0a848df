"""What a person sees of a sweep: a table that is redrawn, or a line at each change."""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from fm_jax import durations, jsonfiles, listing

FINISHED = ("done", "diverged", "failed", "blocked")
COLOURS = {"done": "green", "running": "cyan", "diverged": "yellow", "failed": "red"}
NUM_SHOWN = 12  # lines of the table that is redrawn, the running ones first


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """One run as it stands now; `why` says what stopped it."""

    name: str
    state: str
    step: int
    steps: int
    loss: float | None = None
    seconds: float | None = None
    why: str = ""

    def cells(self) -> tuple[str, ...]:
        """Return what a table shows of it."""
        return (
            self.name,
            self.state,
            f"{self.step:,}/{self.steps:,}" if self.steps else f"{self.step:,}",
            "" if self.loss is None else f"{self.loss:.4f}",
            "" if self.seconds is None else durations.clock(self.seconds),
            self.why,
        )


HEADER = ("run", "state", "step", "loss, nats", "time", "")


class View:
    """Shows the lines of a sweep: on a terminal redrawn, elsewhere what changed."""

    def __init__(self, say: Callable[[str], None], *, is_terminal: bool | None = None):
        if is_terminal is None:
            is_terminal = sys.stderr.isatty()
        self._said: dict[str, str] = {}
        self._plain, self._live = say, None
        if is_terminal:
            from rich.console import Console
            from rich.live import Live

            self._live = Live(
                console=Console(stderr=True), refresh_per_second=4, transient=True
            )
            self._live.start()

    def skip(self, lines: Sequence[Line]) -> None:
        """Take it as said where every run is."""
        self._said = {line.name: line.state for line in lines}

    def update(self, lines: Sequence[Line], left: float | None) -> None:
        """Show where every run is, and the seconds left for all, where known."""
        more = "" if left is None else f"; left about {durations.clock(left)}"
        if self._live is not None:
            self._live.update(_drawn(lines, more))
        ended = sum(line.state in FINISHED for line in lines)
        for line in lines:
            before = self._said.get(line.name, "waiting")
            self._said[line.name] = line.state
            if line.state == before:
                continue
            if self._live is not None and line.state == "running":
                continue  # the table shows it
            loss = "" if line.loss is None else f", loss {line.loss:.4f} nats/token"
            is_over = line.state in FINISHED and line.seconds is not None
            took = f" after {durations.clock(line.seconds)}" if is_over else ""
            why = f": {line.why}" if line.why else ""
            self.say(
                f"[{ended}/{len(lines)}] {line.name} {line.state}{took}{loss}{why}"
                f"{more}"
            )

    def say(self, line: str) -> None:
        """Print a line without tearing the table."""
        if self._live is not None:
            self._live.console.print(
                line, highlight=False, markup=False, soft_wrap=True
            )
        else:
            self._plain(line)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._live is not None:
            self._live.stop()


def _drawn(lines: Sequence[Line], more: str):
    from rich.table import Table
    from rich.text import Text

    order = ("running", "failed", "waiting", "diverged", "blocked", "done")
    shown = sorted(lines, key=lambda line: order.index(line.state))[:NUM_SHOWN]
    caption = f"{summary(lines)}{more}"
    table = Table(caption=caption, box=None)
    for name in HEADER:
        table.add_column(name, no_wrap=True)
    for line in shown:
        colour = COLOURS.get(line.state, "")
        table.add_row(*(Text(cell, style=colour) for cell in line.cells()))
    return table


def summary(lines: Sequence[Line]) -> str:
    """Return how many runs are in each state."""
    return listing.summary(line.state for line in lines)


def table(lines: Sequence[Line]) -> list[str]:
    """Return the lines of a table of all runs, and a summary."""
    rows = [HEADER, *(line.cells() for line in lines)]
    return [*listing.columns(rows, left=(0, 1, 5)), summary(lines)]


def last_step(run: Path) -> int:
    """Return the last step that a run's metrics tell of, 0 where there are none."""
    try:
        line = next(jsonfiles.last_lines(run / "metrics.jsonl"), b"")
        return int(jsonfiles.parse(line)["step"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return 0  # not begun, or its last line is longer than we look
