"""One matrix product for the whole model, with its own backward pass."""

import functools

import jax
import jax.numpy as jnp


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
    return jnp.matmul(
        a.astype(dtype), b.astype(dtype), preferred_element_type=jnp.float32
    )


def _forward(a, b, dtype):
    # The bare product: a remat policy that keeps products cannot see into a custom_vjp.
    return _product(a, b, dtype), (a, b)


def _backward(dtype, kept, d_out):
    a, b = kept
    d_a = matmul(d_out, jnp.swapaxes(b, -1, -2), dtype)
    d_b = matmul(jnp.swapaxes(a, -1, -2), d_out, dtype)
    return d_a.astype(a.dtype), d_b.astype(b.dtype)


matmul.defvjp(_forward, _backward)
