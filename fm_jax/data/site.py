"""Where a store is made: a folder beside its place, kept for the next try."""

import contextlib
import fcntl
import os
import shutil
import socket
import tempfile
import time
from pathlib import Path

from fm_jax import caches
from fm_jax.data.arrays import sync

KEPT_SECONDS = 7 * 24 * 3600  # from the last change of what nobody went on with


class Site:
    """The folder in which one process at a time makes the store of a place.

    Where the disk knows no locks several might, so there each has a folder of its own,
    which nobody goes on with.
    """

    def __init__(self, place: Path, name: str):
        """name: the store's, which says what is in it."""
        self.place = place
        self._is_shared = _can_lock(place.parent)
        whose = "" if self._is_shared else f"-{socket.gethostname()}-{os.getpid()}"
        whole = name if place.name == name else f"{place.name}.{name}"
        self.folder = place.parent / f".{whole}.building{whose}"
        self.parts = self.folder / "parts"  # what is taken down at the end

    @property
    def is_whole(self) -> bool:
        """Whether all that is left to do is to put the store in its place."""
        return (self.folder / "header.json").exists()

    def open(self, plan: str) -> bool:
        """Make the folder ready for work on a plan; return whether some was done.

        What was made by another plan goes, and what others left long ago.
        """
        for other in self.place.parent.glob(".*.building*"):
            parts = other / "parts"
            with contextlib.suppress(OSError):  # another's folder has no parts
                is_old = time.time() - parts.stat().st_mtime > KEPT_SECONDS
                if is_old and (parts / "plan").exists():
                    shutil.rmtree(other, ignore_errors=True)
        file = self.parts / "plan"
        is_known = file.exists() and file.read_text() == plan
        if not self.is_whole and not is_known:
            if self.folder.exists():
                shutil.rmtree(self.folder)
            self.parts.mkdir(parents=True)
            caches.write_whole(file, plan)
        for stray in self.parts.glob(".*"):  # half-written, by one that was killed
            stray.unlink()
        return self.is_whole or self._has_shards

    def leave(self) -> None:
        """Leave the folder to the next try, if there is anything for it."""
        if not self.is_whole and not (self._is_shared and self._has_shards):
            self.clear()

    def clear(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def finish(self, header: str) -> None:
        """Write the header, by which a store is whole."""
        caches.write_whole(self.folder / "header.json", header)

    def put(self) -> None:
        """Put the whole store in its place, unless another process was first."""
        if self.parts.exists():
            shutil.rmtree(self.parts)
        for stray in self.folder.glob(".*"):
            stray.unlink()
        sync(self.folder)
        try:
            self.folder.rename(self.place)
        except OSError:
            if not (self.place / "header.json").exists():
                raise
            self.clear()
        sync(self.place.parent)

    @property
    def _has_shards(self) -> bool:
        return any(self.parts.glob("*.json")) or any(self.parts.glob("*.hashes"))


def _can_lock(folder: Path) -> bool:
    """Return whether a folder knows locks, as `made_by_one` needs them."""
    with tempfile.TemporaryFile(dir=folder) as probe:
        try:
            fcntl.flock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True
