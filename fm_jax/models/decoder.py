"""The decoder: embeddings, a scan over stacked blocks, and the output head."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from fm_jax.models import attention
from fm_jax.models.attend import Labels
from fm_jax.models.attention import Attention
from fm_jax.models.config import ModelConfig
from fm_jax.models.layers import MLP, Norm, lookup
from fm_jax.models.positions import rope_angles
from fm_jax.products import matmul
from fm_jax.sharding import constrain

SEE_ALL = 1 << 30  # the window of a layer that has none


class Block(nnx.Module):
    """Attention and MLP around the residual stream: one after the other, or parallel.

    Pre-norm normalises what a branch reads; sandwich also what it adds; a parallel
    block (GPT-J) feeds one normalised input to both branches and adds them together.
    """

    def __init__(self, config: ModelConfig, *, rngs):
        # Residual branches start smaller with depth, so that their sum does not grow
        # (GPT-2's rule).
        out_scale = 1 / math.sqrt(2 * config.num_layers)
        self.attention = Attention(config, rngs=rngs, out_scale=out_scale)
        self.mlp = MLP(config, rngs=rngs, out_scale=out_scale)
        self.is_parallel = config.parallel_block
        self.is_sandwich = config.norm_position == "sandwich"

        def norm():
            return Norm(config.embed_dim, "embed_vector", config)

        self.attention_norm = norm()
        if not self.is_parallel:
            self.mlp_norm = norm()
        if self.is_sandwich:
            self.attention_out_norm, self.mlp_out_norm = norm(), norm()

    def __call__(self, x_BTD, **context):
        h_BTD = self.attention_norm(x_BTD)
        a_BTD, kept = self.attention(h_BTD, **context)
        a_BTD = checkpoint_name(a_BTD, "attention_out")
        if self.is_sandwich:
            a_BTD = self.attention_out_norm(a_BTD)
        x_BTD = x_BTD + a_BTD
        m_BTD = self.mlp(h_BTD if self.is_parallel else self.mlp_norm(x_BTD))
        if self.is_sandwich:
            m_BTD = self.mlp_out_norm(m_BTD)
        x_BTD = x_BTD + m_BTD
        return constrain(x_BTD, "batch", "length", None), kept


class Decoder(nnx.Module):
    """A decoder-only transformer whose whole architecture is in its ModelConfig."""

    def __init__(self, config: ModelConfig, *, rngs):
        self.config = config

        def table(rows, axis):
            noise = jax.random.normal(rngs.params(), (rows, config.embed_dim))
            return nnx.Param(config.embed_init_std * noise, axes=(axis, "embed"))

        self.embedding = table(config.vocab_size, "vocab")
        if config.positions == "learned":
            self.position_embedding = table(config.max_length, "positions")
        self.blocks = nnx.vmap(lambda r: Block(config, rngs=r), in_axes=0, out_axes=0)(
            rngs.split(config.num_layers)
        )
        self.final_norm = Norm(config.embed_dim, "embed_vector", config)
        if not config.tied_embeddings:
            self.head = table(config.vocab_size, "vocab")

    def hidden(self, tokens_BT, positions_BT, segment_ids_BT, cache=None):
        """Return the normalised last hidden states [B, T, D] and the cache.

        positions count from 0 in each document; segment ids keep documents apart, 0 is
        padding. cache: None, or what `attention.empty_cache` gave and earlier calls
        returned.
        """
        config = self.config
        dtype = jnp.dtype(config.residual_dtype)
        x_BTD = lookup(self.embedding[...], tokens_BT, "vocab", dtype)
        if config.positions == "learned":
            table = self.position_embedding[...]
            x_BTD = x_BTD + lookup(table, positions_BT, "positions", dtype)
        x_BTD = constrain(x_BTD, "batch", "length", None)
        angles = None
        if config.positions == "rope":
            angles = rope_angles(positions_BT, config.head_dim, config.rope_theta)

        slot, layer_cache = None, None
        queries = keys = Labels(positions_BT, segment_ids_BT)
        if cache is not None:
            slot, layer_cache = cache["slot"], (cache["k"], cache["v"])
            cache = attention.claim_slots(cache, positions_BT, segment_ids_BT)
            keys = Labels(cache["positions"], cache["segments"])
        is_windowed = any(config.windows())
        windows_L = jnp.array([w or SEE_ALL for w in config.windows()], jnp.int32)

        def body(x_BTD, layer):
            block, window, kv = layer
            return block(
                x_BTD,
                angles=angles,
                queries=queries,
                keys=keys,
                window=window if is_windowed else None,
                cache=None if kv is None else (*kv, slot),
            )

        body = _remat(body, config.remat, config.remat_names)
        x_BTD, kv = jax.lax.scan(body, x_BTD, (self.blocks, windows_L, layer_cache))
        if cache is not None:
            cache = cache | {"k": kv[0], "v": kv[1]}
        return self.final_norm(x_BTD), cache

    def head_table(self):
        """Return the output projection [V, D]: its own, or the embedding when tied."""
        return (self.embedding if self.config.tied_embeddings else self.head)[...]

    def logits(self, x_BTD):
        """Return float32 logits [B, T, V], soft-capped if configured."""
        config = self.config
        x = x_BTD.reshape(-1, config.embed_dim)
        flat = matmul(x, self.head_table().T, jnp.dtype(config.dtype))
        if config.logits_softcap:
            flat = config.logits_softcap * jnp.tanh(flat / config.logits_softcap)
        return flat.reshape(*x_BTD.shape[:-1], config.vocab_size)


def _remat(body, policy: str, names: tuple[str, ...]):
    """Wrap the scanned block so that its backward pass recomputes what is not kept."""
    policies = jax.checkpoint_policies
    kept = {
        "full": None,
        "dots": policies.dots_with_no_batch_dims_saveable,
        "names": policies.save_only_these_names(*names),
        "offload": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=list(names),
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }
    if policy == "none":
        return body
    return jax.checkpoint(body, policy=kept[policy], prevent_cse=False)
