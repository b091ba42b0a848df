"""What files hold, known by digests that are kept, so that each is hashed once."""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import sqlite3
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from fm_jax import caches, machine
from fm_jax.corpora import paths, remote, streams

SETTLED_SECONDS = 2  # a younger file may change within what its time can tell
WRITE_SECONDS = 5
LOCKED_SECONDS = 10
FILES_TOGETHER = 1024
SCHEMA = """create table if not exists facts
    (path blob, what text, mark text, value text, primary key (path, what))"""
FIND = "select value from facts where path = ? and what = ? and mark = ?"
KEEP = "insert or replace into facts values (?, ?, ?, ?)"


@dataclasses.dataclass(frozen=True)
class Known:
    """What a file holds, by digest; its stamp at the time, and its size in bytes."""

    digest: str
    stamp: str
    size: int


def known(files: Collection[str], cache: Path | None) -> dict[str, Known]:
    """Return what each file holds: blake2b of its bytes, or what stands for a URL's.

    A file that cannot be read has streams.UNREADABLE for both, and is no error here.
    """
    found: dict[str, Known] = {}
    here: dict[str, os.stat_result] = {}
    urls = [path for path in files if paths.is_remote(path)]
    for path, told in remote.versions(urls).items():
        is_there = not isinstance(told, OSError)
        version, size = told if is_there else (streams.UNREADABLE, 0)
        found[path] = Known(version, version, size)
    for path in files:
        if path not in found:
            found[path] = Known(streams.UNREADABLE, streams.UNREADABLE, 0)
            with contextlib.suppress(OSError):
                status = os.stat(path)
                if os.access(path, os.R_OK):
                    here[path] = status
    for path, digest in facts(here, "blake2b", _digest, cache).items():
        stamp = streams.stamp_of(here[path])
        found[path] = Known(digest, stamp, here[path].st_size)
    return found


def facts(
    files: dict[str, os.stat_result],
    what: str,
    make: Callable[[str], object],
    cache: Path | None,
) -> dict[str, object]:
    """Return what `make` says of local files, JSON, from the cache where it has it.

    files: the status of each path. Those on which `make` raises OSError are left out.
    """
    kept, found = _Kept(cache), {}
    try:
        for path, status in files.items():
            value = kept.find(path, what, status)
            if value is not None:
                found[path] = value
        missing = {path: files[path] for path in files if path not in found}
        for path, value, is_settled in _made(missing, make):
            found[path] = value
            if is_settled:
                kept.keep(path, what, files[path], value)
    finally:
        kept.close()
    return found


def _made(files: dict, make) -> Iterator[tuple[str, object, bool]]:
    """Yield what `make` says of each file, as threads have it, and if that may stay."""

    def made(path: str) -> tuple[str, object, bool]:
        is_old = time.time() - files[path].st_mtime >= SETTLED_SECONDS
        value = make(path)
        return path, value, is_old and _mark(os.stat(path)) == _mark(files[path])

    with concurrent.futures.ThreadPoolExecutor(machine.num_cores()) as pool:
        left = iter(files)
        while together := list(itertools.islice(left, FILES_TOGETHER)):
            tasks = [pool.submit(made, path) for path in together]
            for task in concurrent.futures.as_completed(tasks):
                with contextlib.suppress(OSError):
                    yield task.result()


def _digest(path: str) -> str:
    with streams.open_raw(path) as raw:
        return hashlib.file_digest(raw, "blake2b").hexdigest()[:32]


class _Kept:
    """Facts in `cache/digests.sqlite`, as long as it does what it is asked.

    A broken one is made anew. Without one, or where it cannot be written or another
    process has it for long, nothing is kept.
    """

    def __init__(self, cache: Path | None):
        self._file = cache and cache / "digests.sqlite"
        self._base: sqlite3.Connection | None = None
        self._rows: list[tuple] = []
        self._wrote = time.monotonic()
        for _ in range(2 if cache else 0):
            self._base = self._base or self._tried(self._open, always=True)

    def find(self, path: str, what: str, status: os.stat_result) -> object:
        """Return a fact of a file that is as it was, or None."""
        key = (os.fsencode(path), what, _mark(status))

        def find(base):
            rows = base.execute(FIND, key).fetchall()
            return json.loads(rows[0][0]) if rows else None

        return self._tried(find)

    def keep(self, path: str, what: str, status: os.stat_result, value: object) -> None:
        """Keep a fact of a file."""
        row = (os.fsencode(path), what, _mark(status), json.dumps(value))
        self._rows.append(row)
        if time.monotonic() - self._wrote > WRITE_SECONDS:
            self._write()

    def close(self) -> None:
        """Write what is not yet written."""
        self._write()
        if self._base:
            self._base.close()

    def _open(self, _) -> sqlite3.Connection:
        caches.folder(self._file.parent)
        base = sqlite3.connect(self._file, timeout=LOCKED_SECONDS)
        base.execute(SCHEMA)
        return base

    def _write(self) -> None:
        def write(base):
            with base:  # all of the rows or none
                base.executemany(KEEP, self._rows)

        if self._rows:
            self._tried(write)
        self._rows, self._wrote = [], time.monotonic()

    def _tried(self, do: Callable, *, always: bool = False):
        """Return what `do` makes of the database; None, and no more of it, if it fails.

        One that is broken is deleted, so that the next is another.
        """
        try:
            return do(self._base) if self._base or always else None
        except (OSError, sqlite3.OperationalError):
            self._base = None
        except (sqlite3.DatabaseError, ValueError):  # ValueError: of what it held
            self._base = None
            with contextlib.suppress(OSError):
                self._file.unlink()
        return None


def _mark(status: os.stat_result) -> str:
    # ctime too: whoever writes to a file may put its mtime back.
    times = f"{status.st_mtime_ns} {status.st_ctime_ns}"
    return f"{status.st_size} {times} {status.st_ino}"
