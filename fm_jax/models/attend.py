"""The attention product: who may see whom, and softmax over blocks of queries.

Legend beside the usual dims: M = G * T, the queries that share one key head.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

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
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    labels: Labels,
    window: jax.Array | None,
    *,
    sinks: jax.Array | None,
    softcap: float,
    dtype: jnp.dtype,
) -> jax.Array:
    """Return softmax(q k^T) v over what is visible in a row, [B, T, N, H] in q's dtype.

    Grouped queries: head n reads key head n // G. sinks: a score [N] that joins each
    query's softmax and has no value (arXiv 2309.17453), None for none. No token may see
    a later slot: blocks of queries skip the keys that they cannot see.
    """
    static = (softcap, dtype, q_BTNH.dtype)
    arrays = (x.astype(dtype) for x in (q_BTNH, k_BTKH, v_BTKH))
    return _over_blocks(*arrays, sinks, labels, window, static)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _over_blocks(q_BTNH, k_BTKH, v_BTKH, sinks_N, labels, window, static):
    """Return what `attend` does of operands that are rounded already.

    The backward pass makes the scores of a block anew from what is kept: the operands,
    the output, and of each query's scores the largest and the weight of all
    (FlashAttention, 2205.14135). Remat knows the last three as `mixed`: where it keeps
    them, no score is made a third time.
    """
    return _forward(q_BTNH, k_BTKH, v_BTKH, sinks_N, labels, window, static)[0]


def _forward(q_BTNH, k_BTKH, v_BTKH, sinks_N, labels, window, static):
    softcap, dtype, out_dtype = static
    q_BKGTH = heads_first(q_BTNH, k_BTKH.shape[2])
    k_BKHT, v_BKTH = jnp.transpose(k_BTKH, (0, 2, 3, 1)), jnp.swapaxes(v_BTKH, 1, 2)
    outs, every_largest, every_weight = [], [], []
    for mine, seen in _blocks(q_BTNH.shape[1]):
        scores_BKGTS = masked_scores(
            q_BKGTH[..., mine, :],
            k_BKHT[..., seen],
            _visible(labels, mine, seen, window),
            softcap=softcap,
            dtype=dtype,
        )
        shares_BKGTS, largest, weight = _shares(scores_BKGTS, sinks_N)
        # The sum over values is divided, not each share.
        outs.append(weighted(shares_BKGTS, v_BKTH[..., seen, :], dtype) / weight)
        every_largest.append(largest)
        every_weight.append(weight)
    out_BTNH = heads_last(jnp.concatenate(outs, axis=3)).astype(out_dtype)
    norms = (jnp.concatenate(x, axis=3) for x in (every_largest, every_weight))
    named = checkpoint_name((out_BTNH, *norms), "mixed")
    kept = (q_BTNH, k_BTKH, v_BTKH, sinks_N, labels, window)
    return named[0], (*kept, *named)


def _backward(static, kept, d_out_BTNH):
    softcap, dtype, _ = static
    q_BTNH, k_BTKH, v_BTKH, sinks_N, labels, window, out_BTNH, *norms = kept
    largest_BKGT1, weight_BKGT1 = norms
    num_kv_heads = k_BTKH.shape[2]
    # What softmax takes from the gradients of a query's weights: their weighted mean.
    d_out_BTNH = d_out_BTNH.astype(jnp.float32)
    mean_BTN1 = jnp.sum(out_BTNH * d_out_BTNH, axis=-1, keepdims=True)
    q_BKGTH, d_out_BKGTH, mean_BKGT1 = (
        heads_first(x, num_kv_heads)
        for x in (q_BTNH, d_out_BTNH.astype(dtype), mean_BTN1)
    )
    k_BKTH, v_BKTH = jnp.swapaxes(k_BTKH, 1, 2), jnp.swapaxes(v_BTKH, 1, 2)
    d_q, d_k, d_v = [], 0, 0
    for mine, seen in _blocks(q_BTNH.shape[1]):
        q, d_out = q_BKGTH[..., mine, :], d_out_BKGTH[..., mine, :]
        k, v = k_BKTH[..., seen, :], v_BKTH[..., seen, :]
        scores_BKGTS = masked_scores(
            q,
            jnp.swapaxes(k, 2, 3),
            _visible(labels, mine, seen, window),
            softcap=softcap,
            dtype=dtype,
        )
        shares_BKGTS = jnp.exp(scores_BKGTS - largest_BKGT1[..., mine, :])
        probs_BKGTS = shares_BKGTS / weight_BKGT1[..., mine, :]
        d_probs_BKGTS = weighted(d_out, jnp.swapaxes(v, 2, 3), dtype)
        d_scores_BKGTS = probs_BKGTS * (d_probs_BKGTS - mean_BKGT1[..., mine, :])
        if softcap:  # what is masked is far beyond it, and has no slope
            bent_BKGTS = jnp.maximum(scores_BKGTS / softcap, -1)
            d_scores_BKGTS *= 1 - jnp.square(bent_BKGTS)
        # Once and for all products: left to itself, XLA makes them in each again.
        probs_BKGTS, d_scores_BKGTS = jax.lax.optimization_barrier(
            (probs_BKGTS.astype(dtype), d_scores_BKGTS.astype(dtype))
        )
        d_q.append(weighted(d_scores_BKGTS, k, dtype))
        later = ((0, 0), (0, 0), (0, k_BKTH.shape[2] - seen.stop), (0, 0))
        d_k += jnp.pad(_by_key(d_scores_BKGTS, q, dtype), later)
        d_v += jnp.pad(_by_key(probs_BKGTS, d_out, dtype), later)
    d_sinks_N = None
    if sinks_N is not None:
        shares_BKGT1 = jnp.exp(by_head(sinks_N, num_kv_heads) - largest_BKGT1)
        shares_BKGT1 = shares_BKGT1 / weight_BKGT1
        d_sinks_KG = -jnp.sum(shares_BKGT1 * mean_BKGT1, axis=(0, 3, 4))
        d_sinks_N = d_sinks_KG.reshape(-1).astype(sinks_N.dtype)
    d_q_BTNH = heads_last(jnp.concatenate(d_q, axis=3)).astype(dtype)
    d_k_BTKH, d_v_BTKH = (jnp.swapaxes(d, 1, 2).astype(dtype) for d in (d_k, d_v))
    return d_q_BTNH, d_k_BTKH, d_v_BTKH, d_sinks_N, None, None


_over_blocks.defvjp(_forward, _backward)


def _blocks(length: int) -> list[tuple[slice, slice]]:
    """Return the slots of each block of queries, and those of the keys it may see."""
    block = length // num_chunks(length)
    starts = range(0, length, block)
    return [(slice(start, start + block), slice(0, start + block)) for start in starts]


def _visible(labels: Labels, mine: slice, seen: slice, window) -> jax.Array:
    queries = labels.take(mine.start, mine.stop)
    return visible(queries, labels.take(seen.start, seen.stop), window)


def _by_key(x_BKGTS, y_BKGTH, dtype) -> jax.Array:
    """Return the sum over queries of x times y, [B, K, S, H] float32."""
    batch, kv_heads, groups, length, keys = x_BKGTS.shape
    x_BKMS = x_BKGTS.reshape(batch, kv_heads, groups * length, keys)
    y_BKMH = y_BKGTH.reshape(batch, kv_heads, groups * length, -1)
    return matmul(jnp.swapaxes(x_BKMS, 2, 3), y_BKMH, dtype)


def attend_cached(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    queries: Labels,
    keys: Labels,
    *,
    sinks: jax.Array | None,
    softcap: float,
    dtype: jnp.dtype,
) -> jax.Array:
    """Return what `attend` gives for a few queries over keys that are kept by head."""
    q_BKGTH = heads_first(q_BTNH, k_BKSH.shape[1])
    batch, kv_heads, groups, length, head_dim = q_BKGTH.shape
    q_BKMH = q_BKGTH.reshape(batch, kv_heads, groups * length, head_dim)
    # Keys first: of a few queries it is these that are turned round, not all keys.
    scores_BKSM = matmul(k_BKSH, jnp.swapaxes(q_BKMH, 2, 3), dtype)
    scores_BKGTS = jnp.swapaxes(scores_BKSM, 2, 3).reshape(*q_BKGTH.shape[:4], -1)
    scores_BKGTS = _masked(scores_BKGTS, visible(queries, keys, None), softcap)
    return heads_last(_mix(scores_BKGTS, v_BKSH, sinks, dtype))


def num_chunks(length: int) -> int:
    """Return into how many equal blocks of at least BLOCK a row is cut."""
    most = max(1, min(NUM_BLOCKS, length // BLOCK))
    return max(n for n in range(1, most + 1) if length % n == 0)


def heads_first(q_BTNH: jax.Array, num_kv_heads: int) -> jax.Array:
    """Return queries as [B, K, G, T, H]."""
    batch, length, num_heads, head_dim = q_BTNH.shape
    groups = num_heads // num_kv_heads
    q_BTKGH = q_BTNH.reshape(batch, length, num_kv_heads, groups, head_dim)
    return jnp.transpose(q_BTKGH, (0, 2, 3, 1, 4))


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
    scores_BKGTS = scores_BKMS.reshape(batch, kv_heads, groups, length, -1)
    return _masked(scores_BKGTS, seen_BTS, softcap)


def _masked(scores_BKGTS, seen_BTS, softcap: float):
    if softcap:
        scores_BKGTS = softcap * jnp.tanh(scores_BKGTS / softcap)
    return jnp.where(seen_BTS[:, None, None], scores_BKGTS, MASKED)


def weighted(probs_BKGTS, v_BKSH, dtype) -> jax.Array:
    """Return the sum of values by weight, [B, K, G, T, H] float32."""
    batch, kv_heads, groups, length, keys = probs_BKGTS.shape
    probs_BKMS = probs_BKGTS.reshape(batch, kv_heads, groups * length, keys)
    out_BKMH = matmul(probs_BKMS, v_BKSH, dtype)
    return out_BKMH.reshape(batch, kv_heads, groups, length, -1)


def by_head(sinks_N: jax.Array, num_kv_heads: int) -> jax.Array:
    """Return sinks as [K, G, 1, 1], to stand beside scores."""
    return sinks_N.astype(jnp.float32).reshape(num_kv_heads, -1, 1, 1)


def _shares(scores_BKGTS, sinks_N):
    """Return exp of scores less the largest of each query, that, and their sum."""
    largest = jnp.max(scores_BKGTS, axis=-1, keepdims=True)
    if sinks_N is None:
        shares_BKGTS = jnp.exp(scores_BKGTS - largest)
        return shares_BKGTS, largest, jnp.sum(shares_BKGTS, axis=-1, keepdims=True)
    sinks_KG11 = by_head(sinks_N, scores_BKGTS.shape[1])
    largest = jnp.maximum(largest, sinks_KG11)
    shares_BKGTS = jnp.exp(scores_BKGTS - largest)
    weight = jnp.sum(shares_BKGTS, axis=-1, keepdims=True)
    return shares_BKGTS, largest, weight + jnp.exp(sinks_KG11 - largest)


def _mix(scores_BKGTS, v_BKSH, sinks_N, dtype) -> jax.Array:
    """Return values [B, K, G, T, H] mixed by the softmax of scores and sinks."""
    shares_BKGTS, _, weight = _shares(scores_BKGTS, sinks_N)
    return weighted(shares_BKGTS, v_BKSH, dtype) / weight
