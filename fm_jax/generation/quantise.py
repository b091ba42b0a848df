"""Weights as decoding takes them: layer by layer, in fewer bytes.

int8: symmetric, one scale for each output of a product, made whole again inside the
compiled step (as in arXiv 2208.07339 without its outliers). Embeddings, also those that
are the head too, norms, biases and routers stay as they are.
"""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp

from fm_jax import products, trees
from fm_jax.products import Eight

# Of a kernel's dims those that are summed over. First match wins; other leaves stay.
SUMMED = (
    (r"router", None),
    (r"attention/out/kernel$", (0, 1)),
    (r"experts/\w+/kernel$", (1,)),
    (r"kernel$", (0,)),
    (r"^head$", (1,)),
)
MOST = 127  # -128 is not used: it has no opposite


@functools.partial(jax.jit, static_argnums=0, static_argnames="int8")
def prepared(model: Any, params: dict, *, int8: bool) -> dict:
    """Return params as `restored` takes them: unstacked, in the dtypes of their use."""

    def prepare(path, leaf):
        name = trees.path_name(path)
        summed = summed_dims(name)
        if int8 and summed is not None:
            return quantised(leaf, summed)
        return leaf.astype(used_dtype(model.config, name))

    return jax.tree_util.tree_map_with_path(prepare, model.unstack(params))


def used_dtype(config: Any, path: str) -> jnp.dtype:
    """Return the dtype that the model rounds a parameter to in all its uses.

    Held in it, the model's numbers stay the same to the bit.
    """
    used = {jnp.dtype(jnp.float32)}
    if summed_dims(path) is not None:
        used = {jnp.dtype(config.dtype)}
    elif re.search(r"^(position_)?embedding$", path):
        used = {jnp.dtype(config.residual_dtype)}
        if path == "embedding" and config.tied_embeddings:
            used.add(jnp.dtype(config.dtype))
    return used.pop() if len(used) == 1 else jnp.dtype(jnp.float32)


def summed_dims(path: str) -> tuple[int, ...] | None:
    """Return which dims of an unstacked parameter its product sums over.

    None for what is no product's, or a product in float32.
    """
    return next((dims for rule, dims in SUMMED if re.search(rule, path)), None)


def quantised(weight: jax.Array, summed: tuple[int, ...]) -> Eight:
    """Return a weight in eight bits, with a scale for each index of its other dims.

    It is off by half a scale at most.
    """
    most = jnp.max(jnp.abs(weight), axis=summed, keepdims=True)
    scale = jnp.where(most > 0, most, 1).astype(jnp.float32) / MOST
    return Eight(jnp.round(weight / scale).astype(jnp.int8), scale)


def restored(params: dict) -> dict:
    """Return params as the model takes them."""

    return jax.tree.map(products.whole, params, is_leaf=is_eight)


def restored_with(params: dict, other: jax.Array) -> tuple[dict, jax.Array]:
    """Return params as the model takes them, and an array that they wait for.

    In a loop an array of each turn: else the compiler would make all weights whole
    before it, and keep them so.
    """
    if any(map(is_eight, jax.tree.leaves(params, is_leaf=is_eight))):
        params, other = jax.lax.optimization_barrier((params, other))
    return restored(params), other


def num_bytes(params: dict) -> int:
    """Return the bytes of all weights."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def is_eight(leaf: Any) -> bool:
    """Return whether a leaf is a weight in eight bits."""
    return isinstance(leaf, Eight)
