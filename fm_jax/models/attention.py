"""Attention: who may see whom, the cache of keys and values, and the product itself.

Legend beside the usual dims: M = G * T, the queries that share one key head.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from fm_jax.models.config import ModelConfig
from fm_jax.models.layers import Linear, Norm
from fm_jax.models.positions import rotate
from fm_jax.products import matmul

BLOCK = 128  # queries at a time in training; keys after a block are never multiplied
MASKED = -1e30  # finite, so that a row of padding gives an average and not a nan


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask_BTS: jax.Array,
    *,
    softcap: float,
    dtype: jnp.dtype,
    is_causal: bool,
) -> jax.Array:
    """Return softmax(q k^T / sqrt(H)) v under `mask_BTS`, as [B, T, N, H] float32.

    Grouped queries: head n reads key head n // G. With `is_causal` the caller promises
    that T == S and that no query sees a later slot; blocks of queries then skip the
    keys that they cannot see.
    """
    length, head_dim = q_BTNH.shape[1], q_BTNH.shape[3]
    q_BKGTH = _heads_first(q_BTNH, k_BSKH.shape[2]) / math.sqrt(head_dim)
    k_BKHS = jnp.transpose(k_BSKH, (0, 2, 3, 1))
    v_BKSH = jnp.transpose(v_BSKH, (0, 2, 1, 3))
    block = BLOCK if is_causal and length % BLOCK == 0 else length
    outs = []
    for start in range(0, length, block):
        stop = start + block
        seen = stop if is_causal else k_BKHS.shape[3]
        outs.append(
            _attend_block(
                q_BKGTH[:, :, :, start:stop],
                k_BKHS[..., :seen],
                v_BKSH[:, :, :seen],
                mask_BTS[:, start:stop, :seen],
                softcap,
                dtype,
            )
        )
    out_BKGTH = jnp.concatenate(outs, axis=3)
    return jnp.transpose(out_BKGTH, (0, 3, 1, 2, 4)).reshape(q_BTNH.shape)


def _heads_first(q_BTNH, num_kv_heads):
    batch, length, num_heads, head_dim = q_BTNH.shape
    groups = num_heads // num_kv_heads
    q_BTKGH = q_BTNH.reshape(batch, length, num_kv_heads, groups, head_dim)
    return jnp.transpose(q_BTKGH, (0, 2, 3, 1, 4))


def _attend_block(q_BKGTH, k_BKHS, v_BKSH, mask_BTS, softcap, dtype):
    batch, kv_heads, groups, length, head_dim = q_BKGTH.shape
    q_BKMH = q_BKGTH.reshape(batch, kv_heads, groups * length, head_dim)
    scores_BKMS = matmul(q_BKMH, k_BKHS, dtype)
    if softcap:
        scores_BKMS = softcap * jnp.tanh(scores_BKMS / softcap)
    scores_BKGTS = scores_BKMS.reshape(batch, kv_heads, groups, length, -1)
    scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS, MASKED)
    probs_BKMS = jax.nn.softmax(scores_BKGTS, axis=-1).reshape(scores_BKMS.shape)
    return matmul(probs_BKMS, v_BKSH, dtype).reshape(q_BKGTH.shape)


def visible(
    q_positions_BT: jax.Array,
    k_positions_BS: jax.Array,
    q_segments_BT: jax.Array,
    k_segments_BS: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Return who may see whom within a document, and the distance back, [B, T, S].

    A query sees the keys of its own segment at its own position or before.
    """
    back_BTS = q_positions_BT[:, :, None] - k_positions_BS[:, None, :]
    same_BTS = q_segments_BT[:, :, None] == k_segments_BS[:, None, :]
    return same_BTS & (back_BTS >= 0), back_BTS


class Attention(nnx.Module):
    """Multi-head, grouped-query (arXiv 2305.13245) or multi-query self-attention."""

    def __init__(self, config: ModelConfig, *, rngs, out_scale: float):
        dim, head_dim = config.embed_dim, config.head_dim
        heads, kv_heads = config.num_heads, config.num_kv_heads

        def project(count, axis):
            axes = ("embed", axis, "head_dim")
            return Linear((dim,), (count, head_dim), axes, config, rngs=rngs, scale=1)

        self.query = project(heads, "heads")
        self.key = project(kv_heads, "kv_heads")
        self.value = project(kv_heads, "kv_heads")
        self.out = Linear(
            (heads, head_dim),
            (dim,),
            ("heads", "head_dim", "embed"),
            config,
            rngs=rngs,
            scale=out_scale,
        )
        if config.qk_norm:  # arXiv 2302.05442
            self.query_norm = Norm(head_dim, "head_dim", config)
            self.key_norm = Norm(head_dim, "head_dim", config)
        self.qk_norm = config.qk_norm
        self.softcap = config.attention_softcap
        self.dtype = jnp.dtype(config.dtype)

    def __call__(self, x_BTD, *, angles, mask_BTS, cache):
        """Return the output and the updated `(k, v)` cache slices, or None.

        cache: None in training, else `(k_BSKH, v_BSKH, slot)`, where the new keys and
        values are written from `slot` on.
        """
        q_BTNH, k_BTKH, v_BTKH = self.query(x_BTD), self.key(x_BTD), self.value(x_BTD)
        if self.qk_norm:
            q_BTNH, k_BTKH = self.query_norm(q_BTNH), self.key_norm(k_BTKH)
        if angles is not None:
            q_BTNH, k_BTKH = rotate(q_BTNH, angles), rotate(k_BTKH, angles)
        kept = None
        if cache is not None:
            k_BSKH, v_BSKH, slot = cache
            k_BTKH = _write(k_BSKH, k_BTKH, slot)
            v_BTKH = _write(v_BSKH, v_BTKH, slot)
            kept = (k_BTKH, v_BTKH)
        out_BTNH = attend(
            q_BTNH,
            k_BTKH,
            v_BTKH,
            mask_BTS,
            softcap=self.softcap,
            dtype=self.dtype,
            is_causal=cache is None,
        )
        return self.out(out_BTNH.astype(x_BTD.dtype)), kept


def _write(old_BS, new_BT, slot):
    start = (0, slot) + (0,) * (old_BS.ndim - 2)
    return jax.lax.dynamic_update_slice(old_BS, new_BT.astype(old_BS.dtype), start)


def empty_cache(config: ModelConfig, batch: int, length: int) -> dict:
    """Return a cache of `length` slots: keys and values of all layers [L, B, S, K, H].

    `positions` and `segments` [B, S] say what each slot holds; segment 0 is an empty
    slot or padding, which nothing sees. `slot` is where the next token goes.
    """
    shape = (config.num_layers, batch, length, config.num_kv_heads, config.head_dim)
    return {
        "k": jnp.zeros(shape, config.dtype),
        "v": jnp.zeros(shape, config.dtype),
        "positions": jnp.zeros((batch, length), jnp.int32),
        "segments": jnp.zeros((batch, length), jnp.int32),
        "slot": jnp.int32(0),
    }


def claim_slots(cache: dict, positions_BT: jax.Array, segments_BT: jax.Array) -> dict:
    """Return the cache with its next slots labelled with the coming tokens."""
    slot = cache["slot"]
    return cache | {
        "positions": _write(cache["positions"], positions_BT, slot),
        "segments": _write(cache["segments"], segments_BT, slot),
        "slot": slot + positions_BT.shape[1],
    }
