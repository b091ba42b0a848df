"""Which documents share a row: plans over a token store that cut none without need."""

import bisect
import dataclasses
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fm_jax import caches
from fm_jax.data.arrays import Growing, mapped
from fm_jax.data.store import TokenStore
from fm_jax.errors import UserError

ARRAYS = {"starts": "<i8", "counts": "<i4", "rows": "<i8"}


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """Rows made of pieces of documents; row r has pieces rows[r] to rows[r + 1].

    Piece p has ids starts[p] to starts[p] + counts[p] of the stream as inputs, so its
    targets lie one further: a document's leading end id is its first input and the end
    id after it its last target. A piece has as many targets as a row is long or ends
    its document. Rows stand in the order of their first pieces in the stream, pieces
    of a row in that order too, and all inputs of a row are of one shard.
    """

    starts: np.ndarray
    counts: np.ndarray
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows) - 1


def plan(
    store: TokenStore, packing: str, length: int, *, folder: Path | None = None
) -> Plan:
    """Return the plan of rows of at most `length` targets, each target in one row.

    packing: "best_fit" packs pieces of documents, shard by shard, so memory is bounded
    by a shard; "single" gives each piece a row. folder: where the plan is kept and
    mapped from, written the first time. Raises UserError when that cannot be written,
    or what is there is not a plan of this store.
    """
    parts = _parts(store, packing, length)
    if folder is None:
        starts, counts, sizes = zip(*parts, strict=True)
        rows = np.append(0, np.cumsum(np.concatenate(sizes)))
        return Plan(np.concatenate(starts), np.concatenate(counts), rows)
    path = folder / _name(store, packing, length)
    if not path.exists():
        try:
            with caches.made_by_one(path):
                if not path.exists():
                    _write(path, parts)
        except OSError as error:
            raise UserError(
                f"data.cache_dir must be writable and have room; got {path} "
                f"({error.strerror or error}). Free space or set "
                "--config.data.cache_dir."
            ) from error
    return _open(path, num_targets=len(store) - 1)


def best_fit(sizes: np.ndarray, length: int) -> np.ndarray:
    """Return which bin of `length` each size goes to by best-fit-decreasing, int64.

    sizes: integers from 1 to `length`. From the largest to the smallest, each goes to
    the fullest bin that has room for it, else to a new one (Ding et al., 2024, arXiv
    2404.10830). Sizes that are equal are placed together: a bin that takes one is then
    the fullest with room, so it takes as many as go in, and all bins with the same
    space are treated alike. So the time is that of the lengths that differ.
    """
    numbers = np.bincount(sizes, minlength=length + 1)
    bins = _Bins(length)
    placed: list[tuple[int, int, int]] = []  # first bin, number of bins, sizes in each
    for size in np.flatnonzero(numbers)[::-1].tolist():
        left = int(numbers[size])
        while left:
            space, first, stop = bins.take(size, at_most=left)
            each = space // size
            full, rest = divmod(left, each)
            if full:
                stop, kept = min(stop, first + full), stop
                placed.append((first, stop - first, each))
                bins.put(space - each * size, first, stop)
                left -= each * (stop - first)
                first, stop = stop, kept
            if first < stop and left:  # fewer than one bin takes
                placed.append((first, 1, rest))
                bins.put(space - rest * size, first, first + 1)
                first, left = first + 1, 0
            bins.put(space, first, stop)
    first_E, number_E, each_E = np.array(placed, np.int64).reshape(-1, 3).T
    sizes_E = number_E * each_E
    bins_E = within(sizes_E) // np.repeat(each_E, sizes_E)
    found = np.empty(len(sizes), np.int64)
    keys = (length - sizes).astype(np.min_scalar_type(length))  # short ones sort fast
    found[np.argsort(keys, kind="stable")] = np.repeat(first_E, sizes_E) + bins_E
    return found


def within(numbers: np.ndarray) -> np.ndarray:
    """Return 0 .. n - 1 for each n of `numbers`, one after the other."""
    stops = np.cumsum(numbers)
    return np.arange(numbers.sum()) - np.repeat(stops - numbers, numbers)


class _Bins:
    """Numbers of bins by the space left in them, as ranges."""

    def __init__(self, length: int):
        self.length, self.number = length, 0
        self._spaces: list[int] = []  # those that some bin has, growing
        self._ranges: dict[int, list[tuple[int, int]]] = {}

    def take(self, size: int, *, at_most: int) -> tuple[int, int, int]:
        """Return the least space that `size` goes into and a range of bins with it."""
        place = bisect.bisect_left(self._spaces, size)
        if place == len(self._spaces):
            first = self.number
            self.number += -(-at_most // (self.length // size))
            return self.length, first, self.number
        space = self._spaces[place]
        ranges = self._ranges[space]
        first, stop = ranges.pop()
        if not ranges:
            del self._ranges[space], self._spaces[place]
        return space, first, stop

    def put(self, space: int, first: int, stop: int) -> None:
        """Take in bins `first` to `stop`, with `space` left in each."""
        if not space or first == stop:
            return
        if space not in self._ranges:
            self._ranges[space] = []
            bisect.insort(self._spaces, space)
        self._ranges[space].append((first, stop))


def _name(store: TokenStore, packing: str, length: int) -> str:
    """Return a plan's name: what it follows from, where shards begin included."""
    cuts = np.append(store.starts, len(store)).astype("<i8").tobytes()
    digest = hashlib.blake2b(cuts, digest_size=4).hexdigest()
    name = store.header["name"].replace(os.sep, "_")
    return f"{name}-{packing}-{length}-{digest}"


def _parts(store: TokenStore, packing: str, length: int) -> Iterator[tuple]:
    """Yield starts and counts of pieces, and the pieces of each row, by shard."""
    first = 0
    for stop in [*store.starts[1:].tolist(), len(store) - 1]:
        last = int(np.searchsorted(store.offsets, stop))
        if first < last:
            opens = np.asarray(store.offsets[first:last])
            starts, counts = _pieces(opens, np.append(opens[1:], stop), length)
            if packing == "best_fit":
                yield _packed(starts, counts, length)
            else:
                yield starts, counts, np.ones(len(starts), np.int64)
        first = last


def _pieces(opens: np.ndarray, closes: np.ndarray, length: int) -> tuple:
    """Return starts and counts of pieces of documents, in the order of the stream."""
    number = -(-(closes - opens) // length)
    starts = np.repeat(opens, number) + length * within(number)
    counts = np.minimum(np.repeat(closes, number) - starts, length)
    return starts, counts.astype(np.int32)


def _packed(starts: np.ndarray, counts: np.ndarray, length: int) -> tuple:
    """Return pieces sorted into rows, and how many each row has."""
    bins = best_fit(counts, length)
    places = np.arange(len(bins))
    leaders = np.empty(len(bins), np.int64)
    leaders[bins[::-1]] = places[::-1]  # the last to be written is a bin's first piece
    leaders = leaders[bins]
    order = np.argsort(leaders, kind="stable")
    sizes = np.bincount(leaders)
    return starts[order], counts[order], sizes[sizes > 0]


def _write(path: Path, parts: Iterator[tuple]) -> None:
    """Write a plan that is never seen half-written, with memory for one shard."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as made:
        building = Path(made) / "plan"
        building.mkdir()
        files = {name: Growing(building / f"{name}.npy", ARRAYS[name])
                 for name in ARRAYS}  # fmt: skip
        try:
            total = 0
            files["rows"].append(np.zeros(1))
            for starts, counts, sizes in parts:
                files["starts"].append(starts)
                files["counts"].append(counts)
                files["rows"].append(total + np.cumsum(sizes))
                total += len(starts)
            for file in files.values():
                file.finish()
        finally:
            for file in files.values():
                file.stream.close()
        try:
            building.rename(path)
        except OSError:
            if not path.exists():  # else another process was first
                raise


def _open(path: Path, *, num_targets: int) -> Plan:
    try:
        arrays = {name: mapped(path / f"{name}.npy") for name in ARRAYS}
    except (OSError, ValueError) as error:
        raise _not_whole(path, str(error)) from error
    # Slices of np.memmap itself take thrice the time of an array's over the map.
    found = Plan(**{name: np.asarray(array) for name, array in arrays.items()})
    num_pieces = int(found.rows[-1]) if found.rows.size else 0
    total = int(found.counts.sum(dtype=np.int64))
    if not num_pieces == found.starts.size == found.counts.size:
        raise _not_whole(path, f"{num_pieces} pieces of {found.starts.size}")
    if total != num_targets:
        raise _not_whole(path, f"{total} targets for a store of {num_targets}")
    return found


def _not_whole(path: Path, got: str) -> UserError:
    return UserError(
        f"plan of rows must be whole; got {path} ({got}). Delete it and start again: "
        "it will be made again."
    )
