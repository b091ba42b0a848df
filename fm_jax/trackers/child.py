"""A tracker in a process of its own, whose library can then hold nothing up here.

What it imports, its threads, what it prints and what it does at exit are out of the
way, and it can be ended at any time. Both sides speak in lines of JSON.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

COMMAND = (sys.executable, "-P", "-m", "fm_jax.trackers.process")
MOST_BYTES = 8 << 20  # that wait for the process to take them
HANG_SECONDS = 150.0  # in which it must take something; W&B gives its server 90
PIECE = 1 << 16
POLL = 0.1


class TrackerError(RuntimeError):
    """A tracker that cannot go on."""


class Child:
    """Hands rows to a process, without ever waiting for it before `close`.

    start: what it is told first. log: the file that gets what it prints. Each method
    raises TrackerError, and has ended the process then, when that said that it failed,
    is gone, or took nothing for `hang_seconds`.
    """

    def __init__(
        self,
        start: dict[str, Any],
        log: Path,
        *,
        command: tuple[str, ...] = COMMAND,
        hang_seconds: float = HANG_SECONDS,
    ):
        self.num_dropped = 0
        self._log, self._hang_seconds = log, hang_seconds
        self._unsent, self._unread = bytearray(), b""
        self._num_told = self._num_taken = 0
        self._is_done, self._moved = False, time.monotonic()
        log.parent.mkdir(parents=True, exist_ok=True)
        package = str(Path(__file__).parents[2])
        paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
        with open(log, "ab") as stream:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
                start_new_session=True,  # a signal to the group is for us alone
            )
        for pipe in (self._process.stdin, self._process.stdout):
            os.set_blocking(pipe.fileno(), False)
        self._tell(start)

    def row(self, when: float, row: dict[str, Any]) -> None:
        """Hand on a row, or count it where too much waits."""
        if len(self._unsent) > MOST_BYTES:
            self.num_dropped += 1
        else:
            self._tell({"time": when, "row": row})

    def rewind(self, step: int, since: int, kept: list[dict[str, Any]]) -> None:
        """Say from which step the run goes on; points cannot be taken back there."""
        if step:
            self._tell({"went_on_from": step})

    def flush(self) -> None:
        """Write as much as the process takes, and hear what it says."""
        with self._ending_it():
            self._move()
            waits = time.monotonic() - self._moved
            if self._num_taken < self._num_told and waits > self._hang_seconds:
                raise TrackerError(f"it took nothing for {self._hang_seconds:g} s")

    def end(self, status: str) -> None:
        """Tell the process to end, with the run's status."""
        self._tell({"end": status})
        self.flush()

    def close(self, until: float) -> None:
        """Wait for the process, until then at most; then it is ended."""
        with self._ending_it():
            while not self._is_done:
                left = until - time.monotonic()
                if left <= 0:
                    raise TrackerError("it was not at an end in time, and was ended")
                out = [self._process.stdin] if self._unsent else []
                select.select([self._process.stdout], out, [], min(left, POLL))
                self._move()
            self.kill()

    def kill(self) -> None:
        """End the process and what it started, if it still lives."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()

    def _tell(self, message: dict[str, Any]) -> None:
        if self._num_taken == self._num_told:
            self._moved = time.monotonic()  # from here on something waits
        self._num_told += 1
        self._unsent += json.dumps(message, default=str).encode() + b"\n"

    def _move(self) -> None:
        """Write and read what can be without waiting."""
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            while self._unsent:
                sent = os.write(self._process.stdin.fileno(), self._unsent[:PIECE])
                del self._unsent[:sent]
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(self._process.stdout.fileno(), PIECE):
                *lines, self._unread = (self._unread + piece).split(b"\n")
                for line in lines:
                    self._hear(json.loads(line))
            if not self._is_done:
                raise TrackerError("its process is gone")

    def _hear(self, said: dict[str, Any]) -> None:
        if "error" in said:
            raise TrackerError(said["error"])
        self._num_taken += said["taken"]
        self._moved = time.monotonic()
        self._is_done = said["is_done"]

    @contextlib.contextmanager
    def _ending_it(self):
        try:
            yield
        except BaseException as error:
            self.kill()
            if isinstance(error, TrackerError):
                raise TrackerError(f"{error} (see {self._log})") from error
            raise
