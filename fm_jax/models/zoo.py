"""Models as pure functions over dicts of arrays: the border where NNX ends."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from fm_jax.models import cache as caches
from fm_jax.models import draws
from fm_jax.models.attend import Labels
from fm_jax.models.cache import Cache
from fm_jax.models.config import ModelConfig
from fm_jax.models.decoder import Block, Decoder
from fm_jax.sharding import whole_rows


@dataclasses.dataclass(frozen=True, eq=False)  # hashed as an object: static in jit
class Model:
    """What the rest of the house may know of a model.

    `init(rng) -> params`; `hidden(params, tokens, positions, segment_ids) -> (x_BTD,
    numbers)`; `head(params) -> [V, D]`; `head_bias(params) -> [V]` or None;
    `logits(params, x_BTD) -> [B, T, V]`. `axes` are each parameter's logical axes and
    `abstract` its shape and dtype, both in the tree of `params`.

    For decoding, over `unstack(params)`, which has a tree for each layer:
    `empty_cache(batch, capacity)`; `prefill(unstacked, tokens, lengths, capacity) ->
    (x_BD, cache)` of rows padded at their ends, x of the last token; `decode(unstacked,
    tokens_B, cache) -> (x_BD, cache)` of one more token a row; `insert(cache, rows,
    at)`, as in models/cache.py. `logits` takes x_BD[:, None] and unstacked params too.
    """

    config: ModelConfig
    init: Callable
    hidden: Callable
    head: Callable
    head_bias: Callable
    logits: Callable
    unstack: Callable
    empty_cache: Callable
    prefill: Callable
    decode: Callable
    insert: Callable
    axes: dict
    abstract: dict


def build(config: ModelConfig) -> Model:
    """Return the model that `config` describes; nothing is allocated."""

    def make(rng):
        return Decoder(config, rngs=nnx.Rngs(params=rng))

    # Experts are dropped for the sake of training: a text must not depend on others.
    decoding = dataclasses.replace(config, expert_capacity=0.0)

    def make_block(rng):
        return Block(decoding, rngs=nnx.Rngs(params=rng))

    rng = jax.eval_shape(lambda: jax.random.key(0))
    graph, state = nnx.split(nnx.eval_shape(make, rng), nnx.Param)
    stack_graph = nnx.split(nnx.eval_shape(make, rng).blocks, nnx.Param)[0]
    block_graph = nnx.split(nnx.eval_shape(make_block, rng), nnx.Param)[0]

    def init(rng):
        return nnx.to_pure_dict(nnx.state(make(draws.straight(rng)), nnx.Param))

    def hidden(params, tokens, positions, segment_ids):
        stacks = params["blocks"]
        if isinstance(stacks, dict):
            return nnx.merge(graph, params).hidden(tokens, positions, segment_ids)
        decoder = nnx.merge(graph, params | {"blocks": stacks[0]})
        stacks = [nnx.merge(stack_graph, stack) for stack in stacks]
        return decoder.hidden(tokens, positions, segment_ids, stacks)

    def unstack(params):
        def layer(number):
            return jax.tree.map(lambda leaf: leaf[number], params["blocks"])

        return params | {"blocks": [layer(n) for n in range(config.num_layers)]}

    def opened(params):
        """Return the decoder of unstacked params and its blocks.

        The decoder's own `blocks` are then the first one alone, and not to be used.
        """
        layers = params["blocks"]
        if isinstance(layers, dict):
            return nnx.merge(graph, params), None
        blocks = [nnx.merge(block_graph, layer) for layer in layers]
        return nnx.merge(graph, params | {"blocks": layers[0]}), blocks

    def prefill(params, tokens_BT, lengths_B, capacity):
        decoder, blocks = opened(params)
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        segments_BT = (positions_BT < lengths_B[:, None]).astype(jnp.int32)
        labels = Labels(positions_BT, segments_BT)
        x_BTD = decoder.embed(tokens_BT, positions_BT)
        angles, layers = decoder.angles(positions_BT, capacity), []
        for block, is_local, window, slots in _layers(config, blocks, capacity):
            how = {"angles": angles[is_local], "window": window or None}
            with whole_rows():
                x_BTD, (k_BTKH, v_BTKH), _ = block(x_BTD, labels=labels, **how)
            rows = (k_BTKH, v_BTKH, lengths_B, slots, config.dtype)
            layers.append(caches.from_rows(*rows))
        last_B11 = jnp.maximum(lengths_B - 1, 0)[:, None, None]
        x_BD = jnp.take_along_axis(x_BTD, last_B11, axis=1)[:, 0]
        return decoder.final_norm(x_BD), Cache(tuple(layers), lengths_B, capacity)

    def decode(params, tokens_B, cache):
        decoder, blocks = opened(params)
        positions_B1 = cache.lengths_B[:, None]
        lengths_B = cache.lengths_B + 1
        query = Labels(positions_B1, jnp.ones_like(positions_B1))
        x_B1D = decoder.embed(tokens_B[:, None], positions_B1)
        angles, layers = decoder.angles(positions_B1, cache.capacity), []
        every = zip(_layers(config, blocks, cache.capacity), cache.layers, strict=True)
        for (block, is_local, _, slots), layer in every:
            x_B1D, written = block.cached(
                x_B1D,
                query=query,
                keys=caches.labels(lengths_B, slots),
                angles=angles[is_local],
                cache=layer,
            )
            layers.append(written)
        x_BD = decoder.final_norm(x_B1D[:, 0])
        return x_BD, Cache(tuple(layers), lengths_B, cache.capacity)

    def head(params):
        return params["embedding" if config.tied_embeddings else "head"]

    def head_bias(params):
        return params["head_bias"] if config.has_bias("head") else None

    return Model(
        config=config,
        init=init,
        hidden=hidden,
        head=head,
        head_bias=head_bias,
        logits=lambda params, x: opened(params)[0].logits(x),
        unstack=unstack,
        empty_cache=lambda batch, capacity: caches.empty(config, batch, capacity),
        prefill=prefill,
        decode=decode,
        insert=caches.insert,
        axes=_axes(state),
        abstract=jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32),
            nnx.to_pure_dict(state),
        ),
    )


def _layers(config: ModelConfig, blocks: list, capacity: int):
    """Return each layer's block, whether it is local, its window and its slots."""
    slots = caches.num_slots(config, capacity)
    return list(zip(blocks, config.is_local(), config.windows(), slots, strict=True))


def _axes(state) -> dict:
    """Return logical axes by parameter; a dim more than declared is the layer stack."""

    def axes_of(variable):
        axes = variable.get_metadata("axes")
        stacked = variable.get_value().ndim - len(axes)
        return variable.replace(("layers",) * stacked + tuple(axes))

    is_variable = lambda leaf: isinstance(leaf, nnx.Variable)  # noqa: E731
    return nnx.to_pure_dict(jax.tree.map(axes_of, state, is_leaf=is_variable))
