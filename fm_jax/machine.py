"""What this process runs on: its allocator, its versions, its start. Imports no jax."""

import contextlib
import ctypes
import datetime
import gc
import importlib.util
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from fm_jax import redact

PACKAGES = (
    "fm_jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "tokenizers",
    "tiktoken",
    "numpy",
)

GOOGLE = "0x1ae0"  # its PCI vendor id: a TPU is in this machine
QUIET = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else a lock file lets in one process at a time
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",  # read and not used; unset, it warns
    "TPU_LOG_DIR": "disabled",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_SKIP_MDS_QUERY": "1",  # asks no cloud's metadata server what this machine is
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def tune_allocator() -> None:
    """Keep freed memory in the process, where the C library is glibc.

    XLA on a CPU allocates its buffers anew at each step; glibc returns them to the
    system and takes page faults for a fifth to half of the time. One arena, no mmap,
    no trimming. Must run before jax starts its threads.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    arena_max, mmap_max, trim_threshold = -8, -4, -1
    libc.mallopt(arena_max, 1)
    libc.mallopt(mmap_max, 0)
    libc.mallopt(trim_threshold, 2**31 - 1)


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Collect no garbage in the block, which imports: there is none, and it takes long.

    What was imported stays as long as the process, so later collections leave it out
    too. Where jax is there already, which is the most of it, nothing is done: frozen
    arrays would never be freed.
    """
    if "jax" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def skip_absent_tpu() -> None:
    """Keep libtpu, where it is installed without a TPU, out of the way.

    It is there to plan for TPUs, and jax would ask it for devices whenever it starts:
    0.15 s and 110 MB, and lines that say that there are none. Other accelerators come
    as plugins of jax; where one is installed it is left alone.
    """
    vendors = Path("/sys/bus/pci/devices").glob("*/vendor")
    has_one = any(file.read_text().strip() == GOOGLE for file in vendors)
    # A container may hide the bus, not the devices that it was given.
    if has_one or any(Path("/dev").glob("accel*")) or any(Path("/dev").glob("vfio")):
        return
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if importlib.util.find_spec("jax_plugins") is None:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def seconds_since_start() -> float:
    """Return seconds since this process was started, by the system's clock."""
    try:
        after_boot = int(
            Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19]
        ) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - after_boot
    except (OSError, AttributeError, IndexError):
        return time.process_time()


def num_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> int:
    """Return the host memory that this process holds now; 0 where it cannot be told."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def peak_memory_bytes() -> int:
    """Return the most host memory that this process has held.

    Not what its parent held before it, which getrusage counts too.
    """
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    import importlib.metadata  # slow, and each worker process imports this file

    found = {"python": platform.python_version(), "system": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def started(command: list[str]) -> dict[str, object]:
    """Return what a run's history keeps of a start: when, how and of which code."""
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": redact.words(command, os.environ),
        "git": git_state(),
        "versions": versions(),
        "xla": xla_flags(),
    }


def xla_flags() -> dict[str, str]:
    """Return the flags that XLA and the TPU's library read from the environment."""
    names = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
    return {name: said for name in names if (said := os.environ.get(name, "").strip())}


def code_digest() -> str:
    """Return a digest of this package's source, which a commit is not while it changes.

    Of the files' names and bytes: two hosts that have the same have the same program.
    """
    import hashlib

    folder, digest = Path(__file__).parent, hashlib.blake2b(digest_size=10)
    for file in sorted(folder.rglob("*.py")):
        digest.update(f"{file.relative_to(folder).as_posix()}\0".encode())
        digest.update(hashlib.blake2b(file.read_bytes()).digest())
    return digest.hexdigest()


def git_state() -> dict[str, object]:
    """Return the source tree's commit and whether it has changes; {} without git."""
    folder = Path(__file__).parent

    def git(*args):
        return subprocess.run(
            ["git", "-C", str(folder), *args],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()

    try:
        return {
            "commit": git("rev-parse", "HEAD"),
            "dirty": bool(git("status", "--porcelain")),
        }
    except (OSError, subprocess.SubprocessError):
        return {}
