"""What a person sees while a run goes: a bar on a terminal, plain lines elsewhere."""

import sys
import time

from fm_jax import durations


class Progress:
    """Shows step, loss, bits per byte, tokens/s, MFU and time left.

    On a terminal one line is redrawn; elsewhere a line is printed at each whole tenth
    and at least every 20 seconds.
    """

    def __init__(self, num_steps: int, start: int, *, is_shown: bool):
        self.num_steps, self.start, self.is_shown = num_steps, start, is_shown
        self.is_terminal = is_shown and sys.stderr.isatty()
        self._bar = self._task = None
        self._last_print, self._last_tenth = time.monotonic(), -1
        if self.is_terminal:
            self._open()

    def _open(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            BarColumn(bar_width=20),
            TextColumn("{task.completed}/{task.total} {task.description}"),
            TextColumn("left"),
            TimeRemainingColumn(compact=True),
            console=Console(stderr=True),
            transient=False,
        )
        self._task = self._bar.add_task("", total=self.num_steps, completed=self.start)
        self._bar.start()

    def update(self, step: int, shown: dict, seconds_left: float | None) -> None:
        """Show the numbers of a step."""
        text = describe(shown)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
            return
        tenth = 10 * step // self.num_steps
        is_due = time.monotonic() - self._last_print > 20
        if tenth != self._last_tenth or is_due:
            self._last_tenth, self._last_print = tenth, time.monotonic()
            left = ""
            if seconds_left is not None:
                left = f"  left {durations.clock(seconds_left)}"
            self.say(f"step {step}/{self.num_steps}  {text}{left}")

    def say(self, line: str) -> None:
        """Print a line without tearing the bar."""
        if self._bar is not None:
            self._bar.console.print(line, highlight=False, markup=False)
        elif self.is_shown:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()


def describe(shown: dict[str, float]) -> str:
    """Return the numbers of a step in one line; what is not known yet is left out."""
    text = f"loss {shown['loss']:.3f}"
    if "bits_per_byte" in shown:
        text += f" nats/token  {shown['bits_per_byte']:.3f} bits/byte"
    if "accuracy" in shown:
        text += f"  accuracy {shown['accuracy']:.3f}"
    if "mfu" in shown:
        text += f"  {shown['tokens_per_second']:,.0f} tokens/s  MFU {shown['mfu']:.0%}"
    return text
