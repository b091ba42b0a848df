"""The bytes of files: opened, unpacked, and the same from the first to the last."""

import contextlib
import gzip
import io
import os
import stat
import zlib
from collections.abc import Iterator

from fm_jax.corpora import paths, remote
from fm_jax.errors import UserError, reason

BUFFER_BYTES = 1 << 17
ZSTD_BYTES = 1 << 10  # unpacked at a time, to 32 MiB at most
ZSTD_WINDOW = 1 << 31  # what `zstd --long=31` looks back; held only by such files
UNREADABLE = "unreadable"  # stamp of a file that could not be read at first


class Damaged(Exception):
    """What a file holds cannot be had: it was cut short, or is not what it says."""

    kind = "cut short"  # of bad text, as a Reading counts it


class Unreadable(Damaged):
    """A file cannot be opened, and never could."""

    kind = UNREADABLE


# What reading a damaged file raises; BadGzipFile is an OSError too.
DAMAGE = (Damaged, gzip.BadGzipFile, EOFError, zlib.error)


@contextlib.contextmanager
def watched(path: str, stamp: str) -> Iterator[io.BufferedIOBase]:
    """Open a file that is to be the same until it is read, and name what goes wrong.

    stamp: what it was when its content became known; "": not known. Raises Unreadable
    where it cannot be opened, Damaged on damage met while it is open, and UserError
    where it is another file by then, or the disk fails.
    """
    try:
        raw = open_raw(path)
    except OSError as error:
        if stamp in ("", UNREADABLE):
            raise Unreadable(reason(error)) from error
        raise _changed(path, reason(error)) from error
    with raw:
        _refuse_changed(path, stamp, raw)
        try:
            yield raw
        except DAMAGE as error:
            _refuse_changed(path, stamp, raw)
            raise Damaged(reason(error)) from error
        except OSError as error:
            raise UserError(
                f"data file must be readable to its end; got {paths.shown(path)} "
                f"({reason(error)}). Restore it."
            ) from error
        except UserError:
            _refuse_changed(path, stamp, raw)
            raise
        _refuse_changed(path, stamp, raw)


def open_raw(path: str) -> io.BufferedIOBase:
    """Open a file's bytes as they lie, here or under a URL; OSError where it cannot."""
    if paths.is_remote(path):
        return remote.open_file(path)
    if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for
        raise OSError("not a plain file")
    return open(path, "rb", buffering=BUFFER_BYTES)


def unpacked(raw: io.BufferedIOBase, path: str) -> io.BufferedIOBase:
    """Return what the file of a path holds; reading it raises one of DAMAGE."""
    packing = paths.packing_of(path)
    if packing == ".gz":
        return gzip.GzipFile(fileobj=raw)
    return io.BufferedReader(_Zstd(raw)) if packing == ".zst" else raw


def stamp_of(status: os.stat_result) -> str:
    """Return what changes when a local file does."""
    return f"{status.st_size} bytes, mtime {status.st_mtime_ns}"


def _refuse_changed(path: str, then: str, raw: io.BufferedIOBase) -> None:
    """Raise UserError on an open file whose stamp is not what it was; "": unknown."""
    if not then:
        return
    try:
        is_remote = paths.is_remote(path)
        now = remote.version(path)[0] if is_remote else stamp_of(os.fstat(raw.fileno()))
    except OSError as error:
        raise _changed(path, reason(error)) from error
    if now != then:
        raise _changed(path, f"{then} then, {now} now")


def _changed(path: str, how: str) -> UserError:
    """Return the error of a file that is another since its content became known."""
    return UserError(
        f"data file must not change until it is read; got {paths.shown(path)} ({how}). "
        "Start again when nothing writes to it."
    )


class _Zstd(io.RawIOBase):
    """All frames of a zstd file; a lost end is damage too.

    zstandard's own reader takes a file that was cut short for one that ended.
    """

    def __init__(self, raw: io.BufferedIOBase):
        self._raw = raw
        self._chunks = self._unpacked()
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._ready:
            self._ready = memoryview(b"")  # before the next chunk is held, not after
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._ready = memoryview(chunk)
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _unpacked(self) -> Iterator[bytes]:
        import zstandard

        decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW)
        frame, packed = None, b""
        try:
            while packed := packed or self._raw.read(ZSTD_BYTES):
                frame = frame or decompressor.decompressobj()
                yield frame.decompress(packed)
                packed = b""
                if frame.eof:
                    packed, frame = frame.unused_data, None
        except zstandard.ZstdError as error:
            raise Damaged(str(error)) from error
        if frame:
            raise Damaged("Compressed file ended before its last frame did")
