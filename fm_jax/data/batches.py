"""The order of data as a function: batch = f(seed, step), whoever asks and whenever."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from fm_jax.data.examples import Batch, Windows

ROUNDS = 6


def permute(index: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """Return where a keyed permutation of range(size) sends `index`.

    A Feistel network over the next power of four, walked until it lands below `size`
    (Black & Rogaway, 2002): any index by itself, in O(1) memory.
    """
    half = np.uint64(max(1, (max(size - 1, 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    start = _mix(np.uint64(seed & (2**64 - 1)) ^ _mix(np.uint64(epoch)))
    keys = _mix(start + np.arange(1, ROUNDS + 1, dtype=np.uint64))

    def network(x):
        left, right = x >> half, x & low
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & low)
        return (left << half) | right

    x = network(np.asarray(index).astype(np.uint64))
    while np.any(outside := x >= np.uint64(size)):
        x[outside] = network(x[outside])
    return x.astype(np.int64)


def _mix(x):
    """Return the finaliser of splitmix64 (Steele et al., 2014) of x."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


@dataclasses.dataclass(frozen=True)
class TrainBatches(Sequence):
    """Batch `step` is rows step*B to (step+1)*B of the endless shuffled examples.

    Each epoch is a fresh permutation of all windows. `rows` are those of a batch that
    are read here; the batch does not depend on who reads which.
    """

    windows: Windows
    batch_size: int
    seed: int
    num_steps: int
    rows: np.ndarray

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, step: int) -> Batch:
        if not 0 <= step < len(self):
            raise IndexError(step)
        return self.windows.rows(self.indices(step))

    def indices(self, step: int) -> np.ndarray:
        """Return the window indices of `rows` of batch `step`."""
        epochs, places = np.divmod(
            step * self.batch_size + self.rows, len(self.windows)
        )
        chosen = np.empty(len(self.rows), np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            chosen[here] = permute(
                places[here], len(self.windows), self.seed, int(epoch)
            )
        return chosen


@dataclasses.dataclass(frozen=True)
class EvalBatches(Sequence):
    """Windows in order, each once; the last batch is filled up with padding rows.

    `rows` are those of a batch that are read here; `max_batches` > 0 takes that many
    batches, evenly spread over the windows.
    """

    windows: Windows
    batch_size: int
    rows: np.ndarray
    max_batches: int = 0

    def __len__(self) -> int:
        whole = -(-len(self.windows) // self.batch_size)
        return min(whole, self.max_batches) if self.max_batches else whole

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.windows.rows(self.indices(index))

    def indices(self, index: int) -> np.ndarray:
        """Return the window indices of `rows` of batch `index`; -1 is padding."""
        num_rows, num_windows = len(self) * self.batch_size, len(self.windows)
        rows = index * self.batch_size + self.rows
        rows = rows * max(num_rows, num_windows) // num_rows
        return np.where(rows < num_windows, rows, -1)


def prefetch(batches: Sequence, start: int = 0) -> Iterator[Batch]:
    """Yield batches from `start` on, read ahead by grain on threads of its own."""
    import grain

    if start >= len(batches):
        return iter(())  # grain would look for the first element of nothing for ever
    source = grain.MapDataset.source(batches).slice(slice(start, len(batches)))
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
    return iter(source.to_iter_dataset(options))
