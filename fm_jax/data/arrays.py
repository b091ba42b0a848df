"""An .npy written from its start to its end, and on the disk when it is closed."""

import contextlib
import hashlib
import io
import os
from pathlib import Path

import numpy as np

from fm_jax.errors import reason

DIGEST_BYTES = 16


class Array:
    """Takes rows until it is closed. OSError comes out, of a full disk among others.

    np.save goes by C's buffers and misses a disk that is full.
    """

    def __init__(self, file: Path, dtype: str, shape: tuple[int, ...]):
        self._stream, self._hash = open(file, "wb"), digest(b"")  # noqa: SIM115
        self._dtype = np.dtype(dtype)
        told = {"descr": self._dtype.str, "fortran_order": False, "shape": shape}
        head = io.BytesIO()
        np.lib.format.write_array_header_1_0(head, told)
        self._write(head.getvalue())

    def __enter__(self) -> "Array":
        return self

    def __exit__(self, kind, *_) -> None:
        # A full disk fails again, on what is still to be written.
        with contextlib.suppress(*[OSError] if kind else []):
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()

    def write(self, rows: np.ndarray) -> None:
        """Append rows."""
        self._write(np.ascontiguousarray(rows, self._dtype))

    @property
    def digest(self) -> str:
        """The digest of all that was written."""
        return self._hash.hexdigest()

    def _write(self, raw) -> None:
        self._stream.write(raw)
        self._hash.update(raw)


class Growing:
    """An .npy of one dimension that is written part by part."""

    def __init__(self, file: Path, dtype: str):
        self.stream = open(file, "wb")  # noqa: SIM115
        self.dtype, self.count, self._hash = np.dtype(dtype), 0, digest(b"")
        self._begin()

    def append(self, array: np.ndarray) -> None:
        raw = array.astype(self.dtype).data
        self.stream.write(raw)
        self._hash.update(raw)
        self.count += len(array)

    @property
    def digest(self) -> str:
        """The digest of all elements; the file's beginning is not among them."""
        return self._hash.hexdigest()

    def finish(self) -> None:
        start = self.start
        self.stream.seek(0)
        self._begin()
        assert self.start == start  # the format leaves room for a count that grows
        self.stream.flush()
        os.fsync(self.stream.fileno())

    def _begin(self) -> None:
        header = {"descr": self.dtype.str, "fortran_order": False}
        header["shape"] = (self.count,)
        np.lib.format.write_array_header_1_0(self.stream, header)
        self.start = self.stream.tell()


def mapped(file: Path) -> np.ndarray:
    """Return the array of an .npy, mapped into memory.

    Raises ValueError on what is none, and OSError. Objects, which are pickles, are
    refused by NumPy.
    """
    try:
        return np.lib.format.open_memmap(file, mode="r")
    except OSError:
        raise
    except Exception as error:  # a damaged one ends NumPy's parser in many ways
        raise ValueError(f"no array of NumPy: {reason(error)}") from error


def digest(raw: bytes):
    """Return the digest of a store's file that begins with these bytes."""
    return hashlib.blake2b(raw, digest_size=DIGEST_BYTES)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
