"""One matrix product for the whole model, and the forms a matrix may be held in."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from fm_jax.sharding import is_one_cpu

MANY_ROWS = 128  # so many make turning an operand round worth it


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Eight:
    """A frozen weight in eight bits: `whole` int8 times `scale`, which broadcasts."""

    whole: jax.Array
    scale: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted:
    """A frozen kernel and what is added to it: scale * a.b (LoRA, arXiv 2106.09685).

    base: [*in, *out], an array or an Eight; a: [*in, R]; b: [R, *out]. rng: a key by
    which a `dropout` part of what `a` reads is left out, None for nothing. Stacked
    layers have one dim more in front, of the rng too.
    """

    base: jax.Array | Eight
    a: jax.Array
    b: jax.Array
    rng: jax.Array | None
    scale: float = dataclasses.field(metadata={"static": True})
    dropout: float = dataclasses.field(metadata={"static": True})


def whole(weight: jax.Array | Eight) -> jax.Array:
    """Return a weight as one array: float32 if it was held in eight bits."""
    if isinstance(weight, Eight):
        return weight.whole.astype(jnp.float32) * weight.scale
    return weight


def linear(x_MK: jax.Array, kernel: jax.Array | Eight | Adapted, dtype: jnp.dtype):
    """Return `x @ kernel` `[M, N]` in float32, from operands rounded to `dtype`.

    kernel: its leading dims together have size K, the others N.
    """
    size = x_MK.shape[1]
    if isinstance(kernel, Adapted):
        a_KR = kernel.a.reshape(size, -1)
        b_RN = kernel.b.reshape(a_KR.shape[1], -1)
        h_MR = matmul(_dropped(x_MK, kernel), a_KR, dtype) * kernel.scale
        return _frozen(x_MK, kernel.base, dtype) + matmul(h_MR, b_RN, dtype)
    if isinstance(kernel, Eight):
        return _frozen(x_MK, kernel, dtype)
    return matmul(x_MK, kernel.reshape(size, -1), dtype)


def _dropped(x_MK, kernel):
    if kernel.rng is None or not kernel.dropout:
        return x_MK
    is_kept_MK = jax.random.bernoulli(kernel.rng, 1 - kernel.dropout, x_MK.shape)
    return jnp.where(is_kept_MK, x_MK / (1 - kernel.dropout), 0).astype(x_MK.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _frozen(x_MK, kernel, dtype):
    """Return the product with a kernel that has no gradient.

    The backward pass keeps it as it is held and makes it whole again: kept whole, the
    layers of a scan would hold all of it at once.
    """
    return _product(x_MK, _matrix(kernel, x_MK.shape[1], dtype), dtype)


def _matrix(kernel, size, dtype):
    return whole(kernel).astype(dtype).reshape(size, -1)


def _frozen_forward(x_MK, kernel, dtype):
    # An empty slice carries the rows' size and dtype to the backward pass.
    matrix_KN = _matrix(kernel, x_MK.shape[1], dtype)
    return _product(x_MK, matrix_KN, dtype), (x_MK[:0], kernel)


def _frozen_backward(dtype, kept, d_MN):
    empty, kernel = kept
    matrix_KN = _matrix(kernel, empty.shape[1], dtype)
    return matmul(d_MN, matrix_KN.T, dtype).astype(empty.dtype), None


_frozen.defvjp(_frozen_forward, _frozen_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(a: jax.Array, b: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Return `a @ b` in float32 from operands rounded to `dtype`.

    a [..., M, K], b [..., K, N] with equal leading dims. The two products of the
    backward pass take the same operand dtype and give float32 too: left to autodiff,
    they would mix dtypes, and a product with a bfloat16 result is as slow as float32 on
    a CPU and loses bits everywhere.
    """
    return _product(a, b, dtype)


def _product(a, b, dtype):
    a, b = a.astype(dtype), b.astype(dtype)
    if dtype == jnp.bfloat16 and a.shape[-2] >= MANY_ROWS and is_one_cpu():
        a, b = _by_rows(a), _by_rows(b)
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _by_rows(x):
    """Return x as a CPU's products of bfloat16 want it: row after row in memory.

    Of a transpose that is only meant XLA computes in float32, at half the rate; turning
    it round costs a fraction of that. Other devices take either. Where a mesh cuts
    arrays it would be wrong: XLA fetches the whole of what has its layout prescribed.
    """
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def _forward(a, b, dtype):
    # The bare product: a remat policy that keeps products cannot see into a custom_vjp.
    return _product(a, b, dtype), (a, b)


def _backward(dtype, kept, d_out):
    a, b = kept
    d_a = matmul(d_out, jnp.swapaxes(b, -1, -2), dtype)
    d_b = matmul(jnp.swapaxes(a, -1, -2), d_out, dtype)
    return d_a.astype(a.dtype), d_b.astype(b.dtype)


matmul.defvjp(_forward, _backward)
