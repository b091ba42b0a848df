"""A checkpoint's parameters on disk, written and read piece by piece.

Orbax saves and restores whole arrays; a model that does not fit in memory has to pass
through it in pieces. So Orbax makes a checkpoint of empty arrays, and their pieces are
written into it by TensorStore, which is what Orbax keeps arrays in.
"""

import collections
import itertools
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from fm_jax import digests
from fm_jax.checkpoints import Checkpoints
from fm_jax.errors import DamagedError, UserError
from fm_jax.hf import leaves

CHUNK_BYTES = 1 << 24  # what is compressed, written and read at once
PART = "params"
CONTEXT = {
    "cache_pool": {"total_bytes_limit": 0},
    # Each thread that copies keeps some of what it freed to itself.
    "data_copy_concurrency": {"limit": 2},
    "file_io_concurrency": {"limit": 2},
}
# bfloat16 as float32 takes half as long at this level as at the usual one, and as much
# room.
CODECS = ["bytes", {"name": "zstd", "configuration": {"level": 1}}]


class Writer:
    """The parameters of one step, float32, written once each; `close` is the last call.

    shapes: of each parameter by its path. lead: how many of its first dims have a piece
    for each index; these pieces can be read again without their neighbours.
    """

    def __init__(
        self,
        path: Path,
        step: int,
        shapes: dict[str, tuple[int, ...]],
        lead: dict[str, int],
    ):
        import tensorstore as ts

        saved = Checkpoints(path, writes=True)
        empty = {name: np.zeros(1, np.float32) for name in shapes}
        saved.save(step, {PART: leaves.tree(empty)}, None)
        saved.close()
        self._path, self._step, self._digests = path, step, _Digests()
        self._folder, self._pending, self._batch = path / str(step), 0, None
        context = ts.Context(CONTEXT)
        self._arrays = {
            name: ts.open(
                _spec(self._folder / PART, name),
                context=context,
                create=True,
                delete_existing=True,
                dtype=ts.float32,
                shape=shape,
                chunk_layout=ts.ChunkLayout(
                    chunk_shape=_chunk(shape, lead[name]), grid_origin=[0] * len(shape)
                ),
                codec=ts.CodecSpec({"driver": "zarr3", "codecs": CODECS}),
            ).result()
            for name, shape in shapes.items()
        }

    def write(self, name: str, index: tuple[int, ...], piece: np.ndarray) -> None:
        """Write the piece at `index` of a parameter, of any dtype and strides."""
        import tensorstore as ts

        array = self._arrays[name]
        chunk = array.chunk_layout.write_chunk.shape[len(index) :]
        for rows in _blocks(piece.shape, chunk):
            block = np.ascontiguousarray(piece[rows], np.float32)
            if self._batch is None:
                self._batch = ts.Transaction()
            array.with_transaction(self._batch)[(*index, *rows)] = block
            self._digests.add(name, tuple(array.shape), index, rows, block)
            self._pending += block.nbytes
            if self._pending >= CHUNK_BYTES:
                self._commit()

    def close(self) -> None:
        """Return when all is on disk, with its digests."""
        self._commit()
        saved = Checkpoints(self._path, writes=True)
        saved.sign(self._step, {f"{PART}/{k}": v for k, v in self._digests.all()})
        saved.close()

    def _commit(self) -> None:
        if self._batch is not None:
            self._batch.commit_async().result()
            self._pending, self._batch = 0, None


class _Digests:
    """The digests of arrays that go by in blocks, each block once."""

    def __init__(self):
        self._sums = collections.Counter()
        self._counts = collections.Counter()

    def add(self, name: str, shape, index, rows, block: np.ndarray) -> None:
        """Count a block of the piece at `index`, whose last dims it has all of."""
        corner = (*index, *(one.start for one in rows))
        first = int(np.ravel_multi_index(corner, shape)) if corner else 0
        found = self._sums[name] + digests.part(np.asarray(block), first)
        self._sums[name] = found % 2**32
        self._counts[name] += block.size

    def all(self):
        """Return the pairs of name and digest."""
        return self._sums.items()

    def whole(self, name: str, shape) -> int | None:
        """Return an array's digest, None while not all of it went by just once."""
        is_whole = self._counts[name] == math.prod(shape)
        return self._sums[name] if is_whole else None


class Reader:
    """A part of one step's arrays, read by pieces.

    An array that was saved in larger chunks, as training saves them, is first copied to
    a file in `beside`: to read a part of a chunk is to read all of it. Raises
    UserError where there is no such part, and DamagedError from the read by which all
    of an array was read once and is not what was saved.
    """

    def __init__(self, path: Path, step: int, part: str, *, beside: Path):
        import tensorstore as ts

        self._folder, self._beside = path / str(step) / part, beside
        self._context = ts.Context(CONTEXT)
        self._open: dict[str, tuple[object, Callable]] = {}
        self._copies: list[Path] = []
        if not self._folder.is_dir():
            raise UserError(f"a run must have a checkpoint; got no {self._folder}.")
        saved = Checkpoints(path)
        known = saved.digests(step)
        saved.close()
        start = f"{part}/"
        self._known = {
            name.removeprefix(start): digest
            for name, digest in known.items()
            if name.startswith(start)
        }
        self._digests = _Digests()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a parameter's shape."""
        return tuple(self._array(name).shape)

    def read(self, name: str, index: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Return the piece at `index` of a parameter, rounded to `dtype`."""
        array, fetch = self._fetch(name, len(index))
        shape = tuple(array.shape)[len(index) :]
        piece = np.empty(shape, dtype)
        for rows in _blocks(shape, _chunk(shape, 0)):
            block = fetch((*index, *rows))
            self._digests.add(name, tuple(array.shape), index, rows, block)
            _put(name, block, piece, rows)
        found = self._digests.whole(name, tuple(array.shape))
        if found is not None and found != self._known.get(name, found):
            raise DamagedError(self._folder.parent, f"{name} is not what was saved")
        return piece

    def close(self) -> None:
        """Take the copies away."""
        self._open.clear()
        for copy in self._copies:
            copy.unlink()
        self._copies.clear()

    def _fetch(self, name: str, lead: int):
        """Return an array and what reads a region of it."""
        if name not in self._open:
            array = self._array(name)
            chunk = array.chunk_layout.read_chunk.shape
            is_small = 4 * math.prod(chunk) <= CHUNK_BYTES
            if is_small and all(size == 1 for size in chunk[:lead]):
                self._open[name] = array, lambda at: array[at].read().result()
            else:
                copy = self._copied(name, array, chunk)
                self._open[name] = array, lambda at: copy[at]
        return self._open[name]

    def _copied(self, name: str, array, chunk: tuple[int, ...]) -> np.ndarray:
        file = self._beside / name.replace("/", ".")
        self._copies.append(file)
        with open(file, "wb") as stream:  # a page that finds no room ends the process
            os.posix_fallocate(stream.fileno(), 0, 4 * math.prod(array.shape))
        copy = np.memmap(file, np.float32, "r+", shape=tuple(array.shape))
        for region in _blocks(array.shape, chunk):
            copy[region] = array[region].read().result()
        return copy

    def _array(self, name: str):
        import tensorstore as ts

        try:
            spec = _spec(self._folder, name)
            return ts.open(spec, context=self._context, read=True).result()
        except ValueError as error:
            raise UserError(
                f"a checkpoint must have the model's parameters; got no {name} in "
                f"{self._folder}."
            ) from error


class Held:
    """Parameters in memory, float32, by path: read as a Reader's are."""

    def __init__(self, leaves: dict[str, np.ndarray]):
        self._leaves = leaves

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a parameter's shape."""
        return self._leaves[name].shape

    def read(self, name: str, index: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Return the piece at `index` of a parameter, rounded to `dtype`."""
        whole = self._leaves[name][index]
        piece = np.empty(whole.shape, dtype)
        for rows in _blocks(piece.shape, _chunk(piece.shape, 0)):
            _put(name, whole[rows], piece, rows)
        return piece

    def close(self) -> None:
        """Let the parameters go."""
        self._leaves = {}


def _put(name: str, block: np.ndarray, piece: np.ndarray, rows: tuple) -> None:
    """Write rows of a piece, rounded. Raises UserError where they do not fit."""
    with np.errstate(over="ignore"):
        piece[rows] = block
    if (np.isinf(piece[rows]) & np.isfinite(block)).any():
        largest = np.abs(block[np.isfinite(block)]).max()
        raise UserError(
            f"{name} must fit {piece.dtype.name}; got values up to "
            f"{largest:g}. Choose another --dtype."
        )


def _spec(folder: Path, name: str) -> dict:
    """Return where Orbax keeps an array: all in one key-value store."""
    base = f"file://{folder.absolute()}/"
    path = name.replace("/", ".") + "/"
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "ocdbt", "base": base, "path": path},
        "store_data_equal_to_fill_value": True,  # Orbax misses what is not stored
    }


def _chunk(shape: tuple[int, ...], lead: int) -> tuple[int, ...]:
    """Return the shape of a chunk: one index of the first dims, then some rows."""
    rows, *rest = shape[lead:] or (1,)
    most = max(1, CHUNK_BYTES // (4 * max(1, math.prod(rest))))
    return (*(1,) * lead, *((min(rows, most), *rest) if shape[lead:] else ()))


def _blocks(
    shape: tuple[int, ...], chunk: tuple[int, ...]
) -> Iterator[tuple[slice, ...]]:
    """Yield the regions of an array that chunks of this shape fill."""
    starts = [range(0, size, step) for size, step in zip(shape, chunk, strict=True)]
    for corner in itertools.product(*starts):
        yield tuple(
            slice(at, min(at + step, size))
            for at, step, size in zip(corner, chunk, shape, strict=True)
        )
