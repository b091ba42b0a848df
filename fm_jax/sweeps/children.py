"""Child processes: each on its share of the machine, started, known again, ended."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from fm_jax.errors import UserError
from fm_jax.sweeps import costs

POLL_SECONDS = 0.2
GRACE_SECONDS = 20.0  # between asking a process to stop and ending it
SHARED_MEMORY = 0.9  # of a GPU that several share, for all of them together


@dataclasses.dataclass(frozen=True)
class Slot:
    """A share of the machine: cores to stay on, and variables that say which GPUs."""

    cores: frozenset[int] | None
    environment: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Child:
    """A process that goes; what it says stands in `log` from byte `log_start` on."""

    process: subprocess.Popen
    slot: Slot
    began: float
    log: Path
    log_start: int

    def seconds(self) -> float:
        """Return how long it goes already."""
        return time.monotonic() - self.began

    def last_words(self) -> str:
        """Return the last line that it said, "" where it said nothing."""
        with open(self.log, "rb") as stream:
            stream.seek(self.log_start)
            lines = stream.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")


def slots(parallel: int) -> list[Slot]:
    """Return the shares of this machine that processes at once get.

    One alone gets everything. On GPUs each gets its own, or a part of one's memory
    where they are fewer; on CPU each gets its own cores. Raises UserError when those
    are fewer.
    """
    if parallel == 1:
        return [Slot(None, {})]
    devices = [device for device, _ in costs.gpus()]
    if devices:
        sharing = -(-parallel // len(devices))
        memory = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{SHARED_MEMORY / sharing:.3f}"}
        found = []
        for index in range(parallel):
            own = devices[index::parallel] or [devices[index % len(devices)]]
            given = {"CUDA_VISIBLE_DEVICES": ",".join(own)}
            found.append(Slot(None, given | (memory if sharing > 1 else {})))
        return found
    if not hasattr(os, "sched_getaffinity"):
        return [Slot(None, {})] * parallel
    cores = sorted(os.sched_getaffinity(0))
    if parallel > len(cores):
        raise UserError(
            f"--parallel must be at most the cores of this machine, {len(cores)}; got "
            f"{parallel}."
        )
    share = len(cores) // parallel
    return [
        Slot(frozenset(cores[i * share : (i + 1) * share]), {}) for i in range(parallel)
    ]


def start(command: Sequence[str], *, log: Path, slot: Slot) -> Child:
    """Start a process on a slot; what it says is appended to `log`."""
    package = Path(__file__).parents[2]
    paths = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
    with open(log, "ab") as stream:
        log_start = stream.tell()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | slot.environment,
            start_new_session=True,  # Ctrl-C is for us: we stop it cleanly
        )
    # At once, before it has threads, which take over what their parent may use.
    if slot.cores is not None:
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(process.pid, slot.cores)
    return Child(process, slot, time.monotonic(), log, log_start)


def stop(going: Collection[Child]) -> None:
    """Ask processes to stop, wait, and end those that do not."""
    for child in going:
        child.process.terminate()
    end = time.monotonic() + GRACE_SECONDS
    for child in going:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.process.wait(max(0.0, end - time.monotonic()))
    for child in going:
        child.process.kill()  # nothing happens to one that has ended
        child.process.wait()


def is_ours(pid: int, path: Path) -> bool:
    """Return whether a process lives and trains the run at `path`."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return f"--workdir={path}".encode() in words


def end_leftover(pid: int, path: Path) -> None:
    """End the process that trains the run at `path`, if it still is that one."""
    for number, wait in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, 5.0)):
        end = time.monotonic() + wait
        if is_ours(pid, path):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        while is_ours(pid, path) and time.monotonic() < end:
            time.sleep(POLL_SECONDS)
