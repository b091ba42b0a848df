"""Token stores in memory, whose ids say where in the stream they stand."""

import itertools
import pathlib
import types

import numpy as np

from fm_jax.data.store import TokenStore


def store_of(lengths, *, cuts=(), end_id=0, leftover=None, name="made"):
    """Return a store of documents of so many ids, the ends not among them.

    The id at place p of the stream is p, but for end ids; the first and the last place
    hold ends. cuts: documents with which another shard begins.
    """
    lengths = np.asarray(lengths, np.int64)
    offsets = np.append(0, np.cumsum(lengths + 1))
    ids = np.arange(offsets[-1] + 1, dtype=np.uint32)
    ids[offsets] = end_id
    starts = offsets[[0, *cuts]]
    leftover = np.zeros(len(lengths)) if leftover is None else np.asarray(leftover)
    return TokenStore(
        path=pathlib.Path("/nowhere"),
        header={
            "name": name,
            "num_tokens": len(ids),
            "dtype": "<u4",
            "has_leftover": bool(leftover.any()),
        },
        shards=tuple(np.split(ids, starts[1:])),
        starts=starts,
        offsets=offsets[:-1],
        leftover=leftover.astype(np.int32),
    )


def tokenizer_of(store, *, end_id=0):
    """Return what stands for the tokenizer of `store_of`: id p is of p % 5 bytes."""
    sizes = np.arange(len(store) + 1) % 5
    sizes[end_id] = 0
    return types.SimpleNamespace(end_id=end_id, byte_lengths=sizes)


def documents_of(store):
    """Return (place of the end id before, of that after) each document."""
    edges = [*store.offsets.tolist(), len(store) - 1]
    return list(itertools.pairwise(edges))
