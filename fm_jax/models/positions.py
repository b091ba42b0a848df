"""Rotary positions (arXiv 2104.09864): angles made once a pass, applied per layer."""

import jax
import jax.numpy as jnp


def rope_angles(
    positions_BT: jax.Array, head_dim: int, theta: float
) -> tuple[jax.Array, jax.Array]:
    """Return sine and cosine, float32 [B, T, 1, H/2], of the rotation angles."""
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    angles = positions_BT[..., None].astype(jnp.float32) * theta**-exponent
    return jnp.sin(angles)[:, :, None, :], jnp.cos(angles)[:, :, None, :]


def rotate(x_BTNH: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate the halves of each head's dims against each other; keeps the dtype."""
    sin, cos = angles
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x_BTNH.dtype)
