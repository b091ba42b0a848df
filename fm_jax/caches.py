"""What is made once and kept: one maker at a time, whole or not there."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from fm_jax.errors import UserError


@contextlib.contextmanager
def made_by_one(path: Path) -> Iterator[None]:
    """Let one process at a time make `path`; others wait and then find it made.

    Processes of one machine, and of others where the disk knows locks; elsewhere each
    makes its own, and the first to put it in place wins.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.parent / f".{path.name}.lock", "a") as lock:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def require(may_build: bool, path: Path) -> None:
    """Raise UserError on what is not in the cache and may not be built now."""
    if not may_build:
        raise UserError(f"{path} must be prepared; got nothing there. fm train does.")


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file that is never seen half-written, and on the disk on return."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(beside, "wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
