"""Rows to train on: cut from the token stream, shifted once, documents kept apart."""

import dataclasses
import functools
from pathlib import Path

import numpy as np

from fm_jax.data import packing as packings
from fm_jax.data.packing import Plan
from fm_jax.data.store import TokenStore
from fm_jax.errors import UserError, unknown
from fm_jax.tokenizers.protocol import Tokenizer

PACKINGS = ("split", "best_fit", "single")
AT_ONCE = 1 << 16  # tokens whose intermediate arrays stay in a processor's caches
# Of a batch: what tokens have, then what targets have.
OF_TOKENS = ("tokens", "positions", "segment_ids")
NAMES = (*OF_TOKENS, "targets", "loss_weights", "target_bytes")

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
    """A token store as rows of at most `length` targets.

    Every id of the stream but the first is the target of just one row, whatever the
    packing: "split" cuts the stream of all documents, "best_fit" packs documents that
    are cut only where they are longer than a row, "single" gives each such piece a row
    (see packing; `plans` is the folder where these two are kept, None: in memory). The
    end id before a document opens its segment, so a document's first token is predicted
    from the end id and sees nothing of the document before.
    """

    store: TokenStore
    tokenizer: Tokenizer
    length: int
    mask_documents: bool
    packing: str = "split"
    plans: Path | None = None

    def __post_init__(self):
        if self.packing not in PACKINGS:
            raise unknown("data.packing", self.packing, PACKINGS)
        if self.packing != "split" and not self.mask_documents:
            raise UserError(
                "data.mask_documents must be True when data.packing is "
                f"{self.packing}; got False. Train across documents with split."
            )
        if self.packing == "split" and len(self.store) <= self.length:
            raise UserError(
                f"the corpus must be longer than one window of data.max_length="
                f"{self.length} tokens; got {len(self.store)} tokens in "
                f"{self.store.path}. Add text or lower data.max_length."
            )

    def __len__(self) -> int:
        if self.packing == "split":
            return (self.num_targets + self.length - 1) // self.length
        return len(self.plan)

    @property
    def num_targets(self) -> int:
        """Targets of all rows together."""
        return len(self.store) - 1

    @property
    def mean_targets(self) -> float:
        """Targets of a row, on average; the rest of its `length` places is padding."""
        return self.num_targets / len(self)

    @functools.cached_property
    def plan(self) -> Plan:
        """The pieces of documents in each row, where the stream is not cut."""
        return packings.plan(self.store, self.packing, self.length, folder=self.plans)

    def spans(self, index: int) -> list[tuple[int, int]]:
        """Return the (start, count) of a row's inputs in the stream.

        Its targets are the ids one further. A row of padding, -1, has none.
        """
        if index < 0:
            return []
        if self.packing == "split":
            start = index * self.length
            return [(start, min(self.length, self.num_targets - start))]
        first, last = self.plan.rows[index : index + 2].tolist()
        starts, counts = self.plan.starts[first:last], self.plan.counts[first:last]
        return list(zip(starts.tolist(), counts.tolist(), strict=True))

    def rows(self, indices: np.ndarray) -> Batch:
        """Return rows `indices` as a batch of [B, T] arrays.

        An index of -1 gives a row of padding. `target_bytes` are the bytes of text that
        each target stands for.
        """
        indices = np.asarray(indices, np.int64)
        arrays = empty_arrays(len(indices), self.length)
        number = max(1, AT_ONCE // self.length)
        for first in range(0, len(indices), number):
            part = slice(first, first + number)
            self._read(indices[part], arrays[:, part])
        return as_batch(arrays)

    def _read(self, indices: np.ndarray, arrays: np.ndarray) -> None:
        """Fill the arrays of a batch with rows."""
        batch = as_batch(arrays)
        read = self._cut if self.packing == "split" else self._pack
        num_tokens_B, num_targets_B, places = read(indices, batch)
        self._require_known(batch, places)
        batch["loss_weights"].fill(1)
        batch["target_bytes"][...] = self._bytes_V.take(batch["targets"])
        if self.store.header["has_leftover"]:
            # The end id after a document carries what its ids do not stand for.
            ends = np.nonzero(batch["targets"] == self.tokenizer.end_id)
            closed = self.store.documents_of(places(*ends))
            batch["target_bytes"][ends] += self.store.leftover[closed]
        for row in np.flatnonzero(num_targets_B < self.length).tolist():
            arrays[: len(OF_TOKENS), row, num_tokens_B[row] :] = 0
            arrays[len(OF_TOKENS) :, row, num_targets_B[row] :] = 0

    def _require_known(self, batch: Batch, places) -> None:
        """Raise UserError on an id that the tokenizer does not have: a shard is broken.

        A model would take another in its place, or none, and say nothing.
        """
        size = self._bytes_V.size
        for name, ahead in (("tokens", 0), ("targets", 1)):
            ids_BT = batch[name].view(np.uint32)
            if ids_BT.size and ids_BT.max() >= size:
                rows, columns = (some[:1] for some in np.nonzero(ids_BT >= size))
                place = int(places(rows, columns)[0]) + ahead
                raise UserError(
                    f"ids of a token store must be below its tokenizer's {size:,}; got "
                    f"{int(ids_BT[rows, columns][0]):,} in {self.store.place(place)}. "
                    f"Delete {self.store.path} and build it again."
                )

    @functools.cached_property
    def _bytes_V(self) -> np.ndarray:
        return np.ascontiguousarray(self.tokenizer.byte_lengths, np.int32)

    def _cut(self, indices: np.ndarray, batch: Batch) -> tuple:
        """Fill tokens, targets, positions and segments with rows cut from the stream.

        Padding is filled with anything. Returns the numbers of tokens and of targets of
        each row, and a function from rows and columns to places in the stream.
        """
        tokens_BT, segments_BT = batch["tokens"], batch["segment_ids"]
        starts_B = indices * self.length
        num_targets_B = np.minimum(self.num_targets - starts_B, self.length)
        num_targets_B[indices < 0] = 0
        # The last id of the stream is there as a token too, without a target.
        num_ids_B = num_targets_B + (num_targets_B > 0)
        ids_BT1 = np.zeros((len(indices), self.length + 1), self.store.header["dtype"])
        _read_spans(ids_BT1, self.store, starts_B, num_ids_B)
        tokens_BT[...] = ids_BT1[:, :-1]
        batch["targets"][...] = ids_BT1[:, 1:]
        begins_R = np.arange(0, tokens_BT.size, self.length)
        if self.mask_documents:
            opens_BT = tokens_BT == self.tokenizer.end_id
            opens_BT.cumsum(axis=1, dtype=np.int32, out=segments_BT)
            segments_BT += 1
            opens_BT[:, 0] = True
            begins_R = np.flatnonzero(opens_BT)
        else:
            segments_BT.fill(1)
        _count_from(begins_R, batch["positions"])
        return num_ids_B, num_targets_B, lambda rows, columns: starts_B[rows] + columns

    def _pack(self, indices: np.ndarray, batch: Batch) -> tuple:
        """Fill what `_cut` fills, and return the like, with pieces of documents."""
        store, plan, length = self.store, self.plan, self.length
        shape_BT1 = (len(indices), length + 1)
        first_B = plan.rows[indices]
        number_B = np.where(indices < 0, 0, plan.rows[indices + 1] - first_B)
        stop_B = number_B.cumsum()
        row_P = np.arange(len(indices)).repeat(number_B)
        piece_P = np.arange(row_P.size) + (first_B - stop_B + number_B)[row_P]
        starts_P, counts_P = plan.starts[piece_P], plan.counts[piece_P]
        shard_B = np.zeros(len(indices), np.int64)
        shard_B[row_P] = store.starts.searchsorted(starts_P, side="right") - 1
        # Where in the batch each piece goes: after those before it in its row.
        sum_P1 = np.concatenate(([0], counts_P.cumsum(dtype=np.int64)))
        before_B = sum_P1[stop_B - number_B]
        num_targets_B = sum_P1[stop_B] - before_B
        into_P = sum_P1[:-1] + (length * np.arange(len(indices)) - before_B)[row_P]
        # A run of no piece stands before the first, which need not be in the first row.
        row_R, into_R = np.concatenate(([0], row_P)), np.concatenate(([0], into_P))
        segments_R = np.concatenate(([0], piece_P - first_B[row_P] + 1))
        shifts_P = starts_P - store.starts[shard_B][row_P] - into_P - row_P
        shifts_R = np.concatenate(([0], shifts_P))
        # Places in its shard of a row's inputs, and of what follows the last of them.
        places_BT1 = np.arange(shape_BT1[0] * shape_BT1[1])
        places_BT1 += shifts_R.repeat(_lengths(into_R + row_R, places_BT1.size))
        places_BT1 = places_BT1.reshape(shape_BT1)
        ids_BT1 = _read_places(store, shard_B, places_BT1, self.tokenizer.end_id)
        batch["tokens"][...] = ids_BT1[:, :-1]
        batch["targets"][...] = ids_BT1[:, 1:]
        closes_P = (into_P + counts_P - 1)[counts_P < length]
        batch["targets"].reshape(-1)[closes_P] = self.tokenizer.end_id
        numbers_R = _lengths(into_R, batch["tokens"].size)
        batch["segment_ids"].reshape(-1)[...] = segments_R.repeat(numbers_R)
        _count_from(into_R, batch["positions"])
        first_places_B = store.starts[shard_B]
        return (
            num_targets_B,
            num_targets_B,
            lambda rows, columns: places_BT1[rows, columns] + first_places_B[rows],
        )


def empty_arrays(num_rows: int, length: int) -> np.ndarray:
    """Return the arrays of a batch as one, [arrays, B, T], not filled in.

    Memory of that size comes back from one batch to another, where arrays by themselves
    are returned to the system and taken anew, page by page.
    """
    return np.empty((len(NAMES), num_rows, length), np.int32)


def as_batch(arrays: np.ndarray) -> Batch:
    """Return the arrays of a batch by their names."""
    batch = dict(zip(NAMES, arrays, strict=True))
    batch["loss_weights"] = batch["loss_weights"].view(np.float32)
    return batch


def _read_spans(ids_BT1, store: TokenStore, starts_B, numbers_B) -> None:
    """Read `numbers_B` ids of the stream from `starts_B` on, each into a row."""
    shard_B = store.starts.searchsorted(starts_B, side="right") - 1
    offset_B = starts_B - store.starts[shard_B]
    spans = zip(shard_B.tolist(), offset_B.tolist(), numbers_B.tolist(), strict=True)
    for row, (shard, offset, number) in enumerate(spans):
        ids = store.shards[shard][offset : offset + number]
        if len(ids) < number:  # the row goes on in another shard
            start = int(starts_B[row])
            ids = store.read(start, start + number)
        ids_BT1[row, :number] = ids


def _read_places(
    store: TokenStore, shard_B: np.ndarray, places_BT1: np.ndarray, end_id: int
) -> np.ndarray:
    """Return the ids at places of each row's shard; one just after it is an end id."""
    shards = [store.shards[shard] for shard in shard_B.tolist()]
    if np.all(shard_B == shard_B[0]):
        ids_BT1 = shards[0].take(places_BT1, mode="clip")
    else:
        ids_BT1 = np.empty(places_BT1.shape, store.header["dtype"])
        for row, shard in enumerate(shards):
            shard.take(places_BT1[row], mode="clip", out=ids_BT1[row])
    ids_BT1[places_BT1[:, -1] >= [len(shard) for shard in shards], -1] = end_id
    return ids_BT1


def _count_from(begins_R: np.ndarray, positions_BT: np.ndarray) -> None:
    """Number the places of each run of a batch from 0."""
    positions = positions_BT.reshape(-1)
    begins_R = begins_R.astype(np.int32)
    positions[...] = np.arange(positions.size, dtype=np.int32)
    positions -= begins_R.repeat(_lengths(begins_R, positions.size))


def _lengths(begins_R: np.ndarray, size: int) -> np.ndarray:
    """Return the lengths of runs that begin at these of `size` places."""
    return np.concatenate((begins_R[1:], [size])) - begins_R
