"""The way of a run's rows to its trackers: a bounded queue, one thread behind it."""

import collections
import contextlib
import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from fm_jax import redact
from fm_jax.errors import StoppedError, reason

LOOK = 1.0  # seconds between two looks at the queue, and so between two flushes
MOST_ROWS = 4096  # that may wait
AGAIN = 256  # rows that a start writes again: more than a killed one had in hand
SLACK = 2.0  # seconds that the thread may take beyond those of its trackers
CLOSING = {"finished": 30.0, "failed": 10.0, "preempted": 5.0}  # seconds, by status


class Tracker(Protocol):
    """A place where rows go. Whatever it raises, it is left out from there on.

    num_dropped: rows that it could not take in time.
    """

    num_dropped: int

    def row(self, when: float, row: dict[str, Any]) -> None:
        """Take a row, written `when`, in seconds since 1970."""

    def rewind(self, step: int, since: int, kept: list[dict[str, Any]]) -> None:
        """Be told that the run goes on from `step`.

        What can be forgotten of `since` and later should be; `kept` are its rows now.
        """

    def flush(self) -> None:
        """Pass on what it holds; called every LOOK seconds."""

    def end(self, status: str) -> None:
        """Begin to end; status: a key of CLOSING."""

    def close(self, until: float) -> None:
        """Be at an end when it returns, at time.monotonic() `until` at the latest."""


class Feed:
    """Hears the rows of a run, and hands them to trackers in a thread of its own.

    The thread that trains appends to a queue and never waits, until `close`. Rows that
    find the queue full are counted. A tracker that raises is left out after one
    warning. As a block it is closed with the status that the block's end tells.
    """

    def __init__(self):
        self._open_by_name: Mapping[str, Callable[[], Tracker]] = {}
        self._waiting: collections.deque = collections.deque()
        self._trackers: dict[str, Tracker] = {}
        self._ending = threading.Event()
        self._status, self._until = "", 0.0
        self._thread: threading.Thread | None = None
        self._warn: Callable[[str], None] = lambda line: None
        self.num_dropped = 0

    def row(self, row: dict[str, Any]) -> None:
        """Hear a row; it must not change any more."""
        if len(self._waiting) < MOST_ROWS:
            self._waiting.append((time.time(), row))
        else:
            self.num_dropped += 1

    def rewind(self, step: int, kept: list[dict[str, Any]]) -> None:
        """Hear that a run goes on from `step` with the rows `kept`, in order.

        The last of them are handed on again: the process that wrote them may have died
        before they came through.
        """
        since = kept[-AGAIN - 1]["step"] + 1 if len(kept) > AGAIN else 0
        since = min(since, step)  # whose closing row is taken back
        again = [row for row in kept if row["step"] >= since]
        self._waiting.append((step, since, again))

    def __enter__(self) -> "Feed":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _) -> None:
        can_go_on = isinstance(error, StoppedError | KeyboardInterrupt)
        ended = "finished" if error is None else "failed"
        self.close("preempted" if can_go_on else ended)

    def start(
        self,
        open_by_name: Mapping[str, Callable[[], Tracker]],
        warn: Callable[[str], None],
    ) -> None:
        """Begin to hand on: what has waited first.

        open_by_name: each function is called once. warn: says a line. Both are called
        in the thread.
        """
        self._open_by_name, self._warn = open_by_name, warn
        self._thread = threading.Thread(target=self._go, name="trackers", daemon=True)
        self._thread.start()

    def close(self, status: str) -> None:
        """Hand on what waits and end the trackers, in the time that CLOSING gives."""
        if self._thread is None:
            return
        seconds = CLOSING[status]
        self._status, self._until = status, time.monotonic() + seconds
        self._ending.set()
        self._thread.join(seconds + SLACK)
        if self._thread.is_alive():
            at = ", ".join(self._trackers) or "opening"
            self._say(f"trackers did not end in {seconds + SLACK:g} s ({at})")
        for name, count in {"": self.num_dropped, **self._dropped()}.items():
            if count:
                of = f" {name}" if name else ""
                self._say(f"{count:,} rows were too many for the trackers{of}")

    def _dropped(self) -> dict[str, int]:
        return {n: t.num_dropped for n, t in list(self._trackers.items())}

    def _go(self) -> None:
        for name, open_tracker in self._open_by_name.items():
            with self._leaving_out(name):
                self._trackers[name] = open_tracker()
        is_over = False
        while not is_over:
            is_over = self._ending.wait(LOOK)
            while self._waiting:
                self._hand_on(*self._waiting.popleft())
            self._each(lambda tracker: tracker.flush())
        self._each(lambda tracker: tracker.end(self._status))  # all, before one is
        self._each(lambda tracker: tracker.close(self._until))  # waited for

    def _hand_on(self, *heard: Any) -> None:
        if len(heard) == 2:
            self._each(lambda tracker: tracker.row(*heard))
        else:
            self._each(lambda tracker: tracker.rewind(*heard))

    def _each(self, do: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            with self._leaving_out(name):
                do(tracker)

    @contextlib.contextmanager
    def _leaving_out(self, name: str):
        """Leave a tracker out, with a warning, when the block raises."""
        try:
            yield
        except Exception as error:  # of a library that is not ours: no harm
            self._trackers.pop(name, None)
            self._say(f"{name} is left out: {reason(error)}")

    def _say(self, what: str) -> None:
        with contextlib.suppress(Exception):  # what cannot be said stops nothing
            (line,) = redact.words([f"WARNING: {what}"], os.environ)
            self._warn(f"{line}; metrics.jsonl has every row")
