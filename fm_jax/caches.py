"""What is made once and kept: one maker at a time, whole or not there."""

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from fm_jax.errors import UserError


@contextlib.contextmanager
def made_by_one(path: Path, *, is_cache: bool = True) -> Iterator[None]:
    """Let one process at a time make `path`; others wait and then find it made.

    Processes of one machine, and of others where the disk knows locks; elsewhere each
    makes its own, and the first to put it in place wins. is_cache: folders above `path`
    that are missing are for this user alone; those of results are as the user has them.
    """
    if is_cache:
        folder(path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.parent / f".{path.name}.lock", "a") as lock:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def folder(path: Path) -> None:
    """Make a folder, and those above it that are missing, for this user alone."""
    missing = [one for one in (path, *path.parents) if not one.exists()]
    for one in reversed(missing):
        one.mkdir(mode=0o700, exist_ok=True)


def require_own(path: Path, thing: str) -> None:
    """Raise UserError unless a folder is this user's, and no other can write to it.

    For what is run or believed as it is found there. `thing` is what it was named by.
    """
    status = path.stat()
    is_open = bool(status.st_mode & (stat.S_IWGRP | stat.S_IWOTH))
    if status.st_uid == os.geteuid() and not is_open:
        return
    got = "which others can write to" if is_open else "which is another user's"
    raise UserError(
        f"{thing} must be a folder of yours alone, for what is in it is run; got "
        f"{path}, {got}. "
        + (f"chmod go-w {path}, or choose another." if is_open else "Choose another.")
    )


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
