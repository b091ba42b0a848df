"""Commands that look at what goes on: where runs are, once or again and again."""

import contextlib
import dataclasses
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from fm_jax.commands.command import Command
from fm_jax.errors import UserError

LEAST_EVERY, MOST_EVERY = 0.1, 86_400.0  # seconds


def show_status(flags, raw, argv) -> None:
    """Print where runs are, until none is running where it is asked for again."""
    from fm_jax import status

    if not flags.positional:
        raise UserError("fm status must be given run folders; got none.")
    if flags.every and not LEAST_EVERY <= flags.every <= MOST_EVERY:
        raise UserError(
            f"--every must be from {LEAST_EVERY:g} to {MOST_EVERY:g} seconds, or 0 to "
            f"look once; got {flags.every}."
        )
    paths = [Path(path) for path in flags.positional]
    with contextlib.suppress(KeyboardInterrupt), _shown(flags) as show:
        while True:
            found = [status.seen(path) for path in status.find(paths)]
            if all(one.state == "unreadable" for one in found):
                raise UserError(found[0].why)
            show(found)
            if not flags.every or all(one.state != "running" for one in found):
                return
            time.sleep(flags.every)


@contextlib.contextmanager
def _shown(flags) -> Iterator[Callable[[Sequence], None]]:
    """Yield what shows a list of Status: redrawn, printed, or as JSON."""
    if flags.json:
        yield _print_json
    elif not flags.every:
        yield _print
    elif not sys.stdout.isatty():
        yield lambda found: _print(found, time.strftime("%Y-%m-%d %H:%M:%S"))
    else:
        from rich.live import Live

        with Live(auto_refresh=False) as live:
            yield lambda found: live.update(_drawn(found), refresh=True)


def _print(found: Sequence, *head: str) -> None:
    from fm_jax import status

    print("\n".join([*head, *status.lines(found)]), flush=True)


def _print_json(found: Sequence) -> None:
    now = round(time.time(), 3)
    for one in found:
        told = {"time": now} | dataclasses.asdict(one) | {"path": str(one.path)}
        for key, value in told.items():
            if isinstance(value, float) and not math.isfinite(value):
                told[key] = None  # JSON has no such number
        print(json.dumps(told))
    sys.stdout.flush()


def _drawn(found: Sequence):
    """Return a table that fits the terminal: the running runs, then others."""
    from rich.text import Text

    from fm_jax import status

    lines = status.lines(found)
    if len(lines) > (room := max(4, shutil.get_terminal_size().lines - 1)):
        order = sorted(found, key=lambda one: one.state != "running")
        lines = [*status.lines(order)[: room - 1], lines[-1]]
    return Text("\n".join(lines), no_wrap=True, overflow="crop")


COMMANDS = {
    "status": Command(
        show_status,
        "print where runs are: step, loss, speed, time left, last sign of life",
        "fm status runs/quickstart-1a2b3c4d --every=2",
        {
            "every": (0.0, "look again after so many seconds while a run is running"),
            "json": (False, "print a line of JSON for each run"),
        },
        positional="RUN...",
    ),
}
