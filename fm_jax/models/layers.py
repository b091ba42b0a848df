"""The parts of a block that see one token at a time: linear, norm, MLP."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from fm_jax.models.config import ModelConfig
from fm_jax.products import matmul

# Logical axes are plain metadata here: fm_jax.sharding places the arrays, not flax.
nnx.use_eager_sharding(False)


class Linear(nnx.Module):
    """A product over the trailing `in_shape` dims, giving `out_shape`, and a bias.

    The product is flattened to two dims: three-dimensional ones cost 1.4x in their
    backward pass on a CPU. `scale` multiplies the initial 1/sqrt(fan in).
    """

    def __init__(self, in_shape, out_shape, axes, config: ModelConfig, *, rngs, scale):
        shape = (*in_shape, *out_shape)
        std = config.init_scale * scale / math.sqrt(math.prod(in_shape))
        kernel = std * jax.random.normal(rngs.params(), shape, jnp.float32)
        self.kernel = nnx.Param(kernel, axes=axes)
        if config.use_bias:
            bias_axes = axes[len(in_shape) :]
            self.bias = nnx.Param(jnp.zeros(out_shape, jnp.float32), axes=bias_axes)
        self.in_size, self.out_shape = math.prod(in_shape), tuple(out_shape)
        self.num_in = len(in_shape)
        self.use_bias = config.use_bias
        self.dtype = jnp.dtype(config.dtype)
        self.out_dtype = jnp.dtype(config.residual_dtype)

    def __call__(self, x):
        lead = x.shape[: x.ndim - self.num_in]
        kernel = self.kernel[...].reshape(self.in_size, -1)
        flat = matmul(x.reshape(-1, self.in_size), kernel, self.dtype)
        if self.use_bias:
            flat = flat + self.bias[...].reshape(-1)
        return flat.astype(self.out_dtype).reshape(*lead, *self.out_shape)


class Norm(nnx.Module):
    """RMSNorm (arXiv 1910.07467) or LayerNorm (1607.06450) over the last dim."""

    def __init__(self, dim: int, axis: str, config: ModelConfig):
        self.scale = nnx.Param(jnp.ones((dim,), jnp.float32), axes=(axis,))
        self.centred = config.norm == "layernorm"
        self.use_bias = self.centred and config.use_bias
        if self.use_bias:
            self.bias = nnx.Param(jnp.zeros((dim,), jnp.float32), axes=(axis,))
        self.epsilon = config.norm_epsilon

    def __call__(self, x):
        x32 = x.astype(jnp.float32)
        if self.centred:
            x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        y = x32 * jax.lax.rsqrt(mean_square + self.epsilon) * self.scale[...]
        if self.use_bias:
            y = y + self.bias[...]
        return y.astype(x.dtype)


ACTIVATIONS = {
    "gelu": jax.nn.gelu,
    "geglu": jax.nn.gelu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "swiglu": jax.nn.silu,
}


class MLP(nnx.Module):
    """Up, activate (and gate: arXiv 2002.05202; ReLU squared: 2109.08668), down."""

    def __init__(self, config: ModelConfig, *, rngs, out_scale: float):
        dim, hidden = (config.embed_dim,), (config.mlp_dim,)
        self.up = Linear(dim, hidden, ("embed", "mlp"), config, rngs=rngs, scale=1)
        if config.is_gated:
            self.gate = Linear(
                dim, hidden, ("embed", "mlp"), config, rngs=rngs, scale=1
            )
        self.down = Linear(
            hidden, dim, ("mlp", "embed"), config, rngs=rngs, scale=out_scale
        )
        self.activation = config.activation
        self.is_gated = config.is_gated

    def __call__(self, x_BTD):
        activate = ACTIVATIONS[self.activation]
        if self.is_gated:
            h_BTF = activate(self.gate(x_BTD)) * self.up(x_BTD)
        else:
            h_BTF = activate(self.up(x_BTD))
        return self.down(h_BTF)
