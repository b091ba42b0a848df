"""The decoder: embeddings, a scan over stacked blocks, and the output head."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from fm_jax.models.attend import Labels
from fm_jax.models.attention import Attention
from fm_jax.models.config import ModelConfig
from fm_jax.models.layers import MLP, Norm, lookup
from fm_jax.models.moe import MoE
from fm_jax.models.positions import rope_angles
from fm_jax.products import matmul
from fm_jax.sharding import constrain, device

SEE_ALL = 1 << 30  # the window of a layer that has none
# Layers in a turn of the scan, from so many bytes of residual stream, below a width.
UNROLLED, UNROLLED_FROM, WIDE = 4, 1 << 20, 512


class Block(nnx.Module):
    """Attention and MLP around the residual stream: one after the other, or parallel.

    Pre-norm normalises what a branch reads, post-norm (OLMo 2, arXiv 2501.00656) what
    it adds, sandwich both. In a parallel block both branches read the same stream,
    through one norm (GPT-J) or a norm of their own (GPT-NeoX, arXiv 2204.06745).
    """

    def __init__(self, config: ModelConfig, *, rngs):
        # Residual branches start smaller with depth, so that their sum does not grow
        # (GPT-2's rule).
        out_scale = 1 / math.sqrt(2 * config.num_layers)
        self.attention = Attention(config, rngs=rngs, out_scale=out_scale)
        self.is_sparse = config.num_experts > 0
        if self.is_sparse:
            self.mlp = MoE(config, rngs=rngs, out_scale=out_scale)
        else:
            width = config.mlp_dim
            self.mlp = MLP(config, rngs=rngs, mlp_dim=width, out_scale=out_scale)
        self.is_parallel = config.parallel_block
        self.has_in_norms = config.norm_position != "post"
        self.has_out_norms = config.norm_position != "pre"
        self.has_mlp_norm = not config.parallel_block or config.parallel_norms == 2

        def norm():
            return Norm((config.embed_dim,), ("embed_vector",), config)

        if self.has_in_norms:
            self.attention_norm = norm()
            if self.has_mlp_norm:
                self.mlp_norm = norm()
        if self.has_out_norms:
            self.attention_out_norm, self.mlp_out_norm = norm(), norm()

    def __call__(self, x_BTD, *, labels: Labels, **context):
        """Return the stream, the keys and values to cache, and the MLP's numbers."""

        def attend(x_BTD, before):
            return self.attention(x_BTD, before, labels=labels, **context)

        return self._around(x_BTD, attend, labels.segments)

    def cached(self, x_B1D, *, query: Labels, **context):
        """Return the stream of one new token a row, and the layer's cache with it."""

        def attend(x_B1D, before):
            return self.attention.cached(x_B1D, before, query=query, **context)

        return self._around(x_B1D, attend, query.segments)[:2]

    def _around(self, x_BTD, attend, segments_BT):
        before = self.attention_norm if self.has_in_norms else lambda x: x
        a_BTD, kept = attend(x_BTD, before)
        a_BTD = checkpoint_name(a_BTD, "attention_out")
        if self.has_out_norms:
            a_BTD = self.attention_out_norm(a_BTD)
        read_BTD, x_BTD = x_BTD, x_BTD + a_BTD
        if not self.is_parallel:
            read_BTD = x_BTD
        if self.has_in_norms and self.has_mlp_norm:
            before = self.mlp_norm
        numbers = {}
        if self.is_sparse:
            m_BTD, numbers = self.mlp(before(read_BTD), segments_BT)
        else:
            m_BTD = self.mlp(read_BTD, before)
        if self.has_out_norms:
            m_BTD = self.mlp_out_norm(m_BTD)
        x_BTD = constrain(x_BTD + m_BTD, "batch", "length", None)
        return x_BTD, kept, numbers


class Decoder(nnx.Module):
    """A decoder-only transformer whose whole architecture is in its ModelConfig."""

    def __init__(self, config: ModelConfig, *, rngs):
        self.config = config

        def table(rows, axis):
            noise = jax.random.normal(rngs.params(), (rows, config.embed_dim))
            return nnx.Param(config.embed_init_std * noise, axes=(axis, "embed"))

        self.embedding = table(config.vocab_size, "vocab")
        if config.positions == "learned":
            rows = config.max_length + config.position_offset
            self.position_embedding = table(rows, "positions")

        def norm():
            return Norm((config.embed_dim,), ("embed_vector",), config)

        if config.embed_norm:
            self.embedding_norm = norm()
        self.blocks = nnx.vmap(lambda r: Block(config, rngs=r), in_axes=0, out_axes=0)(
            rngs.split(config.num_layers)
        )
        self.final_norm = norm()
        if not config.tied_embeddings:
            self.head = table(config.vocab_size, "vocab")
        if config.has_bias("head"):
            zeros = jnp.zeros(config.vocab_size, jnp.float32)
            self.head_bias = nnx.Param(zeros, axes=("vocab",))

    def embed(self, tokens_BT, positions_BT):
        """Return what the first block reads, [B, T, D]."""
        config = self.config
        dtype = jnp.dtype(config.residual_dtype)
        x_BTD = lookup(self.embedding[...], tokens_BT, "vocab", dtype)
        if config.embed_scale != 1:
            x_BTD = x_BTD * jnp.asarray(config.embed_scale, dtype)
        if config.positions == "learned":
            table = self.position_embedding[...]
            rows_BT = positions_BT + config.position_offset
            x_BTD = x_BTD + lookup(table, rows_BT, "positions", dtype)
        if config.embed_norm:
            x_BTD = self.embedding_norm(x_BTD)
        return constrain(x_BTD, "batch", "length", None)

    def angles(self, positions_BT, longest=None):
        """Return the rotary angles of global and of local layers, None without rope.

        longest: of the rows these tokens stand in, by default their last position's.
        """
        if self.config.positions != "rope":
            return None, None
        if longest is None:
            longest = jnp.max(positions_BT) + 1
        return rope_angles(self.config, positions_BT, longest)

    def hidden(self, tokens_BT, positions_BT, segment_ids_BT, stacks=()):
        """Return the normalised last hidden states [B, T, D] and the layers' numbers.

        positions count from 0 in each document; segment ids keep documents apart, 0 is
        padding. Numbers are what MoE says of its load, stacked [L, ...]; else {}.
        stacks: in place of the blocks, several stacks of them, scanned one after the
        other: what is frozen below what trains then has no backward pass.
        """
        config = self.config
        labels = Labels(positions_BT, segment_ids_BT)
        x_BTD = self.embed(tokens_BT, positions_BT)
        everywhere, local = self.angles(positions_BT)
        is_windowed = any(config.windows())
        windows_L = np.array([w or SEE_ALL for w in config.windows()], np.int32)
        is_local_L = np.array(config.is_local())

        def body(x_BTD, layer):
            block, window, is_local = layer
            angles = everywhere
            if config.rope_local_theta and angles is not None:
                both = zip(local, everywhere, strict=True)
                angles = tuple(jnp.where(is_local, a, b) for a, b in both)
            x_BTD, _, numbers = block(
                x_BTD,
                labels=labels,
                angles=angles,
                window=window if is_windowed else None,
            )
            return x_BTD, numbers

        body = _remat(body, config.remat, config.remat_names)
        first, every = 0, []
        for blocks in stacks or (self.blocks,):
            of = slice(first, first + len(jax.tree.leaves(blocks)[0]))
            layers = (blocks, jnp.array(windows_L[of]), jnp.array(is_local_L[of]))
            x_BTD, numbers = jax.lax.scan(
                body, x_BTD, layers, unroll=_layers_in_a_turn(x_BTD, config.remat)
            )
            every.append(numbers)
            first = of.stop
        if len(every) > 1:
            numbers = jax.tree.map(lambda *parts: jnp.concatenate(parts), *every)
        return self.final_norm(x_BTD), numbers

    def head_table(self):
        """Return the output projection [V, D]: its own, or the embedding when tied."""
        return (self.embedding if self.config.tied_embeddings else self.head)[...]

    def logits(self, x_BTD):
        """Return float32 logits [B, T, V], soft-capped if configured."""
        config = self.config
        x = x_BTD.reshape(-1, config.embed_dim)
        table, dtype = self.head_table(), jnp.dtype(config.dtype)
        if len(x) == 1:  # a CPU would turn the table round for a single row
            flat = matmul(table, x.T, dtype).T
        else:
            flat = matmul(x, table.T, dtype)
        if config.has_bias("head"):
            flat = flat + self.head_bias[...]
        if config.logits_softcap:
            flat = config.logits_softcap * jnp.tanh(flat / config.logits_softcap)
        return flat.reshape(*x_BTD.shape[:-1], config.vocab_size)


def _layers_in_a_turn(x_BTD, remat: str) -> int:
    """Return how many layers a turn of the scan over them has.

    On a CPU one product of a narrow model does not fill the cores, and what a turn
    keeps for its backward pass is copied into a stack and out again: with several
    layers in a turn XLA has products to do at once, and less to copy. A wide model has
    nothing of it, a small stream does not pay back what it takes to compile, and under
    remat all layers of a turn would be made anew before the first is used.
    """
    is_narrow = x_BTD.shape[-1] < WIDE and x_BTD.nbytes >= UNROLLED_FROM
    pays = device().platform == "cpu" and is_narrow and remat == "none"
    return UNROLLED if pays else 1


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
