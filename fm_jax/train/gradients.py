"""The gradient of a step: of its whole batch, however that is cut up."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fm_jax import sharding
from fm_jax.finetune.tuning import Tuning


def make(
    tuning: Tuning,
    sums_of: Callable,
    *,
    accumulation: int,
    dropout_seed: int | None = None,
) -> Callable:
    """Return f(state, batch) -> (gradient of what trains, sums, their weight).

    sums_of: the objective, f(params, batch) -> (summed loss, sums), over the params
    that `tuning` joins. The gradient is that of the summed loss over all micro-batches,
    divided once by the sum of weights: cutting a batch up changes nothing but rounding.
    Experts are an exception: their balance loss is that of each micro-batch.
    """

    def loss_of(params, frozen, batch, rng):
        return sums_of(tuning.join(params, frozen, rng), batch)

    grad_of = jax.value_and_grad(loss_of, has_aux=True)

    def gradient(state, batch):
        rng = None
        if dropout_seed is not None:
            rng = jax.random.fold_in(jax.random.key(dropout_seed), state.step)
        grads, sums = _accumulated(grad_of, state, batch, rng, accumulation)
        weight = jnp.maximum(sums["weight"], 1e-9)
        return jax.tree.map(lambda g: g / weight, grads), sums, weight

    return gradient


def _accumulated(grad_of, state, batch, rng, accumulation):
    if accumulation == 1:
        (_, sums), grads = grad_of(state.params, state.frozen, batch, rng)
        return grads, sums

    def cut(x):
        # Every device keeps its own rows: micro-batch a is rows a, a+A, a+2A, ...
        return jnp.swapaxes(x.reshape(-1, accumulation, *x.shape[1:]), 0, 1)

    def one(number, micro):
        mine = None if rng is None else jax.random.fold_in(rng, number)
        (_, sums), grads = grad_of(state.params, state.frozen, micro, mine)
        return grads, sums

    def body(carry, turn):
        number, micro = turn
        micro = {
            name: sharding.constrain(x, "rows", *[None] * (x.ndim - 1))
            for name, x in micro.items()
        }
        return jax.tree.map(jnp.add, carry, one(number, micro)), None

    micro = {name: cut(x) for name, x in batch.items()}
    numbers = None if rng is None else jnp.arange(accumulation)
    first = jax.tree.map(lambda x: x[0], (numbers, micro))
    shapes = jax.eval_shape(one, *first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(body, zeros, (numbers, micro))[0]
