"""Losses as weighted sums over tokens, to be divided once, globally.

Legend beside the usual dims: C positions in one chunk.
"""

import functools

import jax
import jax.numpy as jnp

from fm_jax.products import matmul

Sums = dict[str, jax.Array]


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
) -> tuple[jax.Array, Sums]:
    """Return the summed loss in nats and its parts, without the whole logits array.

    The loss is `sum(weights * (nll + z_loss * logsumexp**2))` (z-loss: PaLM, arXiv
    2204.02311). `chunk` positions of every row are projected at a time; 0 takes all.
    Under differentiation each chunk's gradient is made in the same pass as its loss, so
    that logits are neither kept nor computed twice. Sums: `nll`, `weight`, `correct`.
    """
    length = x_BTD.shape[1]
    if chunk <= 0 or length % chunk:
        chunk = length
    return _cross_entropy(
        x_BTD, head_VD, targets_BT, weights_BT, (softcap, z_loss, chunk, dtype)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _cross_entropy(x_BTD, head_VD, targets_BT, weights_BT, static):
    softcap, z_loss, _, dtype = static

    def step(sums, part):
        x, targets, weights = part
        logits, _ = _logits(x, head_VD, softcap, dtype)
        return _add(sums, _chunk_sums(logits, targets, weights, z_loss)), None

    sums, _ = jax.lax.scan(
        step, _zero_sums(), _chunks((x_BTD, targets_BT, weights_BT), static)
    )
    return sums.pop("total"), sums


def _forward(x_BTD, head_VD, targets_BT, weights_BT, static):
    softcap, z_loss, _, dtype = static

    def step(carry, part):
        sums, d_head_VD = carry
        x_BCD, targets_BC, weights_BC = part
        logits_BCV, slope_BCV = _logits(x_BCD, head_VD, softcap, dtype)
        sums = _add(sums, _chunk_sums(logits_BCV, targets_BC, weights_BC, z_loss))
        lse_BC1 = jax.nn.logsumexp(logits_BCV, axis=-1, keepdims=True)
        probs_BCV = jnp.exp(logits_BCV - lse_BC1)
        hit_BCV = targets_BC[..., None] == jnp.arange(logits_BCV.shape[-1])
        d_logits_BCV = probs_BCV * (1 + 2 * z_loss * lse_BC1) - hit_BCV
        d_logits_BCV *= weights_BC[..., None] * slope_BCV
        d_flat = d_logits_BCV.reshape(-1, d_logits_BCV.shape[-1])
        d_x = matmul(d_flat, head_VD, dtype).reshape(x_BCD.shape)
        d_head_VD += matmul(d_flat.T, x_BCD.reshape(-1, x_BCD.shape[-1]), dtype)
        return (sums, d_head_VD), d_x.astype(x_BCD.dtype)

    zero = jnp.zeros(head_VD.shape, jnp.float32)
    (sums, d_head_VD), d_x = jax.lax.scan(
        step, (_zero_sums(), zero), _chunks((x_BTD, targets_BT, weights_BT), static)
    )
    d_x_BTD = jnp.moveaxis(d_x, 0, 1).reshape(x_BTD.shape)
    total = sums.pop("total")
    return (total, sums), (d_x_BTD, d_head_VD.astype(head_VD.dtype))


def _backward(static, kept, cotangents):
    del static
    d_x_BTD, d_head_VD = kept
    scale = cotangents[0]
    return (d_x_BTD * scale.astype(d_x_BTD.dtype), d_head_VD * scale, None, None)


_cross_entropy.defvjp(_forward, _backward)


def _logits(x_BCD, head_VD, softcap, dtype):
    """Return float32 logits and their slope with respect to the raw product."""
    flat = matmul(x_BCD.reshape(-1, x_BCD.shape[-1]), head_VD.T, dtype)
    raw = flat.reshape(*x_BCD.shape[:-1], head_VD.shape[0])
    if not softcap:
        return raw, jnp.float32(1.0)
    bent = jnp.tanh(raw / softcap)
    return softcap * bent, 1 - bent**2


def _chunk_sums(logits_BCV, targets_BC, weights_BC, z_loss) -> Sums:
    lse_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
    picked_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
    nll_BC = lse_BC - picked_BC
    hits_BC = picked_BC >= jnp.max(logits_BCV, axis=-1)
    return {
        "total": jnp.sum(weights_BC * (nll_BC + z_loss * lse_BC**2)),
        "nll": jnp.sum(weights_BC * nll_BC),
        "weight": jnp.sum(weights_BC),
        "correct": jnp.sum(weights_BC * hits_BC),
    }


def _zero_sums() -> Sums:
    return {k: jnp.float32(0) for k in ("total", "nll", "weight", "correct")}


def _add(a: Sums, b: Sums) -> Sums:
    return {name: a[name] + b[name] for name in a}


def _chunks(arrays, static):
    """Cut `[B, T, ...]` into `[T/C, B, C, ...]`; rows stay where they are sharded."""
    chunk = static[2]

    def cut(x):
        parts = x.reshape(x.shape[0], x.shape[1] // chunk, chunk, *x.shape[2:])
        return jnp.moveaxis(parts, 1, 0)

    return tuple(cut(x) for x in arrays)
