"""Losses as weighted sums over tokens, to be divided once, globally.

And what experts add to them. Legend beside the usual dims: C positions in one chunk; P
the parts that the mesh cuts the rows into. As gradients in logits.py, sums are kept
apart by part until the last chunk.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from fm_jax import logits, sharding

Sums = dict[str, jax.Array]
BY_ROW = ("row_nll", "row_correct")


def cross_entropy(
    x_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    softcap: float,
    z_loss: float,
    chunk: int,
    dtype: jnp.dtype,
    bias_V: jax.Array | None = None,
    by_row: bool = False,
) -> tuple[jax.Array, Sums]:
    """Return the summed loss in nats and its parts, without the whole logits array.

    Logits are `x @ head.T + bias`, then soft-capped.
    The loss is `sum(weights * (nll + z_loss * logsumexp**2))` (z-loss: PaLM, arXiv
    2204.02311). `chunk` positions of every row are projected at a time, fewer where it
    does not divide the length; 0 takes all.
    Under differentiation each chunk's gradient is made in the same pass as its loss, so
    that logits are neither kept nor computed twice. Sums: `nll`, `weight`, `correct`;
    with `by_row` also `row_nll` and `row_correct`, those of each row, `[B]`.
    """
    static = (softcap, z_loss, logits.dividing(chunk, x_BTD.shape[1]), dtype, by_row)
    return _cross_entropy(x_BTD, head_VD, bias_V, targets_BT, weights_BT, static)


def token_nll(
    x_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    *,
    softcap: float,
    chunk: int,
    dtype: jnp.dtype,
    bias_V: jax.Array | None = None,
) -> jax.Array:
    """Return the nats of each target, `[B, T]` float32, without all the logits.

    For a loss that is no sum over targets; see `cross_entropy` for one that is, and for
    what the arguments mean. What a target's nats weigh is known only when the gradient
    is asked for: then each chunk's logits are computed a second time.
    """
    static = (softcap, logits.dividing(chunk, x_BTD.shape[1]), dtype)
    return _token_nll(x_BTD, head_VD, bias_V, targets_BT, static)


def by_component(by_row: Sums, components_B: jax.Array, num_components: int) -> Sums:
    """Return `[K]` sums of `[B]` ones: together, so that devices talk once."""
    rows_SB = jnp.stack(list(by_row.values()))  # S of the sums
    is_of_BK = components_B[:, None] == jnp.arange(num_components)
    sums_SK = jnp.sum(jnp.where(is_of_BK, rows_SB[:, :, None], 0), axis=1)
    return dict(zip(by_row, sums_SK, strict=True))


def expert_losses(numbers: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Return `balance_loss` and `router_z_loss` of a mixture of experts.

    numbers: those of `models.routing.route` over the tokens of one micro-batch on all
    devices, `[L, ...]`; the losses are means over the layers. balance_loss is E times
    the sum over experts of their share of the choices and their mean probability: 1
    where both are even (Switch, arXiv 2101.03961, eq. 4; GShard, 2006.16668). The z
    loss is the mean squared logsumexp of the router's logits (ST-MoE, 2202.08906).
    """
    load_LE = jax.lax.stop_gradient(numbers["load"])
    tokens_L = jnp.maximum(numbers["tokens"], 1)
    choices_L1 = jnp.maximum(jnp.sum(load_LE, axis=-1, keepdims=True), 1)
    mean_probs_LE = numbers["probs"] / tokens_L[:, None]
    even = load_LE.shape[-1] * jnp.sum(load_LE / choices_L1 * mean_probs_LE, axis=-1)
    return {
        "balance_loss": jnp.mean(even),
        "router_z_loss": jnp.mean(numbers["lse_squared"] / tokens_L),
    }


def add_experts(
    total: jax.Array, sums: Sums, numbers: dict, weights: Mapping[str, float]
) -> tuple[jax.Array, Sums]:
    """Return a summed loss and its sums with what experts add to every unit of weight.

    numbers: see `expert_losses`; weights: of these. The sums get each loss times
    `weight`, and as `experts` the numbers.
    """
    sums = sums | {"experts": numbers}
    for name, value in expert_losses(numbers).items():
        sums[name] = sums["weight"] * value
        total = total + weights[name] * sums[name]
    return total, sums


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _cross_entropy(x_BTD, head_VD, bias_V, targets_BT, weights_BT, static):
    softcap, z_loss, chunk, dtype, by_row = static
    head_VD = logits.whole(head_VD, dtype)
    parts = sharding.num_parts(x_BTD.shape[0])

    def step(sums, given):
        x_BCD, targets_BC, weights_BC = given
        bent = logits.of(x_BCD, head_VD, bias_V, softcap=softcap, dtype=dtype)
        added = _chunk_sums(bent[0], targets_BC, weights_BC, z_loss, parts, by_row)
        return _add(sums, added), None

    sums, _ = jax.lax.scan(
        step,
        _zero_sums(parts, x_BTD.shape[0], by_row),
        logits.chunks((x_BTD, targets_BT, weights_BT), chunk),
    )
    return _total(sums)


def _forward(x_BTD, head_VD, bias_V, targets_BT, weights_BT, static):
    softcap, z_loss, chunk, dtype, by_row = static
    whole_VD = logits.whole(head_VD, dtype)
    parts = sharding.num_parts(x_BTD.shape[0])

    def step(carry, given):
        sums, tables = carry
        x_BCD, targets_BC, weights_BC = given
        bent = logits.of(x_BCD, whole_VD, bias_V, softcap=softcap, dtype=dtype)
        added = _chunk_sums(bent[0], targets_BC, weights_BC, z_loss, parts, by_row)
        d_x, tables = logits.slopes(
            given, bent, whole_VD, tables, z_loss=z_loss, dtype=dtype
        )
        return (_add(sums, added), tables), d_x

    zeros = _zero_sums(parts, x_BTD.shape[0], by_row)
    (sums, tables), d_x = jax.lax.scan(
        step,
        (zeros, logits.no_slopes(head_VD, bias_V, parts)),
        logits.chunks((x_BTD, targets_BT, weights_BT), chunk),
    )
    slopes = logits.joined(d_x), *logits.summed(tables, head_VD, bias_V)
    return _total(sums), slopes


def _backward(static, kept, cotangents):
    del static
    # A bias that is None has no gradient, and no leaf here either.
    scaled = jax.tree.map(lambda d: d * cotangents[0].astype(d.dtype), kept)
    return (*scaled, None, None)


_cross_entropy.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _token_nll(x_BTD, head_VD, bias_V, targets_BT, static):
    softcap, chunk, dtype = static
    head_VD = logits.whole(head_VD, dtype)

    def step(_, given):
        x_BCD, targets_BC = given
        bent = logits.of(x_BCD, head_VD, bias_V, softcap=softcap, dtype=dtype)
        nll_BC, _, _ = logits.nll(bent[0], targets_BC)
        return None, sharding.constrain(nll_BC, "batch", None)

    given = logits.chunks((x_BTD, targets_BT), chunk)
    return logits.joined(jax.lax.scan(step, None, given)[1])


def _token_forward(x_BTD, head_VD, bias_V, targets_BT, static):
    given = x_BTD, head_VD, bias_V, targets_BT
    return _token_nll(*given, static), given


def _token_backward(static, kept, d_nll_BT):
    softcap, chunk, dtype = static
    x_BTD, head_VD, bias_V, targets_BT = kept
    whole_VD = logits.whole(head_VD, dtype)
    parts = sharding.num_parts(x_BTD.shape[0])

    def step(tables, given):
        bent = logits.of(given[0], whole_VD, bias_V, softcap=softcap, dtype=dtype)
        d_x, tables = logits.slopes(
            given, bent, whole_VD, tables, z_loss=0.0, dtype=dtype
        )
        return tables, d_x

    tables, d_x = jax.lax.scan(
        step,
        logits.no_slopes(head_VD, bias_V, parts),
        logits.chunks((x_BTD, targets_BT, d_nll_BT), chunk),
    )
    return (logits.joined(d_x), *logits.summed(tables, head_VD, bias_V), None)


_token_nll.defvjp(_token_forward, _token_backward)


def _chunk_sums(logits_BCV, targets_BC, weights_BC, z_loss, parts, by_row) -> Sums:
    nll_BC, lse_BC, picked_BC = logits.nll(logits_BCV, targets_BC)
    hits_BC = picked_BC >= jnp.max(logits_BCV, axis=-1)

    def by_part(x_BC):
        return sharding.constrain(jnp.sum(x_BC.reshape(parts, -1), axis=1), "batch")

    sums = {
        "total": by_part(weights_BC * (nll_BC + z_loss * lse_BC**2)),
        "nll": by_part(weights_BC * nll_BC),
        "weight": by_part(weights_BC),
        "correct": by_part(weights_BC * hits_BC),
    }
    if by_row:
        for name, x_BC in zip(BY_ROW, (nll_BC, hits_BC), strict=True):
            row_B = jnp.sum(weights_BC * x_BC, axis=1)
            sums[name] = sharding.constrain(row_B, "batch")
    return sums


def _zero_sums(parts: int, rows: int, by_row: bool) -> Sums:
    zero_P = sharding.constrain(jnp.zeros(parts, jnp.float32), "batch")
    sums = {name: zero_P for name in ("total", "nll", "weight", "correct")}
    if by_row:
        zero_B = sharding.constrain(jnp.zeros(rows, jnp.float32), "batch")
        sums |= {name: zero_B for name in BY_ROW}
    return sums


def _add(a: Sums, b: Sums) -> Sums:
    return {name: a[name] + b[name] for name in a}


def _total(sums: Sums) -> tuple[jax.Array, Sums]:
    """Return the loss and the other sums, over all parts."""
    summed = {
        name: value if name in BY_ROW else jnp.sum(value)
        for name, value in sums.items()
    }
    return summed.pop("total"), summed
