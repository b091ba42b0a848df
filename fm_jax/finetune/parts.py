"""A model's params in two parts, what trains and what is frozen, and back again."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax import products, trees
from fm_jax.finetune import lora as adapters
from fm_jax.finetune import rules
from fm_jax.finetune.rules import BLOCKS
from fm_jax.generation import quantise
from fm_jax.models.zoo import Model
from fm_jax.products import Adapted, Eight
from fm_jax.sections import LoraConfig


@dataclasses.dataclass(frozen=True, eq=False)
class Parts:
    """The functions of a `Tuning`, over flat `{path: leaf}` dicts of both parts.

    starts: by path from which layer on it trains; rates: the multipliers of all layers.
    """

    model: Model
    lora: LoraConfig
    targets: tuple[str, ...]
    starts: Mapping[str, int]
    rates: Mapping[str, np.ndarray]

    def stacks(self) -> list[tuple[int, int]]:
        """Return the first layer of each stack, and the first above it."""
        num_layers = self.model.config.num_layers
        of_blocks = {n for path, n in self.starts.items() if path.startswith(BLOCKS)}
        cuts = sorted({0, num_layers} | of_blocks)
        return list(itertools.pairwise(cuts))

    def split(self, params: dict, rng: jax.Array, exact: bool = False):
        """Return trained and frozen; exact: round nothing but kernels in eight bits."""
        trained, frozen = {}, {}
        for number, (path, leaf) in enumerate(trees.leaves_by_path(params).items()):
            start = self.starts[path]
            for name, (low, high) in self.held(path):
                piece = _cut(leaf, low, high) if path.startswith(BLOCKS) else leaf
                frozen[name] = self.held_as(path, piece, exact=exact)
            if path in self.targets:
                draw = jax.random.fold_in(rng, number)
                rank = self.lora.rank
                update = adapters.drawn(draw, path, leaf[start:], rank)
                trained |= {_of_update(path, kind): x for kind, x in update.items()}
            elif not path.startswith(BLOCKS) and not start:
                trained[path] = leaf
            elif path.startswith(BLOCKS) and start < len(leaf):
                trained[path] = _cut(leaf, start, len(leaf))
        return trees.nested(trained), trees.nested(frozen)

    def join(self, trained: dict, frozen: dict, rng: jax.Array | None = None) -> dict:
        """Return params as the model takes them for training; rng: of the dropout."""
        trained = trees.leaves_by_path(trained)
        frozen = trees.leaves_by_path(frozen, is_leaf=quantise.is_eight)
        params, stacks = {}, [{} for _ in self.stacks()]
        num_layers, scale = self.model.config.num_layers, adapters.scale(self.lora)
        rngs = None
        if rng is not None and self.lora.dropout:
            rngs = [jax.random.fold_in(rng, n) for n in range(len(self.starts))]
        for number, path in enumerate(self.starts):
            if not path.startswith(BLOCKS):
                params[path] = trained[path] if path in trained else frozen[path]
                continue
            start = self.starts[path]
            for (low, high), stack in zip(self.stacks(), stacks, strict=True):
                held = frozen.get(self.name(path, low))
                of = low - start, high - start
                if low < start:
                    leaf = held
                elif path in self.targets:
                    a, b = (_cut(trained[_of_update(path, k)], *of) for k in "ab")
                    keys = rngs and jax.random.split(rngs[number], num_layers)[low:high]
                    leaf = Adapted(held, a, b, keys, scale, self.lora.dropout)
                else:
                    leaf = _cut(trained[path], *of)
                stack[path.removeprefix(BLOCKS)] = leaf
        stacks = tuple(map(trees.nested, stacks))
        blocks = stacks if len(stacks) > 1 else stacks[0]
        return trees.nested(params) | {"blocks": blocks}

    def merged(self, trained: dict, frozen: dict) -> dict:
        """Return plain params in float32."""
        trained = trees.leaves_by_path(trained)
        frozen = trees.leaves_by_path(frozen, is_leaf=quantise.is_eight)
        params = {}
        for path, start in self.starts.items():
            pieces = [products.whole(frozen[name]) for name, _ in self.held(path)]
            pieces = [piece.astype(jnp.float32) for piece in pieces]
            if path in self.targets:
                a, b = (trained[_of_update(path, kind)] for kind in "ab")
                leaf = _joined(pieces)
                change = adapters.update(path, a, b, adapters.scale(self.lora))
                pieces = [*([leaf[:start]] if start else []), leaf[start:] + change]
            elif path in trained:
                pieces.append(trained[path])
            params[path] = _joined(pieces)
        return trees.nested(params)

    # ---- what is frozen

    def held(self, path: str) -> list[tuple[str, tuple[int, int]]]:
        """Return the names of a leaf's frozen pieces, and the layers of each."""
        start = self.starts[path]
        if not path.startswith(BLOCKS):
            return [(path, (0, 0))] if start else []
        return [
            (self.name(path, low), (low, high))
            for low, high in self.stacks()
            if low < start or path in self.targets
        ]

    def name(self, path: str, low: int) -> str:
        """Return the name of a leaf's frozen piece in the stack from layer `low` on."""
        if len(self.stacks()) == 1:
            return path
        return f"{BLOCKS}{low}/{path.removeprefix(BLOCKS)}"

    def is_eight(self, path: str) -> bool:
        """Return whether a leaf is held in eight bits: a kernel of a block's product.

        The head is not, which is more of a table.
        """
        is_product = quantise.summed_dims(path) is not None
        return self.lora.base == "int8" and is_product and path.startswith(BLOCKS)

    def held_as(self, path: str, leaf: jax.Array, *, exact: bool) -> jax.Array | Eight:
        """Return a frozen piece as it is held."""
        if self.is_eight(path):
            return quantise.quantised(leaf, self.summed(path))
        if exact:
            return leaf
        return leaf.astype(quantise.used_dtype(self.model.config, path))

    def summed(self, path: str) -> tuple[int, ...]:
        """Return the dims that a stacked kernel's product sums over."""
        return tuple(1 + dim for dim in quantise.summed_dims(path))

    def frozen_axes(self) -> dict:
        """Return the logical axes of what is frozen; of a scale those that it has."""
        found = {}
        for path, axes in _axes_by_path(self.model.axes).items():
            held = axes
            if self.is_eight(path):
                summed = self.summed(path)
                ones = (None if n in summed else a for n, a in enumerate(axes))
                held = Eight(axes, tuple(ones))
            found |= {name: held for name, _ in self.held(path)}
        return trees.nested(found)

    # ---- what trains

    def trained(self) -> list[tuple[str, str]]:
        """Return the path of each trained leaf, and of what it belongs to."""
        found = []
        for path, start in self.starts.items():
            if path in self.targets:
                found += [(_of_update(path, kind), path) for kind in "ab"]
            elif start < np.size(self.rates[path]):
                found.append((path, path))
        return found

    def axes(self) -> dict:
        return trees.nested(
            {name: self.axes_of(name, path) for name, path in self.trained()}
        )

    def axes_of(self, name: str, path: str) -> tuple:
        """Return the logical axes of a trained leaf."""
        axes = _axes_by_path(self.model.axes)[path]
        if path in self.targets:
            axes = adapters.axes(path, axes)[name.rsplit("/", maxsplit=1)[-1]]
        return axes

    def multipliers(self) -> dict | None:
        """Return those of the learning rate, None where all are 1."""
        found = {
            name: self.by_layer(name, path, self.rates[path])
            for name, path in self.trained()
        }
        if all(np.all(values == 1) for values in found.values()):
            return None
        return trees.nested(found)

    def gate(self, every: int) -> Callable:
        """Return the gate that opens a layer more every so many steps (1801.06146).

        The top block and what is above it are open at step 0, the embeddings come last.
        """
        num_layers = self.model.config.num_layers
        opens = {}
        for name, path in self.trained():
            stacked = np.size(self.rates[path]) if path.startswith(BLOCKS) else 0
            heights = np.array(rules.heights(path, stacked, num_layers))
            at = every * (heights if stacked else heights[0])
            opens[name] = self.by_layer(name, path, at)

        def open_at(step):
            return trees.nested(
                {name: jnp.float32(step >= at) for name, at in opens.items()}
            )

        return open_at

    def by_layer(self, name: str, path: str, values: np.ndarray):
        """Return what is given for each layer as what broadcasts to a trained leaf.

        Where all layers have the same, that.
        """
        values = np.atleast_1d(values)[self.starts[path] :]
        if np.all(values == values[0]):
            return values[0]
        return values.reshape(-1, *(1,) * (len(self.axes_of(name, path)) - 1))


def _cut(leaf: jax.Array, low: int, high: int) -> jax.Array:
    return leaf if (low, high) == (0, len(leaf)) else leaf[low:high]


def _joined(pieces: list[jax.Array]) -> jax.Array:
    return jnp.concatenate(pieces) if len(pieces) > 1 else pieces[0]


def _of_update(path: str, kind: str) -> str:
    return f"lora/{path.removesuffix('kernel')}{kind}"


def _axes_by_path(axes: dict) -> dict[str, tuple]:
    return trees.leaves_by_path(axes, is_leaf=lambda x: isinstance(x, tuple))
