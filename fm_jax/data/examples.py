"""Rows to train on: windows of the token stream, shifted once, documents kept apart."""

import dataclasses

import numpy as np

from fm_jax.data.store import TokenStore
from fm_jax.errors import UserError
from fm_jax.tokenizers.all import Tokenizer

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Windows:
    """The stream cut into rows of `length` targets; the last row is padded.

    Every id of the stream but the first is the target of just one row. The end id
    before a document opens its segment, so a document's first token is predicted from
    the end id and sees nothing of the document before.
    """

    store: TokenStore
    tokenizer: Tokenizer
    length: int
    mask_documents: bool

    def __post_init__(self):
        if len(self.store) <= self.length:
            raise UserError(
                f"the corpus must be longer than one window of data.max_length="
                f"{self.length} tokens; got {len(self.store)} tokens in "
                f"{self.store.path}. Add text or lower data.max_length."
            )

    def __len__(self) -> int:
        num_targets = len(self.store) - 1
        return (num_targets + self.length - 1) // self.length

    def rows(self, indices: np.ndarray) -> Batch:
        """Return windows `indices` as a batch of [B, T] arrays.

        An index of -1 gives a row of padding. `target_bytes` are the bytes of text that
        each target stands for.
        """
        ids_BT1 = np.zeros((len(indices), self.length + 1), np.int32)
        real_BT1 = np.zeros(ids_BT1.shape, bool)
        for row, index in enumerate(indices):
            if index >= 0:
                start = int(index) * self.length
                ids = self.store.read(
                    start, min(start + self.length + 1, len(self.store))
                )
                ids_BT1[row, : len(ids)] = ids
                real_BT1[row, : len(ids)] = True
        tokens_BT, targets_BT = ids_BT1[:, :-1], ids_BT1[:, 1:]
        is_token_BT, is_target_BT = real_BT1[:, :-1], real_BT1[:, 1:]
        step_T = np.arange(self.length, dtype=np.int32)
        if self.mask_documents:
            opens_BT = (tokens_BT == self.tokenizer.end_id) & is_token_BT
            segments_BT = 1 + np.cumsum(opens_BT, axis=1, dtype=np.int32)
            starts_BT = np.maximum.accumulate(np.where(opens_BT, step_T, 0), axis=1)
            positions_BT = step_T - starts_BT
        else:
            segments_BT = np.ones_like(tokens_BT)
            positions_BT = np.broadcast_to(step_T, tokens_BT.shape)
        return {
            "tokens": np.ascontiguousarray(tokens_BT),
            "targets": np.ascontiguousarray(targets_BT),
            "loss_weights": is_target_BT.astype(np.float32),
            "positions": np.ascontiguousarray(positions_BT * is_token_BT, np.int32),
            "segment_ids": segments_BT * is_token_BT,
            "target_bytes": self._target_bytes(indices, targets_BT, is_target_BT),
        }

    def _target_bytes(self, indices, targets_BT, is_target_BT) -> np.ndarray:
        bytes_BT = self.tokenizer.byte_lengths[targets_BT] * is_target_BT
        if self.store.header["has_leftover"]:
            # The end id after a document carries what its ids do not stand for.
            is_end_BT = (targets_BT == self.tokenizer.end_id) & is_target_BT
            rows, columns = np.nonzero(is_end_BT)
            places = np.asarray(indices)[rows] * self.length + columns + 1
            closed = np.searchsorted(self.store.offsets, places, side="left") - 1
            bytes_BT[rows, columns] += self.store.leftover[closed]
        return bytes_BT.astype(np.int32)
