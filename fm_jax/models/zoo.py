"""Models as pure functions over dicts of arrays: the border where NNX ends."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from fm_jax.models import attention
from fm_jax.models.config import ModelConfig
from fm_jax.models.decoder import Decoder


@dataclasses.dataclass(frozen=True, eq=False)  # hashed as an object: static in jit
class Model:
    """What the rest of the house may know of a model.

    `init(rng) -> params`; `hidden(params, tokens, positions, segment_ids, cache) ->
    (x_BTD, cache)`; `head(params) -> [V, D]`; `logits(params, x_BTD) -> [B, T, V]`;
    `empty_cache(batch, length)`. `axes` are each parameter's logical axes and
    `abstract` its shape and dtype, both in the tree of `params`.
    """

    config: ModelConfig
    init: Callable
    hidden: Callable
    head: Callable
    logits: Callable
    empty_cache: Callable
    axes: dict
    abstract: dict


def build(config: ModelConfig) -> Model:
    """Return the model that `config` describes; nothing is allocated."""

    def make(rng):
        return Decoder(config, rngs=nnx.Rngs(params=rng))

    graph, state = nnx.split(nnx.eval_shape(lambda: make(jax.random.key(0))), nnx.Param)

    def init(rng):
        return nnx.to_pure_dict(nnx.state(make(rng), nnx.Param))

    def hidden(params, tokens, positions, segment_ids, cache=None):
        model = nnx.merge(graph, params)
        return model.hidden(tokens, positions, segment_ids, cache)

    return Model(
        config=config,
        init=init,
        hidden=hidden,
        head=lambda params: nnx.merge(graph, params).head_table(),
        logits=lambda params, x: nnx.merge(graph, params).logits(x),
        empty_cache=lambda batch, length: attention.empty_cache(config, batch, length),
        axes=_axes(state),
        abstract=jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32),
            nnx.to_pure_dict(state),
        ),
    )


def _axes(state) -> dict:
    """Return logical axes by parameter; a dim more than declared is the layer stack."""

    def axes_of(variable):
        axes = variable.get_metadata("axes")
        stacked = variable.get_value().ndim - len(axes)
        return variable.replace(("layers",) * stacked + tuple(axes))

    is_variable = lambda leaf: isinstance(leaf, nnx.Variable)  # noqa: E731
    return nnx.to_pure_dict(jax.tree.map(axes_of, state, is_leaf=is_variable))
