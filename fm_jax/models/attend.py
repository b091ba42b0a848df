"""The attention product: who may see whom, and softmax over blocks of queries.

Legend beside the usual dims: M = G * T, the queries that share one key head.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fm_jax.products import matmul

BLOCK = 128  # queries at a time in training, or more: see NUM_BLOCKS
NUM_BLOCKS = 16  # at most, in one row: each block is a piece of program of its own
MASKED = -1e30  # finite, so that a row of padding gives an average and not a nan


class Labels(NamedTuple):
    """What each token of `[B, T]` is: its position in its document, and which one.

    Segment 0 is padding. `take(start, stop)` is a stretch of every row.
    """

    positions: jax.Array
    segments: jax.Array

    def take(self, start: int, stop: int) -> "Labels":
        return Labels(self.positions[:, start:stop], self.segments[:, start:stop])


def visible(queries: Labels, keys: Labels, window: jax.Array | None) -> jax.Array:
    """Return who may see whom, [B, T, S].

    A query sees the keys of its own segment at its own position or before; with a
    window only the last so many, itself included.
    """
    back_BTS = queries.positions[:, :, None] - keys.positions[:, None, :]
    same_BTS = queries.segments[:, :, None] == keys.segments[:, None, :]
    seen_BTS = same_BTS & (back_BTS >= 0)
    return seen_BTS if window is None else seen_BTS & (back_BTS < window)


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    queries: Labels,
    keys: Labels,
    window: jax.Array | None,
    *,
    softcap: float,
    dtype: jnp.dtype,
    is_causal: bool,
) -> jax.Array:
    """Return softmax(q k^T / sqrt(H)) v over what is visible, [B, T, N, H] float32.

    Grouped queries: head n reads key head n // G. With `is_causal` the caller promises
    that T == S and that no query sees a later slot; blocks of queries then skip the
    keys that they cannot see.
    """
    length = q_BTNH.shape[1]
    q_BKGTH = heads_first(q_BTNH, k_BSKH.shape[2])
    k_BKHS = jnp.transpose(k_BSKH, (0, 2, 3, 1))
    v_BKSH = jnp.transpose(v_BSKH, (0, 2, 1, 3))
    block = length // num_chunks(length) if is_causal else length
    outs = []
    for start in range(0, length, block):
        stop = start + block
        seen = stop if is_causal else k_BKHS.shape[3]
        outs.append(
            _attend_block(
                q_BKGTH[:, :, :, start:stop],
                k_BKHS[..., :seen],
                v_BKSH[:, :, :seen],
                queries.take(start, stop),
                keys.take(0, seen),
                window,
                softcap=softcap,
                dtype=dtype,
            )
        )
    return heads_last(jnp.concatenate(outs, axis=3))


def num_chunks(length: int) -> int:
    """Return into how many equal blocks of at least BLOCK a row is cut."""
    most = max(1, min(NUM_BLOCKS, length // BLOCK))
    return max(n for n in range(1, most + 1) if length % n == 0)


def heads_first(q_BTNH: jax.Array, num_kv_heads: int) -> jax.Array:
    """Return queries as [B, K, G, T, H], divided by sqrt(H)."""
    batch, length, num_heads, head_dim = q_BTNH.shape
    groups = num_heads // num_kv_heads
    q_BTKGH = q_BTNH.reshape(batch, length, num_kv_heads, groups, head_dim)
    return jnp.transpose(q_BTKGH, (0, 2, 3, 1, 4)) / math.sqrt(head_dim)


def heads_last(out_BKGTH: jax.Array) -> jax.Array:
    """Return [B, K, G, T, H] as [B, T, N, H]."""
    batch, kv_heads, groups, length, head_dim = out_BKGTH.shape
    out_BTKGH = jnp.transpose(out_BKGTH, (0, 3, 1, 2, 4))
    return out_BTKGH.reshape(batch, length, kv_heads * groups, head_dim)


def masked_scores(q_BKGTH, k_BKHS, seen_BTS, *, softcap: float, dtype) -> jax.Array:
    """Return float32 scores [B, K, G, T, S]; those of what is not seen are MASKED."""
    batch, kv_heads, groups, length, head_dim = q_BKGTH.shape
    q_BKMH = q_BKGTH.reshape(batch, kv_heads, groups * length, head_dim)
    scores_BKMS = matmul(q_BKMH, k_BKHS, dtype)
    if softcap:
        scores_BKMS = softcap * jnp.tanh(scores_BKMS / softcap)
    scores_BKGTS = scores_BKMS.reshape(batch, kv_heads, groups, length, -1)
    return jnp.where(seen_BTS[:, None, None], scores_BKGTS, MASKED)


def weighted(probs_BKGTS, v_BKSH, dtype) -> jax.Array:
    """Return the sum of values by weight, [B, K, G, T, H] float32."""
    batch, kv_heads, groups, length, keys = probs_BKGTS.shape
    probs_BKMS = probs_BKGTS.reshape(batch, kv_heads, groups * length, keys)
    out_BKMH = matmul(probs_BKMS, v_BKSH, dtype)
    return out_BKMH.reshape(batch, kv_heads, groups, length, -1)


def _attend_block(
    q_BKGTH, k_BKHS, v_BKSH, queries, keys, window, *, softcap, dtype
) -> jax.Array:
    seen_BTS = visible(queries, keys, window)
    scores_BKGTS = masked_scores(
        q_BKGTH, k_BKHS, seen_BTS, softcap=softcap, dtype=dtype
    )
    return weighted(jax.nn.softmax(scores_BKGTS, axis=-1), v_BKSH, dtype)
