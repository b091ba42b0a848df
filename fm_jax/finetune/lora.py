"""Updates of low rank beside frozen kernels (LoRA, arXiv 2106.09685).

A kernel W gives way to W + s a.b, of which a and b train; `products.linear` multiplies
by the parts, so that W needs no gradient and is never copied. s is alpha / R, or
alpha / sqrt(R), by which the update does not shrink as R grows (rsLoRA, 2312.03732).

qwix, which rewrites a model's products from outside, is not used: its LoRA fails under
`jax.lax.scan` over stacked layers, and its int8 on parameters that are no nnx.Linear's.
"""

import math
import re
from collections.abc import Collection

import jax
import jax.numpy as jnp

from fm_jax.errors import UserError
from fm_jax.finetune import rules
from fm_jax.generation import quantise
from fm_jax.products import Adapted
from fm_jax.sections import LoraConfig

ABLE = r"^blocks/.*(query|key|value|out|gate|up|down)/kernel$"
NEVER = r"/experts/|/router/"


def targets(paths: Collection[str], lora: LoraConfig) -> tuple[str, ...]:
    """Return the paths of the kernels that have an update.

    Raises UserError where there are none, or the pattern is no regular expression.
    """
    try:
        wanted = re.compile(lora.targets)
    except re.error as error:
        raise UserError(
            f"lora.targets must be a regular expression; got {lora.targets!r} "
            f"({error})."
        ) from error
    able = [p for p in paths if re.search(ABLE, p) and not re.search(NEVER, p)]
    found = tuple(filter(wanted.search, able))
    if found:
        return found
    others = [path for path in paths if wanted.search(path)]
    if others:
        raise UserError(
            f"lora.targets must find kernels that can have an update; got "
            f"{lora.targets!r}, which finds only {', '.join(others[:3])}. Those of "
            "attention, of an MLP and of a shared expert can; experts, routers, "
            "embeddings and the head cannot."
        )
    raise UserError(
        f"lora.targets must find kernels; got {lora.targets!r}. Nearest: "
        f"{rules.nearest(lora.targets, able)}."
    )


def scale(lora: LoraConfig) -> float:
    """Return what the product a.b is multiplied by."""
    by = math.sqrt(lora.rank) if lora.scaling == "rslora" else lora.rank
    return lora.alpha / by


def num_in(path: str) -> int:
    """Return over how many dims of an unstacked kernel its product sums."""
    return len(quantise.summed_dims(path))


def drawn(rng: jax.Array, path: str, kernel: jax.Array, rank: int) -> dict:
    """Return the update of a stacked kernel [L, *in, *out] before training, float32.

    a [L, *in, R] uniform within 1 / sqrt(fan in), b [L, R, *out] zero: nothing changes.
    """
    split = 1 + num_in(path)
    lead, out = kernel.shape[:split], kernel.shape[split:]
    most = 1 / math.sqrt(math.prod(lead[1:]))
    a = jax.random.uniform(rng, (*lead, rank), jnp.float32, -most, most)
    return {"a": a, "b": jnp.zeros((lead[0], rank, *out), jnp.float32)}


def axes(path: str, of_kernel: tuple[str | None, ...]) -> dict:
    """Return the logical axes of an update from those of its stacked kernel."""
    split = 1 + num_in(path)
    a, out = of_kernel[:split], of_kernel[split:]
    return {"a": (*a, None), "b": (of_kernel[0], None, *out)}


def update(path: str, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """Return scale * a.b of every layer, [L, *in, *out]."""
    shape = (*a.shape[:-1], *b.shape[2:])
    a_LKR = a.reshape(len(a), -1, a.shape[-1])
    b_LRN = b.reshape(len(b), a.shape[-1], -1)
    product = jnp.matmul(a_LKR, b_LRN, precision="highest")
    return scale * product.reshape(shape)


def without(params: dict) -> dict:
    """Return joined params without their updates: the base, as it is held."""
    is_adapted = lambda leaf: isinstance(leaf, Adapted)  # noqa: E731
    return jax.tree.map(
        lambda leaf: leaf.base if is_adapted(leaf) else leaf, params, is_leaf=is_adapted
    )
