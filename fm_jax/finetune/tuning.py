"""What of a model trains, and how the rest is held.

Trained parameters stay float32 in the tree that they have in the model, less the lower
layers of those of which only upper ones train. The rest is held frozen, in the dtype
that the model rounds it to, or kernels in eight bits (in the spirit of QLoRA, arXiv
2305.14314), in as many stacks of layers as there are places where training begins.
"""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from fm_jax import trees
from fm_jax.finetune import lora as adapters
from fm_jax.finetune import rules
from fm_jax.finetune.parts import Parts
from fm_jax.finetune.rules import BLOCKS
from fm_jax.models.zoo import Model
from fm_jax.sections import FinetuneConfig, LoraConfig


@dataclasses.dataclass(frozen=True, eq=False)  # hashed as an object: static in jit
class Tuning:
    """What of a model's params trains, and how the two parts make them again.

    `split(params, rng, exact=False) -> (trained, frozen)`: rng draws updates of low
    rank; exact: what is frozen is not rounded, but for what is in eight bits.
    `join(trained, frozen, rng=None)` gives params as `model` takes them, rng the
    dropout. `merged(trained, frozen)` gives plain params, float32. `axes` and
    `abstract` are those of trained, `frozen_axes` and `frozen_abstract` of frozen as it
    is held. `multipliers` of the learning rate, like trained, are None where all are 1;
    `gate(step)`, like trained, is 1 for what trains at that step, None where all does.
    """

    model: Model
    axes: dict
    abstract: dict
    frozen_axes: dict
    frozen_abstract: dict
    multipliers: dict | None
    gate: Callable | None
    split: Callable
    join: Callable
    merged: Callable
    lines: Callable


def whole(model: Model) -> Tuning:
    """Return the tuning under which everything trains."""
    return Tuning(
        model=model,
        axes=model.axes,
        abstract=model.abstract,
        frozen_axes={},
        frozen_abstract={},
        multipliers=None,
        gate=None,
        split=lambda params, rng, exact=False: (params, {}),
        join=lambda trained, frozen, rng=None: trained,
        merged=lambda trained, frozen: trained,
        lines=lambda: _lines(model, model.abstract, {}, None),
    )


def plan(model: Model, finetune: FinetuneConfig, lora: LoraConfig) -> Tuning:
    """Return what a config trains of a model.

    A path rule or a target is in the terms of `rules.names`: of a kernel with an update
    the update is what a rule is about. Under probe the classifier's head is of trained
    though no step moves it: another hand does.

    Raises UserError for rules and targets that find nothing, and where nothing is left
    to train.
    """
    if finetune.method == "none":
        return whole(model)  # which a checkpoint can hold, with nothing to go back for
    leaves = trees.leaves_by_path(model.abstract)
    is_lora = finetune.method == "lora"
    targets = adapters.targets(leaves, lora) if is_lora else ()
    num_layers = model.config.num_layers
    layers = {path: num_layers * path.startswith(BLOCKS) for path in leaves}
    rates = rules.multipliers(layers, finetune, targets=targets)
    is_plain = all(np.all(rate == 1) for rate in rates.values())
    if is_plain and not targets and not finetune.unfreeze_every:
        return whole(model)
    starts = {path: _start(rate) for path, rate in rates.items()}
    if finetune.method == "probe":
        ours = {path: 0 for path in leaves if path.startswith(rules.FROM_ANEW)}
        starts |= ours
    # An update that trains nowhere is none.
    targets = tuple(p for p in targets if starts[p] < num_layers)
    if not is_lora:
        lora = dataclasses.replace(lora, base="compute")
    parts = Parts(model, lora, targets, starts, rates)
    trained, frozen = jax.eval_shape(parts.split, model.abstract, jax.random.key(0))
    gate = parts.gate(finetune.unfreeze_every) if finetune.unfreeze_every else None
    return Tuning(
        model=model,
        axes=parts.axes(),
        abstract=trained,
        frozen_axes=parts.frozen_axes(),
        frozen_abstract=frozen,
        multipliers=parts.multipliers(),
        gate=gate,
        split=parts.split,
        join=parts.join,
        merged=parts.merged,
        lines=lambda: _lines(model, trained, frozen, parts.multipliers()),
    )


def _start(rate: np.ndarray) -> int:
    """Return the lowest layer that trains, as many as there are if none does.

    Of a leaf without layers 0 if it trains, else 1.
    """
    trains = np.atleast_1d(rate) > 0
    return int(np.argmax(trains)) if trains.any() else len(trains)


def _lines(model, trained, frozen, multipliers) -> list[str]:
    """Return what trains, for the log."""
    total = _size(model.abstract)
    part = 100 * _size(trained) / total
    lines = [f"trains {_size(trained):,} parameters, {part:.3g}% of {total:,}"]
    if "lora" in trained:
        paths = trees.leaves_by_path(trained["lora"])
        kernels = sorted({p.rsplit("/", 1)[0].removeprefix(BLOCKS) for p in paths})
        lines.append(f"updates of low rank: {', '.join(kernels)}")
    if multipliers is not None:
        values = np.concatenate([np.ravel(x) for x in jax.tree.leaves(multipliers)])
        low, high = values.min(), values.max()
        lines.append(f"learning rates times {low:.3g} to {high:.3g}")
    leaves = jax.tree.leaves(frozen)
    if leaves:
        held = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) / 2**20
        kinds = ", ".join(sorted({str(leaf.dtype) for leaf in leaves}))
        lines.append(f"frozen: {held:,.1f} MiB ({kinds})")
    return lines


def _size(tree: dict) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
