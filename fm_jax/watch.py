"""Being asked to end, and not going on: what a process does about either.

A thread looks at both, so that neither waits for a main thread that is in a compiler or
in a collective that others never join. Imports no jax.
"""

import contextlib
import faulthandler
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

EXIT_STOPPED, EXIT_HUNG = 75, 85
LOOK, TELL = 1.0, 5.0  # seconds between two looks, and between two signs of life
COMPILING = 4.0  # the times of its limit that a beat may take where programs compile


class Watch:
    """Sees SIGTERM, and a main thread that gives no sign of life, within its block.

    At the first SIGTERM `is_asked` becomes true, and `error`, where there is one, is
    raised in the main thread as soon as that can be. The process has `grace_seconds` to
    end; then it is ended, with 75 where nothing would be lost, as `is_saved` says, else
    with 85. At the second, or at a second Ctrl-C, it ends at once.

    `beat` is a sign of life: from the first one on, the next must come within
    `hang_seconds`, or the stacks of all threads go to stderr and to the file `stacks`,
    and the process is ended with 85. 0 seconds: no limit. Its signs of life are counted
    in the file `alive`; one that hangs tells those of the others in that folder, for
    the last of them is whom all wait for. on_end: called with the exit status of a
    process that is ended here, which no `finally` sees.
    """

    def __init__(
        self,
        *,
        grace_seconds: float = 0,
        hang_seconds: float = 0,
        on_end: Callable[[int], None] = lambda status: None,
    ):
        self.grace_seconds, self.hang_seconds = grace_seconds, hang_seconds
        self.is_asked, self.is_saved = False, True
        self.error: Exception | None = None
        self.on_end = on_end
        self.stacks: Path | None = None
        self.alive: Path | None = None
        self._num_beats, self._told = 0, 0.0
        self._due = self._last_call = float("inf")
        self._num_interrupts = self._num_asked = 0

    def beat(self, *, times: float = 1) -> None:
        """Give a sign of life; the next may take `times` as long as usual."""
        self._num_beats += 1
        if self.hang_seconds:
            self._due = time.monotonic() + times * self.hang_seconds

    def rest(self) -> None:
        """Expect no sign of life until the next one."""
        self._due = float("inf")

    def __enter__(self) -> "Watch":
        self._ours, theirs = socket.socketpair()
        self._theirs = theirs
        theirs.setblocking(False)
        self._is_over = False
        self._before = None
        # Python's own handlers wait for the main thread; this descriptor does not.
        if threading.current_thread() is threading.main_thread():
            self._fd = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
            self._before = signal.signal(signal.SIGTERM, self._asked)
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            signal.set_wakeup_fd(self._fd)
        self._is_over = True
        self._theirs.send(b"\0")
        self._thread.join()
        self._ours.close()
        self._theirs.close()

    def _asked(self, number: int, frame: object) -> None:
        self.is_asked = True
        if self.error is not None:
            raise self.error

    def _look(self) -> None:
        self._ours.settimeout(LOOK)
        while not self._is_over:
            with contextlib.suppress(TimeoutError):
                for number in self._ours.recv(16):
                    self._heard(number)
            now, alive = time.monotonic(), self.alive  # which the run takes away
            if alive and now - self._told > TELL:
                self._told = now
                with contextlib.suppress(OSError):
                    alive.write_text(f"{self._num_beats}\n")
            if now > self._last_call:
                status = EXIT_STOPPED if self.is_saved else EXIT_HUNG
                self._end(
                    status,
                    f"asked to stop {self.grace_seconds:g} s ago and not at an end; "
                    + ("what is saved stays" if self.is_saved else "nothing new saved"),
                )
            if now > self._due:
                self._end(
                    EXIT_HUNG,
                    f"no step, batch or checkpoint came to its end in "
                    f"{self.hang_seconds:g} s or the multiple that it has: hung"
                    + self._others(),
                )

    def _others(self) -> str:
        """Return how far the other processes of the run are, where there are any."""
        found = []
        with contextlib.suppress(OSError, AttributeError):
            for file in sorted(self.alive.parent.iterdir()):
                if file != self.alive:
                    age = time.time() - file.stat().st_mtime
                    count = file.read_text().strip()
                    found.append(f"; process {file.name} gave {count}, {age:.0f} s ago")
        return f". It gave {self._num_beats} signs of life{''.join(found)}"

    def _heard(self, number: int) -> None:
        if number == signal.SIGINT:
            self._num_interrupts += 1
        self._num_asked += number == signal.SIGTERM
        if number == signal.SIGTERM and self._num_asked == 1:
            self.is_asked = True
            if self.grace_seconds:
                self._last_call = time.monotonic() + self.grace_seconds
        elif number == signal.SIGTERM or self._num_interrupts > 1:
            self._end(128 + number, "asked to stop twice", stacks=False)

    def _end(self, status: int, why: str, *, stacks: bool = True) -> None:
        """End the process, whatever its other threads do."""
        with contextlib.suppress(Exception):
            print(f"\nfm: {why}. Exit {status}.", file=sys.stderr, flush=True)
            if stacks:
                faulthandler.dump_traceback(all_threads=True)
        if stacks and self.stacks:
            with contextlib.suppress(OSError), open(self.stacks, "w") as stream:
                stream.write(f"{why}\n\n")
                stream.flush()
                faulthandler.dump_traceback(stream, all_threads=True)
        with contextlib.suppress(Exception):
            self.on_end(status)
        os._exit(status)
