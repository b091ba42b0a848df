"""Rows to fine-tune on: whole examples, each in segments of its own."""

import dataclasses
import functools

import numpy as np

from fm_jax.data import packing as packings
from fm_jax.data import windows
from fm_jax.data.example_store import ExampleStore
from fm_jax.data.windows import Batch
from fm_jax.errors import UserError
from fm_jax.tokenizers.protocol import Tokenizer

PACKINGS = ("best_fit", "single")


@dataclasses.dataclass(frozen=True, eq=False)
class ExampleRows:
    """Examples as rows of at most `length` places; has the interface of `Windows`.

    Each example is whole, in one row: "best_fit" packs several, "single" gives each a
    row. A segment is numbered from 1 within its row and its positions count from 0, so
    none sees another; the two of a preference are neighbours, 2j + 1 the chosen. Rows
    stand in the order of their first examples, examples in a row in that order too.
    `reference` [examples, 2]: nats of a reference, see `with_reference`.
    """

    store: ExampleStore
    tokenizer: Tokenizer
    length: int
    packing: str = "best_fit"
    reference: np.ndarray | None = None

    def __post_init__(self):
        if self.packing not in PACKINGS:
            raise UserError(
                "data.packing of examples must be best_fit or single, which keep them "
                f"whole; got {self.packing}. Set --config.data.packing=best_fit."
            )
        longest = int(self._sizes.max())
        if longest > self.length:
            raise UserError(
                f"data.max_length must hold every example; got {self.length}, and "
                f"{self.where(int(self._sizes.argmax()))} takes {longest}."
            )

    def __len__(self) -> int:
        return len(self._rows) - 1

    @property
    def num_targets(self) -> int:
        """Tokens of all rows together, those without weight too."""
        return self.store.header["num_tokens"]

    @property
    def mean_targets(self) -> float:
        """Tokens of a row, on average; the rest of its `length` places is padding."""
        return self.num_targets / len(self)

    @property
    def num_examples(self) -> int:
        """How many examples there are."""
        return len(self.store)

    @functools.cached_property
    def num_segments(self) -> int:
        """The most segments of any row."""
        return int(np.diff(self._rows).max()) * self.store.num_segments

    def examples_of(self, row: int) -> np.ndarray:
        """Return the numbers of a row's examples in the order of their places, int64.

        A row of padding, -1, has none.
        """
        if row < 0:
            return self._order[:0]
        return self._order[self._rows[row] : self._rows[row + 1]]

    def where(self, example: int) -> str:
        """Return where an example stood: "chats.jsonl line 7"."""
        return self.store.where(example)

    def with_reference(self, logps: np.ndarray) -> "ExampleRows":
        """Return rows whose batches have `reference` too, float32 `[B, T]`.

        logps [examples, 2]: the summed log-probability of each segment's targets under
        a reference, in nats. It stands at the last weighted place of its segment.
        """
        shape = (self.num_examples, self.store.num_segments)
        assert logps.shape == shape, f"{logps.shape} for {shape}"
        return dataclasses.replace(self, reference=np.asarray(logps, np.float32))

    def rows(self, indices: np.ndarray) -> Batch:
        """Return rows `indices` as a batch of [B, T] arrays.

        An index of -1 gives a row of padding. `target_bytes` are the bytes of text that
        each target stands for, none where it is a label.
        """
        indices = np.asarray(indices, np.int64)
        segments_S, row_S = self._segments(indices)
        starts_S = self.store.offsets[segments_S]
        counts_S = self.store.offsets[segments_S + 1] - starts_S
        inside_P = packings.within(counts_S)
        from_P = np.repeat(starts_S, counts_S) + inside_P
        # Where in the batch each segment begins: after those before it in its row.
        before_S = np.cumsum(counts_S) - counts_S
        first_S = np.searchsorted(row_S, row_S)  # of the row's segments
        into_S = row_S * self.length + before_S - before_S[first_S]
        into_P = np.repeat(into_S, counts_S) + inside_P
        arrays = windows.empty_arrays(len(indices), self.length)
        arrays.fill(0)
        batch = windows.as_batch(arrays)
        tokens_P, targets_P = self.store.tokens[from_P], self.store.targets[from_P]
        self._require_known(tokens_P, targets_P)
        filled = {
            "tokens": tokens_P,
            "targets": targets_P,
            "loss_weights": self.store.weights[from_P],
            "positions": inside_P,
            "segment_ids": np.repeat(np.arange(len(row_S)) - first_S + 1, counts_S),
        }
        if self.store.header["kind"] != "classify":
            filled["target_bytes"] = self._bytes_V[targets_P]
        for name, array in filled.items():
            batch[name].reshape(-1)[into_P] = array
        if self.reference is not None:
            batch["reference"] = np.zeros((len(indices), self.length), np.float32)
            # Examples end with their last target that has weight.
            batch["reference"].reshape(-1)[into_S + counts_S - 1] = (
                self.reference.reshape(-1)[segments_S]
            )
        return batch

    def _require_known(self, tokens_P: np.ndarray, targets_P: np.ndarray) -> None:
        """Raise UserError on an id that there is not: a file of the store is broken.

        A model would take another in its place, or none, and say nothing.
        """
        sizes = {"tokens": self._bytes_V.size, "targets": self._bytes_V.size}
        if self.store.header["kind"] == "classify":
            sizes["targets"] = len(self.store.labels)
        for (name, size), ids_P in zip(
            sizes.items(), (tokens_P, targets_P), strict=True
        ):
            most = int(ids_P.view(np.uint32).max(initial=0))
            if most >= size:
                raise UserError(
                    f"ids of stored examples must be below {size:,}; got {most:,} in "
                    f"{self.store.path / name}.npy. Delete {self.store.path} and start "
                    "again: they will be made again."
                )

    def _segments(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the segments of rows in order, and the place in the batch of each."""
        first_B = self._rows[indices]
        number_B = np.where(indices < 0, 0, self._rows[indices + 1] - first_B)
        places = np.repeat(first_B, number_B) + packings.within(number_B)
        each = self.store.num_segments
        segments = self._order[places][:, None] * each + np.arange(each)
        return segments.reshape(-1), np.arange(len(indices)).repeat(number_B * each)

    @functools.cached_property
    def _sizes(self) -> np.ndarray:
        """Places that each example takes, int64."""
        return np.diff(self.store.offsets[:: self.store.num_segments])

    @functools.cached_property
    def _plan(self) -> tuple[np.ndarray, np.ndarray]:
        """Return examples in the order of rows, and where each row begins in that."""
        numbers = np.arange(self.num_examples)
        if self.packing == "single":
            return numbers, np.arange(self.num_examples + 1)
        bins = packings.best_fit(self._sizes, self.length)
        leaders = np.empty(self.num_examples, np.int64)
        leaders[bins[::-1]] = numbers[::-1]  # the last written is a bin's first example
        leaders = leaders[bins]
        sizes = np.bincount(leaders)
        order = np.argsort(leaders, kind="stable")
        return order, np.concatenate(([0], np.cumsum(sizes[sizes > 0])))

    @property
    def _order(self) -> np.ndarray:
        return self._plan[0]

    @property
    def _rows(self) -> np.ndarray:
        return self._plan[1]

    @functools.cached_property
    def _bytes_V(self) -> np.ndarray:
        return np.ascontiguousarray(self.tokenizer.byte_lengths, np.int32)
