"""Self-attention as a module, and the cache of keys and values."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from fm_jax.models import flash, ring
from fm_jax.models.attend import Labels, attend, num_chunks
from fm_jax.models.config import ModelConfig
from fm_jax.models.layers import Linear, Norm
from fm_jax.models.positions import rotate
from fm_jax.sharding import num_pieces


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
        self.recompute = config.remat != "none"

    def __call__(self, x_BTD, *, angles, queries: Labels, keys: Labels, window, cache):
        """Return the output and the updated `(k, v)` cache slices, or None.

        window: keys that a query sees, None for all. cache: None in training, else
        `(k_BSKH, v_BSKH, slot)`, where the new keys and values are written from `slot`
        on and `keys` labels all slots.
        """
        q_BTNH = checkpoint_name(self.query(x_BTD), "query")
        k_BTKH = checkpoint_name(self.key(x_BTD), "key")
        v_BTKH = checkpoint_name(self.value(x_BTD), "value")
        if self.qk_norm:
            q_BTNH, k_BTKH = self.query_norm(q_BTNH), self.key_norm(k_BTKH)
        if angles is not None:
            q_BTNH, k_BTKH = rotate(q_BTNH, angles), rotate(k_BTKH, angles)
        product = {"softcap": self.softcap, "dtype": self.dtype}
        kept = None
        if cache is None and num_pieces() > 1:
            out_BTNH = ring.attend(
                q_BTNH,
                k_BTKH,
                v_BTKH,
                queries,
                window,
                num_pieces=num_pieces(),
                **product,
            )
        elif cache is None and self.recompute and num_chunks(x_BTD.shape[1]) > 1:
            out_BTNH = flash.attend(q_BTNH, k_BTKH, v_BTKH, queries, window, **product)
        else:
            if cache is not None:
                k_BSKH, v_BSKH, slot = cache
                k_BTKH = _write(k_BSKH, k_BTKH, slot)
                v_BTKH = _write(v_BSKH, v_BTKH, slot)
                kept = (k_BTKH, v_BTKH)
            out_BTNH = attend(
                q_BTNH,
                k_BTKH,
                v_BTKH,
                queries,
                keys,
                window,
                is_causal=cache is None,
                **product,
            )
            # Chunk by chunk it has that name already.
            out_BTNH = checkpoint_name(out_BTNH.astype(x_BTD.dtype), "mixed")
        return self.out(out_BTNH), kept


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
