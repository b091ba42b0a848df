"""The experts' own MLPs over the tokens that take them, on one device or on many.

Legend: J experts that a token takes; Z tokens; M pairs of a token and an expert of its,
sorted by expert, or as many rows as the experts have places; S tokens of a group, g
groups, C places of an expert in each; P partial sums.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from fm_jax.models import grouped
from fm_jax.models.config import ModelConfig
from fm_jax.models.layers import ACTIVATIONS, GATED_ACTIVATIONS
from fm_jax.models.routing import Routes, group_size, num_slots
from fm_jax.products import Eight, matmul, whole
from fm_jax.sharding import cut_over, num_parts, per_device

AXES = {
    "up": {"kernel": ("expert", "embed", "mlp"), "bias": ("expert", "mlp")},
    "down": {"kernel": ("expert", "mlp", "embed"), "bias": ("expert", "embed_vector")},
}
AXES["gate"] = AXES["up"]


class Stacked(nnx.Module):
    """One linear layer of all experts: `kernel` [E, in, out] and `bias` [E, out]."""

    def __init__(self, name: str, config: ModelConfig, *, rngs, scale: float = 1.0):
        shape = (config.num_experts, config.embed_dim, config.mlp_dim)
        if name == "down":
            shape = (config.num_experts, config.mlp_dim, config.embed_dim)
        std = config.init_scale * scale / math.sqrt(shape[1])
        noise = jax.random.normal(rngs.params(), shape, jnp.float32)
        self.kernel = nnx.Param(std * noise, axes=AXES[name]["kernel"])
        if config.has_bias("mlp"):
            zeros = jnp.zeros((shape[0], shape[2]), jnp.float32)
            self.bias = nnx.Param(zeros, axes=AXES[name]["bias"])


class Experts(nnx.Module):
    """As many MLPs as there are experts (see layers.MLP)."""

    def __init__(self, config: ModelConfig, *, rngs, out_scale: float):
        self.config = config
        self.up = Stacked("up", config, rngs=rngs)
        if config.is_gated:
            self.gate = Stacked("gate", config, rngs=rngs)
        self.down = Stacked("down", config, rngs=rngs, scale=out_scale)

    def __call__(self, x_BTD, routes: Routes):
        """Return the sum of each token's experts by their weights, in x's dtype.

        Devices that cut both the rows and the experts show each other their tokens:
        without a capacity all of them, and every device does what its own experts take;
        with one, what an expert takes goes to its device and back. What a weight's
        embed dim is cut over is fetched; where its mlp dim is cut, devices add up.
        """
        layers = {"up": self.up, "down": self.down}
        if self.config.is_gated:
            layers["gate"] = self.gate
        kinds = ("kernel", "bias") if self.config.has_bias("mlp") else ("kernel",)
        keys = [(name, kind) for name in layers for kind in kinds]
        weights = [getattr(layers[name], kind).get_value() for name, kind in keys]
        routed = [x for x in routes if x is not None]
        is_by_rows = num_parts(len(x_BTD)) > 1
        cut = _cut(is_by_rows=is_by_rows)

        def do(x_BTD, *arrays):
            given = (*arrays[: len(routed)], None)[:3]
            held = {name: {} for name in layers}
            for (name, kind), weight in zip(keys, arrays[len(routed) :], strict=True):
                held[name][kind] = weight
            return _mixed(x_BTD, Routes(*given), held, self.config, cut)[None]

        if not cut.is_cut:
            return do(x_BTD, *routed, *weights)[0]
        weights = list(map(whole, weights))
        batch = ("batch" if is_by_rows else None, None, None)
        axes = [AXES[name][kind] for name, kind in keys]
        in_axes = (batch, *[batch] * len(routed), *axes)
        out_axes = (cut.added or None, *batch)
        y_PBTD = per_device(do, in_axes, out_axes)(x_BTD, *routed, *weights)
        return jnp.sum(y_PBTD, axis=0)


class _Cut(NamedTuple):
    """The mesh axes over which something is cut, by what becomes of it.

    shown: of the experts, over which rows are cut too; experts: all of theirs; added:
    over which each device has a part of the sum; embed, mlp: fetched.
    """

    is_cut: bool
    shown: tuple[str, ...]
    experts: tuple[str, ...]
    added: tuple[str, ...]
    embed: tuple[str, ...]
    mlp: tuple[str, ...]


def _cut(*, is_by_rows: bool) -> _Cut:
    rows = cut_over("batch") if is_by_rows else ()
    experts, embed, mlp = map(cut_over, ("expert", "embed", "mlp"))
    shown = tuple(a for a in experts if a in rows)
    hidden = tuple(a for a in (*experts, *mlp) if a not in rows)
    return _Cut(
        is_cut=bool(cut_over("batch") or experts or embed or mlp),
        shown=shown,
        experts=experts,
        added=hidden,
        embed=embed,
        mlp=tuple(a for a in mlp if a in rows),
    )


def _mixed(x_BTD, routes, weights, config, cut):
    """Return one device's part of the sum, of the rows that it has."""
    first = 0
    kernel = weights["up"]["kernel"]
    held = len(kernel.whole if isinstance(kernel, Eight) else kernel)
    if cut.experts:
        first = jax.lax.axis_index(cut.experts) * held
    how = {"config": config, "cut": cut}
    if routes.slots_BTJ is None:
        return _all_taken(x_BTD, routes, weights, first, held, **how)
    return _some_taken(x_BTD, routes, weights, first, held, **how)


# ---- without a capacity


def _all_taken(x_BTD, routes, weights, first, held, *, config, cut):
    shown = (x_BTD, routes.experts_BTJ, routes.weights_BTJ)
    if cut.shown:
        shown = (jax.lax.all_gather(x, cut.shown, tiled=True) for x in shown)
    x_BTD, experts_BTJ, weights_BTJ = shown
    chosen = experts_BTJ.shape[-1]
    x_ZD, experts_M, weights_ZJ = (
        x_BTD.reshape(-1, x_BTD.shape[-1]),
        experts_BTJ.reshape(-1) - first,
        weights_BTJ.reshape(-1, chosen),
    )
    is_own_M = (experts_M >= 0) & (experts_M < held)
    experts_M = jnp.where(is_own_M, experts_M, held)
    order_M = jnp.argsort(experts_M)
    back_ZJ = jnp.argsort(order_M).reshape(-1, chosen)
    # Of the experts here a token takes no more than there are: the others sort behind.
    order_M = order_M[: len(x_ZD) * min(chosen, held)]
    sorted_M = jnp.minimum(experts_M[order_M], held - 1)
    sizes_E = jnp.sum(experts_M[:, None] == jnp.arange(held), axis=0)
    rows_MD = _taken(x_ZD, order_M // chosen, back_ZJ)
    rows_MD = _mlp(rows_MD, weights, sizes_E, sorted_M, config, cut)
    y_MD = _taken(rows_MD, back_ZJ.reshape(-1), order_M[:, None])
    y_ZJD = y_MD.reshape(*back_ZJ.shape, -1).astype(jnp.float32)
    weights_ZJ = jnp.where(is_own_M.reshape(-1, chosen), weights_ZJ, 0)
    y_ZD = jnp.sum(y_ZJD * weights_ZJ[..., None], axis=1)
    y_BTD = y_ZD.astype(x_BTD.dtype).reshape(x_BTD.shape)
    if cut.shown:
        y_BTD = jax.lax.psum_scatter(y_BTD, cut.shown, tiled=True)
    return y_BTD


@jax.custom_vjp
def _taken(x_RD, index_M, readers_RJ):
    """Return the rows of `x` at `index`; 0 where it is past the last.

    readers: which of the results read a row, past the last of them none. Its gradient
    is then a sum of rows that are read, where one that is added to must go row by row.
    """
    del readers_RJ
    return x_RD.at[index_M].get(mode="fill", fill_value=0)


def _taken_forward(x_RD, index_M, readers_RJ):
    return _taken(x_RD, index_M, readers_RJ), readers_RJ


def _taken_backward(readers_RJ, d_MD):
    d_RJD = d_MD.at[readers_RJ].get(mode="fill", fill_value=0)
    d_RD = jnp.sum(d_RJD.astype(jnp.float32), axis=1)
    return d_RD.astype(d_MD.dtype), None, None


_taken.defvjp(_taken_forward, _taken_backward)


# ---- with a capacity


def _some_taken(x_BTD, routes, weights, first, held, *, config, cut):
    experts, chosen = config.num_experts, config.num_experts_per_token
    size = group_size(x_BTD.shape[1])
    places = num_slots(size, experts, chosen, config.expert_capacity)
    experts_gSJ, weights_gSJ, slots_gSJ = (x.reshape(-1, size, chosen) for x in routes)
    at_gSJ = jnp.where(
        experts_gSJ < experts, experts_gSJ * places + slots_gSJ, experts * places
    )
    own = experts * places
    if not cut.shown:  # every device has all tokens, for its own experts
        at_gSJ, own = at_gSJ - first * places, held * places
    is_at_gSJc = at_gSJ[..., None] == jnp.arange(own)  # c: C places of E experts
    dtype = jnp.dtype(config.dtype)
    send_gcS = jnp.swapaxes(jnp.any(is_at_gSJc, axis=2), 1, 2).astype(dtype)
    x_gSD = x_BTD.reshape(-1, size, x_BTD.shape[-1])
    x_gcD = matmul(send_gcS, x_gSD, dtype).astype(x_BTD.dtype)
    x_EMD = _by_expert(x_gcD, places)
    if cut.shown:
        x_EMD = jax.lax.all_to_all(x_EMD, cut.shown, 0, 1, tiled=True)
    of_M = jnp.repeat(jnp.arange(held), x_EMD.shape[1])
    rows_MD = x_EMD.reshape(-1, x_EMD.shape[-1])
    rows_MD = _mlp(rows_MD, weights, None, of_M, config, cut)
    y_EMD = rows_MD.reshape(x_EMD.shape)
    if cut.shown:
        y_EMD = jax.lax.all_to_all(y_EMD, cut.shown, 1, 0, tiled=True)
    y_gcD = _by_group(y_EMD, places)
    weigh_gSc = jnp.sum(jnp.where(is_at_gSJc, weights_gSJ[..., None], 0), axis=2)
    y_gSD = matmul(weigh_gSc, y_gcD, dtype)
    return y_gSD.astype(x_BTD.dtype).reshape(x_BTD.shape)


def _by_expert(x_gcD, places):
    groups, _, dim = x_gcD.shape
    x_EgCD = jnp.swapaxes(x_gcD.reshape(groups, -1, places, dim), 0, 1)
    return x_EgCD.reshape(len(x_EgCD), -1, dim)


def _by_group(x_EMD, places):
    experts, _, dim = x_EMD.shape
    x_gECD = jnp.swapaxes(x_EMD.reshape(experts, -1, places, dim), 0, 1)
    return x_gECD.reshape(len(x_gECD), -1, dim)


# ---- both


def _mlp(x_MD, weights, sizes_E, experts_M, config, cut):
    """Return what the expert of each row says of it.

    sizes_E: how many rows each expert here has; None: all as many. experts_M: whose
    each row is.
    """
    dtype, out_dtype = jnp.dtype(config.dtype), jnp.dtype(config.residual_dtype)

    def linear(name, x):
        kernel, fetched = weights[name]["kernel"], (cut.embed, cut.mlp)
        fetched = fetched[::-1] if name == "down" else fetched
        y = grouped.product(x, kernel, sizes_E, dtype, fetched)
        if config.has_bias("mlp"):
            y = y + bias(name)[experts_M]
        return y.astype(out_dtype)

    def bias(name):
        bias_EN = weights[name]["bias"]
        if name != "down" and cut.mlp:
            return jax.lax.all_gather(bias_EN, cut.mlp, axis=1, tiled=True)
        inner = tuple(a for a in cut.added if a not in cut.experts)
        if name == "down" and inner:  # once, not by every device that adds its part
            return jnp.where(jax.lax.axis_index(inner) == 0, bias_EN, 0)
        return bias_EN

    up_MF = checkpoint_name(linear("up", x_MD), "mlp_up")
    if not config.is_gated:
        return linear("down", ACTIVATIONS[config.activation](up_MF))
    gate_MF = checkpoint_name(linear("gate", x_MD), "mlp_gate")
    return linear("down", GATED_ACTIVATIONS[config.activation](gate_MF, up_MF))
