"""A process that works lanes: told of them in lines of JSON, and answering in lines.

The first line to it says what is the same for all lanes, each one after that is a lane.
It tells what it reads, and ends each lane with "done" or with what went wrong. It ends
when its input does, and so too when whoever started it is killed.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import queue
import selectors
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from fm_jax.corpora.documents import Piece
from fm_jax.data.hands import Hand, Work
from fm_jax.data.lanes import Lane
from fm_jax.errors import OutOfMemoryError, UserError
from fm_jax.tokenizers import load

EVERY = 0.1  # seconds between reports, at least
LARGE_BYTES = 1 << 20  # a piece from here on is told of before it is read


@dataclasses.dataclass(frozen=True)
class Job:
    """A lane to work; `room` is None where hashes are all that is wanted of it."""

    lane: Lane
    room: int | None

    def do(self, hand: Hand, report: Callable) -> None:
        """Work the lane in this process."""
        if self.room is None:
            hand.hash(self.lane, report)
        else:
            hand.tokenize(self.lane, self.room, report)


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a process is told first."""

    work: Work
    tokenizer: str  # its file
    end_id: int
    num_threads: int


def run(
    setup: Setup,
    jobs: Iterator[Job],
    *,
    num_workers: int,
    report: Callable[[str, int, int, int], None],
    finish: Callable[[Lane], None],
    idle: Callable[[], None],
) -> None:
    """Work all jobs in processes of their own, none of which is left on return.

    A job is taken of `jobs` when a process is free, and `finish` is called at its end.
    Raises the UserError or OSError that a process met, and RuntimeError where one died.
    """
    with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
        for job in itertools.islice(jobs, num_workers):
            worker = stack.enter_context(_Process(setup))
            selector.register(worker.output, selectors.EVENT_READ, worker)
            worker.take(job)
        while selector.get_map():
            for key, _ in selector.select(timeout=EVERY):
                for kind, said in key.data.answers():
                    if kind == "read":
                        report(*said)
                    elif kind == "user_error":
                        raise UserError(said)
                    elif kind == "os_error":
                        raise OSError(*said)
                    else:
                        finish(key.data.job.lane)
                        if job := next(jobs, None):
                            key.data.take(job)
                        else:
                            selector.unregister(key.fileobj)
            idle()


class _Process:
    """A worker, seen by who started it."""

    def __init__(self, setup: Setup):
        package = str(Path(__file__).parents[2])
        paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
        threads = setup.num_threads
        self._process = subprocess.Popen(
            # -P: what lies in this folder is no library.
            [sys.executable, "-P", "-m", "fm_jax.data.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ
            | {
                "PYTHONPATH": os.pathsep.join(paths),
                "RAYON_NUM_THREADS": str(threads),
                "TOKENIZERS_PARALLELISM": "true" if threads > 1 else "false",
            },
            process_group=0,  # an interrupt is for us alone
        )
        self.output = self._process.stdout
        self.job: Job | None = None
        self._unread, self._piece = b"", ""
        self._tell(dataclasses.asdict(setup))

    def __enter__(self) -> "_Process":
        return self

    def __exit__(self, kind, *_) -> None:
        if kind:
            self._process.kill()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self.output.close()

    def take(self, job: Job) -> None:
        """Hand it a job."""
        self.job, self._piece = job, job.lane.pieces[0].name
        self._tell(dataclasses.asdict(job))

    def answers(self) -> list[tuple]:
        """Return what it said since the last time; call when there is something.

        Raises RuntimeError when it is dead.
        """
        said = os.read(self.output.fileno(), 1 << 16)
        if not said:
            status = self._process.wait()
            is_killed = status == -signal.SIGKILL  # as Linux does when memory runs out
            why = "Was there memory enough?" if status < 0 else "It says why above."
            raise (OutOfMemoryError if is_killed else RuntimeError)(
                "a process that builds a token store must live; it ended with status "
                f"{status} while it read {self._piece}. {why} Start again: finished "
                "shards are kept."
            )
        *lines, self._unread = (self._unread + said).split(b"\n")
        answers = [json.loads(line) for line in lines]
        self._piece = next((s[0] for k, s in answers[::-1] if k == "read"), self._piece)
        return answers

    def _tell(self, what: dict) -> None:
        # One that is dead is found to be so when its answers are read.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(what).encode() + b"\n")
            self._process.stdin.flush()


def main() -> None:
    """Be a worker."""
    # Whoever started it may have to save before it ends, and ends it too.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # What libraries print must not stand among the answers.
    answers = open(os.dup(1), "w")  # noqa: SIM115, open as long as the process
    os.dup2(2, 1)
    orders: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(orders,), daemon=True).start()
    voice = _Voice(answers)
    try:
        setup = orders.get()
        work = Work.from_json(setup["work"])
        tokenizer = load.load(Path(setup["tokenizer"]), end_id=setup["end_id"])
        hand = Hand(work, tokenizer, num_threads=setup["num_threads"])
        while True:
            order = orders.get()
            Job(Lane.from_json(order["lane"]), order["room"]).do(hand, voice.report)
            voice.say("done")
    except UserError as error:
        voice.say("user_error", str(error))
    except BrokenPipeError:
        os._exit(1)  # nobody is there to be told
    except OSError as error:
        voice.say("os_error", [error.errno, error.strerror, error.filename])
    except Exception:
        traceback.print_exc()
        os._exit(1)  # a plain end waits for what _listen holds, and it for its input
    orders.get()  # the end, which _listen brings


def _listen(orders: queue.SimpleQueue) -> None:
    for line in sys.stdin.buffer:
        orders.put(json.loads(line))
    os._exit(0)  # in whatever the others are


class _Voice:
    """Answers in lines, and gathers what was read so that there are not too many."""

    def __init__(self, stream):
        self._stream, self._last = stream, 0.0
        self._piece: Piece | None = None
        self._counts = [0, 0, 0]

    def report(self, piece: Piece, *counts: int) -> None:
        """Tell what was read, now or with what is read next."""
        is_large = piece is not self._piece and piece.size >= LARGE_BYTES
        self._piece = piece
        self._counts = [a + b for a, b in zip(self._counts, counts, strict=True)]
        if is_large or time.monotonic() - self._last >= EVERY:
            self._tell()

    def say(self, kind: str, what=None) -> None:
        """Answer, and tell what was read before."""
        if any(self._counts):
            self._tell()
        print(json.dumps([kind, what]), file=self._stream, flush=True)

    def _tell(self) -> None:
        said = ["read", [self._piece.name, *self._counts]]
        print(json.dumps(said), file=self._stream, flush=True)
        self._counts, self._last = [0, 0, 0], time.monotonic()


if __name__ == "__main__":
    main()
