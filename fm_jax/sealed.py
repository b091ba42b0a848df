"""Compiled programs on the disk, each with its digest: a damaged one is made again.

jax unpacks what lies in its cache of programs and runs it: of entries in which one bit
has flipped, more than half unpack to other machine code and no word is said. It reads
and writes them through the paths of etils, which others may register, as we do here.
Imports no jax.
"""

import functools
import hashlib
import os
import sys
from pathlib import Path
from typing import Self

from fm_jax import caches
from fm_jax.errors import UserError

PREFIX = "sealed://"
DIGEST_BYTES = 16


def programs_in(folder: str) -> str:
    """Return what to tell jax so that it keeps programs in `folder`, each sealed.

    The folder is made, private to the user. Raises UserError where it cannot be, or
    others can write to it.
    """
    path = Path(folder).expanduser().absolute()
    try:
        caches.folder(path)
        caches.require_own(path, "train.compile_cache")
    except OSError as error:
        raise UserError(
            f"train.compile_cache must be a writable folder; got {path} "
            f"({error.strerror}). Set it to '' for none."
        ) from error
    _register()
    return PREFIX + os.fspath(path)


@functools.cache
def _register() -> None:
    from etils import epath

    epath.register_path_cls(PREFIX)(SealedPath)


def _local(part: str | os.PathLike) -> str:
    return os.fspath(part).removeprefix(PREFIX)


class SealedPath(type(Path())):
    """A path whose bytes end, on the disk, with their digest; its text has no prefix.

    Files come into place whole. One that is not as it was written is removed when it is
    read, so that the next to write it finds its place free.
    """

    if sys.version_info < (3, 12):

        def __new__(cls, *parts: str | os.PathLike) -> Self:
            return super().__new__(cls, *map(_local, parts))

    else:

        def __init__(self, *parts: str | os.PathLike):
            super().__init__(*map(_local, parts))

    def read_bytes(self) -> bytes:
        """Return what was written; raises OSError where something else lies there."""
        raw = super().read_bytes()
        held, digest = raw[:-DIGEST_BYTES], raw[-DIGEST_BYTES:]
        if _digest(held) != digest:
            self.unlink(missing_ok=True)
            raise OSError(f"{self} is not as it was written; it is made again")
        return held

    def write_bytes(self, data: bytes) -> int:
        """Write all of a file or nothing."""
        beside = Path(self.with_name(f".{self.name}.{os.getpid()}"))
        try:
            beside.write_bytes(data + _digest(data))
            os.replace(beside, self)
        finally:
            beside.unlink(missing_ok=True)
        return len(data)


def _digest(held: bytes) -> bytes:
    return hashlib.blake2b(held, digest_size=DIGEST_BYTES).digest()
