"""Updates of low rank: those of our kernels against those of their modules, exactly.

Theirs are A [r, in] and B [out, r], whichever way round the weight is. One of their
modules may hold several kernels of ours. Then A is their a's one below the other, and
B has each one's b in its own rows and columns, zero elsewhere; or, where all have the
same a, A is that and B their b's. Nothing is calculated but alpha, so that it is exact
both ways.
"""

import dataclasses
import math
import re

import numpy as np

from fm_jax.errors import UserError
from fm_jax.finetune import lora
from fm_jax.hf import mapping
from fm_jax.hf.mapping import Entry
from fm_jax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Low:
    """An update of one of their modules: float32 a_RI [r, in], b_OR [out, r], alpha."""

    a_RI: np.ndarray
    b_OR: np.ndarray
    alpha: float


@dataclasses.dataclass(frozen=True)
class Update:
    """An update of a stacked kernel: a [L, *in, R] and b [L, R, *out], float32.

    first: the layer that the first of L is of; those below have none.
    """

    a: np.ndarray
    b: np.ndarray
    first: int = 0


@dataclasses.dataclass(frozen=True)
class Module:
    """A product of theirs, and which kernels of ours it holds at which layer.

    columns: which of a kernel's summed dims, flat, each of theirs is. rows: for each
    kernel the rows that its other dims, flat, have in theirs. is_turned: whether the
    weight is [in, out].
    """

    name: str
    layer: int
    paths: tuple[str, ...]
    columns: np.ndarray
    rows: tuple[np.ndarray, ...]
    is_turned: bool


def modules(family, config: ModelConfig) -> dict[str, Module]:
    """Return the products of a family's model that may have an update, by name."""
    found, orders = {}, {}
    for entry in mapping.entries(family, config).values():
        paths = tuple(part.path for part in entry.parts)
        if not all(map(is_able, paths)):
            continue
        if entry.blocks not in orders:
            orders[entry.blocks] = _order(entry)
        name = entry.name.removesuffix(".weight")
        layer = entry.parts[0].index[0]
        found[name] = Module(name, layer, paths, *orders[entry.blocks])
    return found


def is_able(path: str) -> bool:
    """Return whether a parameter is a kernel that may have an update."""
    return bool(re.search(lora.ABLE, path)) and not re.search(lora.NEVER, path)


def theirs(
    updates: dict[str, Update], known: dict[str, Module], *, alpha: float, root: bool
) -> dict[str, Low]:
    """Return updates of ours, by path, as those of their modules.

    alpha: of each kernel's update. root: whether the scale is alpha / sqrt(rank).
    """
    found, left = {}, set(updates)
    for name, module in known.items():
        parts = [_part(updates.get(path), module.layer) for path in module.paths]
        left -= {*module.paths}
        there = [part for part in parts if part is not None]
        if not there:
            continue
        rank = there[0][0].shape[1]
        a_every = [_a(part, module, rank) for part in parts]
        is_same = len(there) == len(parts) and all(
            np.array_equal(a, a_every[0]) for a in a_every
        )
        count = 1 if is_same else len(parts)
        b_OR = np.zeros((sum(map(len, module.rows)), count * rank), np.float32)
        for k, (part, rows) in enumerate(zip(parts, module.rows, strict=True)):
            at = 0 if is_same else k * rank
            if part is not None:
                b_OR[rows, at : at + rank] = part[1].T
        a_RI = a_every[0] if is_same else np.concatenate(a_every)
        times = math.sqrt(count) if root else count
        found[name] = Low(np.ascontiguousarray(a_RI), b_OR, alpha * times)
    assert not left, left
    return found


def ours(
    given: dict[str, Low], known: dict[str, Module], shapes: dict, *, rank: int
) -> dict[str, Update]:
    """Return updates of their modules as those of our kernels, by path.

    shapes: of each stacked kernel. A kernel in a module of several that has no update
    of its own, by zeros in both parts, is left out. Layers below the first that has
    any have none. Raises UserError, which names a module, on other ranks and where a
    later layer has none.
    """
    pieces: dict[str, dict[int, tuple]] = {}
    for name, low in given.items():
        module = known[name]
        for path, a_IR, b_RO in _parts(low, module, rank):
            pieces.setdefault(path, {})[module.layer] = a_IR, b_RO
    found, num_layers = {}, shapes[next(iter(pieces))][0]
    first = min(layer for layers in pieces.values() for layer in layers)
    for path, layers in pieces.items():
        _, *dims = shapes[path]
        there = range(first, num_layers)
        lacking = [layer for layer in there if layer not in layers]
        if lacking:
            names = [m.name for m in known.values() if path in m.paths]
            raise UserError(
                "an adapter must have the same modules in every layer from its first "
                f"on; got no update of {names[lacking[0]]!r}."
            )
        at = lora.num_in(path)
        a = np.stack([layers[layer][0] for layer in there])
        b = np.stack([layers[layer][1] for layer in there])
        found[path] = Update(
            a.reshape(len(there), *dims[:at], rank),
            b.reshape(len(there), rank, *dims[at:]),
            first,
        )
    return found


def _order(entry: Entry) -> tuple[np.ndarray, tuple[np.ndarray, ...], bool]:
    """Return a Module's columns, rows and is_turned: numbered entries are looked up."""
    inside, outside, sizes = [], [], []
    start = 0
    for part in entry.parts:
        at = lora.num_in(part.path)
        num_in, num_out = math.prod(part.shape[:at]), math.prod(part.shape[at:])
        numbers = np.arange(num_in, dtype=np.int32)[:, None]
        inside.append(np.broadcast_to(numbers, (num_in, num_out)).reshape(part.shape))
        numbers = start + np.arange(num_out, dtype=np.int32)
        outside.append(np.broadcast_to(numbers, (num_in, num_out)).reshape(part.shape))
        sizes.append(num_out)
        start += num_out
    inside_OI, outside_OI = entry.join(inside), entry.join(outside)
    is_turned = inside_OI.shape[0] != start or not (inside_OI == inside_OI[:1]).all()
    if is_turned:
        inside_OI, outside_OI = inside_OI.T, outside_OI.T
    columns, numbers = inside_OI[0].copy(), outside_OI[:, 0].copy()
    assert (inside_OI == columns).all(), entry.name
    assert (outside_OI == numbers[:, None]).all(), entry.name
    rows = np.split(np.argsort(numbers), np.cumsum(sizes)[:-1])
    return columns, tuple(rows), is_turned


def _part(update: Update | None, layer: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Return a layer's a [in, R] and b [R, out], None where it has no update."""
    if update is None or layer < update.first:
        return None
    a, b = update.a[layer - update.first], update.b[layer - update.first]
    return a.reshape(-1, a.shape[-1]), b.reshape(len(b), -1)


def _a(part, module: Module, rank: int) -> np.ndarray:
    """Return a part's a as theirs, [R, in]; zeros where it has none."""
    if part is None:
        return np.zeros((rank, len(module.columns)), np.float32)
    return part[0].T[:, module.columns]


def _parts(low: Low, module: Module, rank: int):
    """Yield the path, a [in, R] and b [R, out] of each kernel in a module."""
    count = len(module.paths)
    is_own = len(low.a_RI) == count * rank and count > 1 and _is_apart(low, module)
    if len(low.a_RI) != rank and not is_own:
        raise UserError(
            f"an adapter's modules must have one rank, {rank}, or in one for {count} "
            f"kernels a part for each; got {len(low.a_RI)} for {module.name!r}."
        )
    a_RI = np.empty_like(low.a_RI)
    a_RI[:, module.columns] = low.a_RI
    for k, (path, rows) in enumerate(zip(module.paths, module.rows, strict=True)):
        here = slice(k * rank, (k + 1) * rank) if is_own else slice(None)
        a_IR, b_RO = a_RI[here].T, low.b_OR[rows, here].T
        if not is_own or a_IR.any() or b_RO.any():
            yield path, a_IR, b_RO


def _is_apart(low: Low, module: Module) -> bool:
    """Return whether each kernel's rows of B are zero but in columns of its own."""
    rank = len(low.a_RI) // len(module.paths)
    for k, rows in enumerate(module.rows):
        b_OR = low.b_OR[rows].copy()
        b_OR[:, k * rank : (k + 1) * rank] = 0
        if b_OR.any():
            return False
    return True
