"""Schedules of the learning rate and the optax chain."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fm_jax import trees
from fm_jax.errors import unknown

SCHEDULES = ("cosine", "linear", "constant", "wsd", "inverse_sqrt")
OPTIMIZERS = ("adamw",)


def schedule(
    *,
    name: str,
    peak: float,
    num_steps: int,
    warmup_fraction: float,
    decay_fraction: float,
    final_fraction: float,
) -> Callable:
    """Return the learning rate as a function of the updates made before.

    All warm up linearly to `peak` and then: cosine and linear fall to `final_fraction`
    of it at `num_steps`; constant stays; wsd stays and falls linearly over the last
    `decay_fraction` (arXiv 2404.06395); inverse_sqrt falls as sqrt(warm-up / step).
    """
    if name not in SCHEDULES:
        raise unknown("schedule.name", name, SCHEDULES)
    warmup = max(1, round(warmup_fraction * num_steps))
    rest = max(1, num_steps - warmup)
    decay = max(1, round(decay_fraction * num_steps))

    def rate(step):
        step = jnp.asarray(step, jnp.float32)
        done = jnp.clip((step - warmup) / rest, 0, 1)
        after = {
            "cosine": lambda: _fall(0.5 * (1 + jnp.cos(jnp.pi * done)), final_fraction),
            "linear": lambda: _fall(1 - done, final_fraction),
            "constant": lambda: jnp.float32(1),
            "wsd": lambda: _fall(
                jnp.clip((num_steps - step) / decay, 0, 1), final_fraction
            ),
            "inverse_sqrt": lambda: jnp.sqrt(warmup / jnp.maximum(step, warmup)),
        }[name]()
        return peak * jnp.where(step < warmup, (step + 1) / warmup, after)

    return rate


def _fall(left, final_fraction):
    return final_fraction + (1 - final_fraction) * left


def decay_mask(params: dict, rules: Sequence[tuple[str, bool]]) -> dict:
    """Return which parameters decay, by the first rule whose pattern finds the path.

    The balance of experts never does: see `train.step`, which moves it by their load.
    """
    rules = ((r"(^|/)balance$", False), *rules)
    return trees.by_rules(params, rules, "optimizer.decay_rules")


def make(
    rate: Callable,
    mask: dict,
    *,
    name: str,
    weight_decay: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    mu_dtype: str,
    nu_dtype: str,
    clip_norm: float,
    multipliers: dict | None = None,
    gate: Callable | None = None,
) -> optax.GradientTransformation:
    """Return global-norm clipping, then AdamW (arXiv 1711.05101) at `rate`(step).

    The moments are kept in `mu_dtype` and `nu_dtype`; the update is made in float32.
    multipliers: of the learning rate, each broadcasts to its parameter. gate: a
    function of the updates made before that gives what each parameter's gradient and
    update are multiplied by: 0, and from some step on 1. Adam counts from then.
    """
    if name not in OPTIMIZERS:
        raise unknown("optimizer.name", name, OPTIMIZERS)
    clip = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    closed = [_closed(gate)] if gate else []
    late = [_late(gate, beta1, beta2)] if gate else []
    scaled = [] if multipliers is None else [_scaled(multipliers)]
    return optax.chain(
        *closed,
        *clip,
        _moments_in(
            optax.scale_by_adam(b1=beta1, b2=beta2, eps=epsilon), mu_dtype, nu_dtype
        ),
        *late,
        optax.add_decayed_weights(weight_decay, mask=mask),
        *scaled,
        *closed,
        optax.scale_by_learning_rate(rate),
    )


def _scaled(multipliers: dict) -> optax.GradientTransformation:
    return optax.stateless(
        lambda updates, _: jax.tree.map(jnp.multiply, updates, multipliers)
    )


class _Count(NamedTuple):
    """The updates made before."""

    step: jax.Array


def _closed(gate: Callable) -> optax.GradientTransformation:
    """Return the product with the gate."""

    def update(updates, state, params=None):
        del params
        updates = jax.tree.map(jnp.multiply, updates, gate(state.step))
        return updates, _Count(state.step + 1)

    return optax.GradientTransformation(lambda _: _Count(jnp.int32(0)), update)


class _Opened(NamedTuple):
    """The updates made before, and by parameter those since its gate opened."""

    step: jax.Array
    since: dict


def _late(gate: Callable, beta1: float, beta2: float) -> optax.GradientTransformation:
    """Return Adam's updates as if each parameter's first were the first of all.

    Its moments begin when its gate opens, while its correction of their bias counts all
    updates: left so, with beta2=0.999 the first ones would be several times too large.
    """

    def init(params):
        del params
        shapes = jax.eval_shape(gate, jnp.int32(0))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.int32), shapes)
        return _Opened(jnp.int32(0), zeros)

    def update(updates, state, params=None):
        del params
        is_open = gate(state.step)
        since = jax.tree.map(lambda n, x: n + (x > 0), state.since, is_open)
        step = state.step + 1

        def corrected(x, since):
            own = jnp.maximum(since, 1).astype(jnp.float32)
            mean = (1 - beta1**step) / (1 - beta1**own)
            return x * mean * jnp.sqrt((1 - beta2**own) / (1 - beta2**step))

        return jax.tree.map(corrected, updates, since), _Opened(step, since)

    return optax.GradientTransformation(init, update)


def _moments_in(
    adam: optax.GradientTransformation, mu_dtype: str, nu_dtype: str
) -> optax.GradientTransformation:
    """Return Adam with its moments rounded between updates."""

    def rounded(state, mu_dtype, nu_dtype):
        return state._replace(
            mu=optax.tree.cast(state.mu, mu_dtype),
            nu=optax.tree.cast(state.nu, nu_dtype),
        )

    def update(grads, state, params=None):
        updates, state = adam.update(
            grads, rounded(state, "float32", "float32"), params
        )
        return updates, rounded(state, mu_dtype, nu_dtype)

    return optax.GradientTransformation(
        lambda params: rounded(adam.init(params), mu_dtype, nu_dtype), update
    )
