"""The order of data as a function: batch = f(seed, step), whoever asks and whenever."""

import abc
import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from fm_jax.data import windows as windowing
from fm_jax.data.mixtures import Mixture
from fm_jax.data.windows import Batch, Windows

ROUNDS = 6
ORDER_ROWS = 1 << 14  # rows whose windows are found at a time


def permute(index: np.ndarray, size: int, seed: int, epoch) -> np.ndarray:
    """Return where a keyed permutation of range(size) sends `index`.

    epoch: one for all, or one for each index. A Feistel network over the next power of
    four, walked until it lands below `size` (Black & Rogaway, 2002): any index by
    itself, in O(1) memory.
    """
    half = np.uint64(max(1, (max(size - 1, 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    epochs = np.asarray(epoch).astype(np.uint64)
    start = _mix(np.uint64(seed & (2**64 - 1)) ^ _mix(epochs))
    keys = _mix(np.add.outer(np.arange(1, ROUNDS + 1, dtype=np.uint64), start))

    def network(x, keys):
        left, right = x >> half, x & low
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & low)
        return (left << half) | right

    found = network(np.asarray(index).astype(np.uint64), keys)
    outside = np.flatnonzero(found >= np.uint64(size))
    while outside.size:
        x = network(found[outside], keys[:, outside] if epochs.ndim else keys)
        found[outside] = x
        outside = outside[x >= np.uint64(size)]
    return found.astype(np.int64)


def _mix(x):
    """Return the finaliser of splitmix64 (Steele et al., 2014) of x."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


class Batches(Sequence):
    """Batches by number: what `indices` says, of one or of several components.

    `rows` are those of a batch that are read here.
    """

    windows: tuple[Windows, ...]
    rows: np.ndarray

    @abc.abstractmethod
    def indices(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the component (int32) and the window (int64) of `rows` of a batch."""

    def __getitem__(self, number: int) -> Batch:
        if not 0 <= number < len(self):
            raise IndexError(number)
        return self.read(number, number + 1)[0]

    def read(self, first: int, last: int) -> list[Batch]:
        """Return batches `first` to `last`, where small together faster than alone.

        Where there are several components, `components` [B] says which a row is of.
        """
        found = [self.indices(number) for number in range(first, last)]
        components, chosen = map(np.concatenate, zip(*found, strict=True))
        if len(self.windows) == 1:
            batch = self.windows[0].rows(chosen)
        else:
            arrays = windowing.empty_arrays(len(chosen), self.windows[0].length)
            batch = windowing.as_batch(arrays) | {"components": components}
            for component in np.unique(components).tolist():
                here = components == component
                part = self.windows[component].rows(chosen[here])
                for name, array in part.items():
                    if name not in batch:  # what examples have beside text
                        batch[name] = np.zeros(
                            (len(chosen), *array.shape[1:]), array.dtype
                        )
                    batch[name][here] = array
        size = len(self.rows)
        parts = [slice(k * size, (k + 1) * size) for k in range(last - first)]
        return [{name: x[part] for name, x in batch.items()} for part in parts]


@dataclasses.dataclass(frozen=True, eq=False)
class TrainBatches(Batches):
    """Batch `step` is rows step*B to (step+1)*B of the endless shuffled examples.

    `mixture` says which component a row is of and its number in that; each epoch of a
    component is a fresh permutation of all its windows. `rows` are those of a batch
    that are read here; the batch does not depend on who reads which.
    """

    windows: tuple[Windows, ...]
    mixture: Mixture
    batch_size: int
    seed: int
    num_steps: int
    rows: np.ndarray
    _kept: dict = dataclasses.field(default_factory=dict, init=False, repr=False)

    def __len__(self) -> int:
        return self.num_steps

    def indices(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the component (int32) and the window (int64) of `rows` of a step.

        They are found for many steps at a time, and kept.
        """
        number = max(1, ORDER_ROWS // max(1, len(self.rows)))
        block, place = divmod(step, number)
        # Set whole, and beside that of the block before: so threads may share them.
        found = self._kept.get(block % 2)
        if found is None or found[0] != block:
            last = min((block + 1) * number, self.num_steps)
            steps = np.arange(block * number, last)
            rows = steps[:, None] * self.batch_size + self.rows
            found = self._kept[block % 2] = block, *self._order(rows)
        return found[1][place], found[2][place]

    def _order(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the component and the window of rows of the endless examples."""
        components, numbers = self.mixture.components(rows)
        chosen = np.empty(rows.shape, np.int64)
        for component in np.unique(components).tolist():
            here = components == component
            size, seed = len(self.windows[component]), seed_of(self.seed, component)
            epochs, places = np.divmod(numbers[here], size)
            # Most often there is one, which takes less time when it is said once.
            epochs = epochs[0] if np.all(epochs == epochs[0]) else epochs
            chosen[here] = permute(places, size, seed, epochs)
        for kept in (components, chosen):
            kept.setflags(write=False)
        return components, chosen


def seed_of(seed: int, component: int) -> int:
    """Return the seed of a component's order; the first has that of the run."""
    if component == 0:
        return seed
    with np.errstate(over="ignore"):
        mixed = _mix(np.uint64(seed & (2**64 - 1))) + np.uint64(component)
    return int(_mix(mixed))


@dataclasses.dataclass(frozen=True, eq=False)
class EvalBatches(Batches):
    """Windows in order, one component after the other, each window once.

    The last batch is filled up with padding rows. `rows` are those of a batch that are
    read here; `max_batches` > 0 takes that many, evenly spread over the windows.
    """

    windows: tuple[Windows, ...]
    batch_size: int
    rows: np.ndarray
    max_batches: int = 0

    def __len__(self) -> int:
        whole = -(-self._num_windows // self.batch_size)
        return min(whole, self.max_batches) if self.max_batches else whole

    def indices(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the component (int32) and the window (int64) of `rows` of a batch.

        Padding is window -1 of component 0.
        """
        num_rows, num_windows = len(self) * self.batch_size, self._num_windows
        rows = number * self.batch_size + self.rows
        rows = rows * max(num_rows, num_windows) // num_rows
        rows = np.where(rows < num_windows, rows, -1)
        components = np.maximum(self._firsts.searchsorted(rows, side="right") - 1, 0)
        return components.astype(np.int32), rows - self._firsts[components]

    @functools.cached_property
    def _firsts(self) -> np.ndarray:
        """How many windows stand before those of each component."""
        return np.cumsum([0, *(len(windows) for windows in self.windows[:-1])])

    @functools.cached_property
    def _num_windows(self) -> int:
        return sum(len(windows) for windows in self.windows)
