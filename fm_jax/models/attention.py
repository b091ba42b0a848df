"""Self-attention as a module: over whole rows, and over a cache of keys and values."""

import math

import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from fm_jax.models import flash, fused, ring
from fm_jax.models.attend import Labels, attend, attend_cached, num_chunks
from fm_jax.models.cache import LayerCache
from fm_jax.models.config import ModelConfig
from fm_jax.models.layers import Linear, Norm, lean
from fm_jax.models.positions import alibi_keys, alibi_queries, rotate
from fm_jax.sharding import device, num_pieces


def way(config: ModelConfig, *, rows: int, length: int, on: dict | None = None) -> str:
    """Return how attention over `rows` of `length` tokens is done here.

    By what is known when a program is traced: `ring` over pieces of rows, a fused
    kernel by its name (see fused.choose), `chunks` of queries and keys, which hold no
    whole scores, or `blocks` of queries. on: what fused.device_of says of a device, by
    default of those that are traced for.
    """
    if num_pieces() > 1:
        return "ring"
    kernel = fused.choose(
        **(on or fused.device_of(device())),
        dtype=config.dtype,
        length=length,
        head_dim=config.head_dim,
        is_alibi=config.positions == "alibi",
        softcap=config.attention_softcap,
        has_sinks=config.attention_sinks,
    )
    if kernel and fused.is_cut_evenly(rows):
        return kernel
    if config.remat != "none" and num_chunks(length) > 1:
        return "chunks"
    return "blocks"


class Attention(nnx.Module):
    """Multi-head, grouped-query (arXiv 2305.13245) or multi-query self-attention."""

    def __init__(self, config: ModelConfig, *, rngs, out_scale: float):
        dim, head_dim = config.embed_dim, config.head_dim
        heads, kv_heads = config.num_heads, config.num_kv_heads

        def project(count, axis):
            axes = ("embed", axis, "head_dim")
            has_bias = config.has_bias("qkv")
            shape = (count, head_dim)
            return Linear((dim,), shape, axes, config, rngs=rngs, has_bias=has_bias)

        self.query = project(heads, "heads")
        self.key = project(kv_heads, "kv_heads")
        self.value = project(kv_heads, "kv_heads")
        self.out = Linear(
            (heads, head_dim),
            (dim,),
            ("heads", "head_dim", "embed"),
            config,
            rngs=rngs,
            has_bias=config.has_bias("attention_out"),
            scale=out_scale,
        )
        if config.qk_norm:  # arXiv 2302.05442

            def norm(count, axis):
                if config.qk_norm_over == "head":
                    return Norm((head_dim,), ("head_dim",), config)
                return Norm((count, head_dim), (axis, "head_dim"), config)

            self.query_norm = norm(heads, "heads")
            self.key_norm = norm(kv_heads, "kv_heads")
        if config.attention_sinks:
            self.sinks = nnx.Param(jnp.zeros(heads, jnp.float32), axes=("heads",))
        self.has_sinks = config.attention_sinks
        self.qk_norm = config.qk_norm
        self.is_alibi = config.positions == "alibi"
        self.scale = config.attention_scale or 1 / math.sqrt(head_dim)
        self.softcap = config.attention_softcap
        self.dtype = jnp.dtype(config.dtype)
        self.windows = tuple(sorted(set(config.windows())))
        self.config = config

    def __call__(self, x_BTD, before, *, angles, labels: Labels, window):
        """Return the output and the keys and values that a cache would keep.

        They are of `before(x)`, which backward makes anew. window: keys that a query
        sees, None for all.
        """
        q_BTNH, k_BTKH, v_BTKH = self.project(x_BTD, before, angles)
        kept = k_BTKH, v_BTKH
        if self.is_alibi:
            q_BTNH = alibi_queries(q_BTNH)
            k_BTKH = alibi_keys(k_BTKH, labels.positions[:, :, None])
        arrays = (q_BTNH, k_BTKH, v_BTKH, labels)
        how = {"sinks": self._sinks(), "softcap": self.softcap, "dtype": self.dtype}
        rows, length = x_BTD.shape[:2]
        chosen = way(self.config, rows=rows, length=length)
        if chosen == "ring":
            out_BTNH = ring.attend(*arrays, window, num_pieces=num_pieces(), **how)
        elif chosen == "chunks":
            out_BTNH = flash.attend(*arrays, window, **how)
        elif chosen == "blocks":
            out_BTNH = attend(*arrays, window, **how)
        else:
            how |= {"kernel": chosen, "windows": self.windows}
            out_BTNH = fused.attend(*arrays, window, **how).astype(x_BTD.dtype)
        return self.out(out_BTNH), kept

    def cached(
        self, x_B1D, before, *, angles, query: Labels, keys: Labels, cache: LayerCache
    ):
        """Return the output of one new token a row, and the cache with it written.

        keys: what the slots hold then. A window needs no mask: older tokens have no
        slot.
        """
        q_B1NH, k_B1KH, v_B1KH = self.project(x_B1D, before, angles)
        cache = cache.write(k_B1KH, v_B1KH, query.positions)
        k_BKSH = cache.k_BKSH
        if self.is_alibi:
            q_B1NH = alibi_queries(q_B1NH)
            k_BKSH = alibi_keys(k_BKSH, keys.positions[:, None, :])
        how = {"sinks": self._sinks(), "softcap": self.softcap, "dtype": self.dtype}
        out_B1NH = attend_cached(q_B1NH, k_BKSH, cache.v_BKSH, query, keys, **how)
        return self.out(out_B1NH.astype(x_B1D.dtype)), cache

    def project(self, x_BTD, before, angles):
        """Return queries, times the scale of scores, and keys and values."""

        def read(x):
            h_BTD = before(x)
            return self.query(h_BTD), self.key(h_BTD), self.value(h_BTD)

        q_BTNH, k_BTKH, v_BTKH = lean(read)(x_BTD)
        q_BTNH = checkpoint_name(q_BTNH, "query")
        k_BTKH = checkpoint_name(k_BTKH, "key")
        v_BTKH = checkpoint_name(v_BTKH, "value")
        if self.qk_norm:
            q_BTNH, k_BTKH = self.query_norm(q_BTNH), self.key_norm(k_BTKH)
        if angles is not None:
            q_BTNH, k_BTKH = rotate(q_BTNH, angles), rotate(k_BTKH, angles)
        return q_BTNH * self.scale, k_BTKH, v_BTKH

    def _sinks(self):
        return self.sinks[...] if self.has_sinks else None
