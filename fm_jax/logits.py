"""Logits a chunk of positions at a time, and what flows back through them.

Legend beside the usual dims: C positions in one chunk; P the parts that the mesh cuts
the rows into. The gradients of head and bias are kept apart by part until the last
chunk, so that devices talk once in a loss and not once a chunk.
"""

import jax
import jax.numpy as jnp

from fm_jax import sharding
from fm_jax.products import matmul

# Of the head [P, V, D] and of the bias [P, V], where there is one.
Tables = tuple[jax.Array, jax.Array | None]


def dividing(chunk: int, length: int) -> int:
    """Return the largest chunk up to `chunk` that divides `length`; 0 is all of it."""
    chunk = min(chunk or length, length)
    while length % chunk:
        chunk -= 1
    return chunk


def chunks(arrays: tuple[jax.Array, ...], chunk: int) -> tuple[jax.Array, ...]:
    """Cut `[B, T, ...]` into `[T/C, B, C, ...]`; rows stay where they are sharded."""

    def cut(x):
        parts = x.reshape(x.shape[0], x.shape[1] // chunk, chunk, *x.shape[2:])
        return jnp.moveaxis(parts, 1, 0)

    return tuple(cut(x) for x in arrays)


def joined(x: jax.Array) -> jax.Array:
    """Put `[T/C, B, C, ...]` chunks together again as `[B, T, ...]`."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def whole(head_VD: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Return the head as the products take it, fetched once for all chunks."""
    return sharding.constrain(head_VD.astype(dtype), "vocab", None)


def of(
    x_BCD: jax.Array,
    head_VD: jax.Array,
    bias_V: jax.Array | None,
    *,
    softcap: float,
    dtype: jnp.dtype,
) -> tuple[jax.Array, jax.Array]:
    """Return float32 logits and their slope with respect to the raw product."""
    flat = matmul(x_BCD.reshape(-1, x_BCD.shape[-1]), head_VD.T, dtype)
    if bias_V is not None:
        flat = flat + bias_V
    raw = flat.reshape(*x_BCD.shape[:-1], head_VD.shape[0])
    if not softcap:
        return raw, jnp.float32(1.0)
    bent = jnp.tanh(raw / softcap)
    return softcap * bent, 1 - bent**2


def nll(
    logits_BCV: jax.Array, targets_BC: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the nats of targets, the logsumexp of the logits and the targets' own."""
    lse_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
    picked_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
    return lse_BC - picked_BC, lse_BC, picked_BC


def slopes(
    chunk: tuple[jax.Array, jax.Array, jax.Array],
    bent: tuple[jax.Array, jax.Array],
    head_VD: jax.Array,
    d_tables: Tables,
    *,
    z_loss: float,
    dtype: jnp.dtype,
) -> tuple[jax.Array, Tables]:
    """Return a chunk's gradient in x, and those of head and bias with it added.

    chunk: x, targets, and what each target's `nll + z_loss * logsumexp**2` weighs;
    bent: what `of` gave.
    """
    (x_BCD, targets_BC, weights_BC), (logits_BCV, slope_BCV) = chunk, bent
    d_head_PVD, d_bias_PV = d_tables
    parts = len(d_head_PVD)
    lse_BC1 = jax.nn.logsumexp(logits_BCV, axis=-1, keepdims=True)
    probs_BCV = jnp.exp(logits_BCV - lse_BC1)
    hit_BCV = targets_BC[..., None] == jnp.arange(logits_BCV.shape[-1])
    d_logits_BCV = probs_BCV * (1 + 2 * z_loss * lse_BC1) - hit_BCV
    d_logits_BCV *= weights_BC[..., None] * slope_BCV
    d_flat = d_logits_BCV.reshape(-1, d_logits_BCV.shape[-1])
    d_x = matmul(d_flat, head_VD, dtype).reshape(x_BCD.shape)
    d_head_PVD = _pinned(d_head_PVD + _outer(d_flat, x_BCD, parts, dtype))
    if d_bias_PV is not None:
        more_PV = jnp.sum(d_flat.reshape(parts, -1, d_flat.shape[-1]), axis=1)
        d_bias_PV = sharding.constrain(d_bias_PV + more_PV, "batch", "vocab")
    return d_x.astype(x_BCD.dtype), (d_head_PVD, d_bias_PV)


def no_slopes(head_VD: jax.Array, bias_V: jax.Array | None, parts: int) -> Tables:
    """Return zeros for the gradients of head and bias, by part."""
    zero_PVD = _pinned(jnp.zeros((parts, *head_VD.shape), jnp.float32))
    return zero_PVD, None if bias_V is None else zero_PVD[..., 0]


def summed(
    d_tables: Tables, head_VD: jax.Array, bias_V: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """Return the gradients of head and bias over all parts."""
    d_head_PVD, d_bias_PV = d_tables
    d_head_VD = sharding.sum_parts(d_head_PVD, "vocab").astype(head_VD.dtype)
    if bias_V is None:
        return d_head_VD, None
    d_bias_V = sharding.constrain(jnp.sum(d_bias_PV, axis=0), "vocab")
    return d_head_VD, d_bias_V.astype(bias_V.dtype)


def _pinned(d_head_PVD):
    return sharding.constrain(d_head_PVD, "batch", "vocab", None)


def _outer(d_flat, x_BCD, parts, dtype):
    """Return the head's gradient from each part's rows by themselves, [P, V, D]."""
    x_flat = x_BCD.reshape(-1, x_BCD.shape[-1])
    if parts == 1:
        return matmul(d_flat.T, x_flat, dtype)[None]
    d_PRV = d_flat.reshape(parts, -1, d_flat.shape[-1])
    x_PRD = x_flat.reshape(parts, -1, x_flat.shape[-1])
    return matmul(jnp.swapaxes(d_PRV, 1, 2), x_PRD, dtype)
