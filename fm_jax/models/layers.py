"""The parts of a block that see one token at a time: linear, norm, MLP."""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from fm_jax.models.config import ModelConfig
from fm_jax.products import linear
from fm_jax.sharding import constrain, num_parts, sum_parts

# Logical axes are plain metadata here: fm_jax.sharding places the arrays, not flax.
nnx.use_eager_sharding(False)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def lookup(table: jax.Array, indices_BT: jax.Array, axis: str, dtype: jnp.dtype):
    """Return the rows of `table` [rows, D] at `indices_BT`, [B, T, D] in `dtype`.

    axis: the logical axis of the rows. Devices fetch whole rows, and each adds up the
    gradient of its own tokens before they talk: left to the partitioner, all of them
    would fetch everyone's activations.
    """
    return constrain(table.astype(dtype), axis, None)[indices_BT]


def _lookup_forward(table, indices_BT, axis, dtype):
    # An empty slice carries the table's shape and dtype to the backward pass.
    return lookup(table, indices_BT, axis, dtype), (table[:, :0], indices_BT)


def _lookup_backward(axis, dtype, kept, d_x_BTD):
    del dtype
    empty, indices_BT = kept
    parts, dim = num_parts(len(indices_BT)), d_x_BTD.shape[-1]
    indices_PR = indices_BT.reshape(parts, -1)
    d_x_PRD = d_x_BTD.reshape(parts, -1, dim).astype(empty.dtype)
    zero = jnp.zeros((parts, len(empty), dim), empty.dtype)
    add = jax.vmap(lambda into, at, x: into.at[at].add(x))
    d_table = constrain(add(zero, indices_PR, d_x_PRD), "batch", axis, None)
    return sum_parts(d_table, axis), None


lookup.defvjp(_lookup_forward, _lookup_backward)


def lean(function):
    """Return a function that keeps only its arguments for its backward pass.

    For what is made of elements, and may end in products, which are not done again.
    Left to itself, jax keeps what each step needs, and a scan over layers writes all of
    that to memory: making it anew is cheaper than reading it again.
    """
    products = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return jax.checkpoint(function, prevent_cse=False, policy=products)


class Linear(nnx.Module):
    """A product over the trailing `in_shape` dims, giving `out_shape`, and a bias.

    The product is flattened to two dims: three-dimensional ones cost 1.4x in their
    backward pass on a CPU. `scale` multiplies the initial 1/sqrt(fan in). In place of
    the kernel's array there may be any form of `fm_jax.products`.
    """

    def __init__(
        self,
        in_shape,
        out_shape,
        axes,
        config: ModelConfig,
        *,
        rngs,
        has_bias: bool,
        scale: float = 1.0,
    ):
        shape = (*in_shape, *out_shape)
        std = config.init_scale * scale / math.sqrt(math.prod(in_shape))
        kernel = std * jax.random.normal(rngs.params(), shape, jnp.float32)
        self.kernel = nnx.Param(kernel, axes=axes)
        if has_bias:
            bias_axes = tuple(
                "embed_vector" if axis == "embed" else axis
                for axis in axes[len(in_shape) :]
            )
            self.bias = nnx.Param(jnp.zeros(out_shape, jnp.float32), axes=bias_axes)
        self.in_size, self.out_shape = math.prod(in_shape), tuple(out_shape)
        self.num_in = len(in_shape)
        self.has_bias = has_bias
        self.dtype = jnp.dtype(config.dtype)
        self.out_dtype = jnp.dtype(config.residual_dtype)

    def __call__(self, x):
        lead = x.shape[: x.ndim - self.num_in]
        rows = x.reshape(-1, self.in_size)
        flat = linear(rows, self.kernel.get_value(), self.dtype)
        if self.has_bias:
            flat = flat + self.bias[...].reshape(-1)
        return flat.astype(self.out_dtype).reshape(*lead, *self.out_shape)


class Norm(nnx.Module):
    """RMSNorm (arXiv 1910.07467) or LayerNorm (1607.06450) over the last dims.

    Under rmsnorm_1p the weight is what the scale differs from 1 by (Gemma).
    """

    def __init__(self, shape: tuple, axes: tuple, config: ModelConfig):
        self.is_offset = config.norm == "rmsnorm_1p"
        start = jnp.zeros if self.is_offset else jnp.ones
        self.scale = nnx.Param(start(shape, jnp.float32), axes=axes)
        self.is_centred = config.norm == "layernorm"
        self.has_bias = self.is_centred and config.has_bias("norm")
        if self.has_bias:
            self.bias = nnx.Param(jnp.zeros(shape, jnp.float32), axes=axes)
        self.epsilon = config.norm_epsilon
        self.over = tuple(range(-len(shape), 0))

    def __call__(self, x):
        return lean(self._normalised)(
            x, self.scale[...], self.bias[...] if self.has_bias else None
        )

    def _normalised(self, x, scale, bias):
        x32 = x.astype(jnp.float32)
        if self.is_centred:
            x32 = x32 - jnp.mean(x32, axis=self.over, keepdims=True)
        mean_square = jnp.mean(jnp.square(x32), axis=self.over, keepdims=True)
        y = x32 * jax.lax.rsqrt(mean_square + self.epsilon)
        y = y * (scale + 1 if self.is_offset else scale)
        return (y if bias is None else y + bias).astype(x.dtype)


def _swiglu_clamped(gate, up):
    """Return gpt-oss's gated unit: bounded, and open where `up` is 0."""
    gate, up = jnp.minimum(gate, 7.0), jnp.clip(up, -7.0, 7.0)
    return gate * jax.nn.sigmoid(1.702 * gate) * (up + 1)


ACTIVATIONS = {
    "gelu": jax.nn.gelu,
    "gelu_exact": lambda x: jax.nn.gelu(x, approximate=False),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}
GATED_ACTIVATIONS = {
    "geglu": lambda gate, up: jax.nn.gelu(gate) * up,
    "swiglu": lambda gate, up: jax.nn.silu(gate) * up,
    "swiglu_clamped": _swiglu_clamped,
}


class MLP(nnx.Module):
    """Up, activate (and gate: arXiv 2002.05202; ReLU squared: 2109.08668), down."""

    def __init__(self, config: ModelConfig, *, rngs, mlp_dim: int, out_scale: float):
        dim, hidden = (config.embed_dim,), (mlp_dim,)
        into, back = ("embed", "mlp"), ("mlp", "embed")
        how = {"rngs": rngs, "has_bias": config.has_bias("mlp")}
        self.up = Linear(dim, hidden, into, config, **how)
        if config.is_gated:
            self.gate = Linear(dim, hidden, into, config, **how)
        self.down = Linear(hidden, dim, back, config, scale=out_scale, **how)
        self.activation = config.activation
        self.is_gated = config.is_gated

    def __call__(self, x_BTD, before=lambda x: x):
        """Return the branch's output of `before(x)`, which backward makes anew."""
        if not self.is_gated:
            activate = ACTIVATIONS[self.activation]
            up_BTF = lean(lambda x: self.up(before(x)))(x_BTD)
            up_BTF = checkpoint_name(up_BTF, "mlp_up")
            return lean(lambda up: self.down(activate(up)))(up_BTF)
        activate = GATED_ACTIVATIONS[self.activation]

        def read(x):
            h_BTD = before(x)
            return self.gate(h_BTD), self.up(h_BTD)

        gate_BTF, up_BTF = lean(read)(x_BTD)
        gate_BTF = checkpoint_name(gate_BTF, "mlp_gate")
        up_BTF = checkpoint_name(up_BTF, "mlp_up")
        return lean(lambda gate, up: self.down(activate(gate, up)))(gate_BTF, up_BTF)
