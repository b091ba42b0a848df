"""The text of an optimized HLO module: its computations, instructions and shapes.

No jax here, so that a program compiled for one machine can be read on any other.
"""

import collections
import dataclasses
import functools
import itertools
import math
import re
from typing import NamedTuple

import numpy as np

# An instruction is a line, in a computation that opens with a line ending in "{".
_OP = re.compile(r"\s+(ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\(")
_NAME = re.compile(r"%([\w.\-]+)")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_CALLEES = re.compile(
    r"\b(?:calls|to_apply|body|condition|\w+_computations?)=(%[\w.\-]+|\{[^}]*\})"
)
_GROUPS = re.compile(
    r"((?:replica_groups|source_target_pairs)="
    r"(?:mesh\[[^\]]*\](?:, device_ids=\(.*?\))? \{[^}]*\}|\S*))"
)
_COPIES = ("copy", "copy-done", "bitcast", "convert", "reshape")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array's dtype and dims, in XLA's words: `bf16`, `(8, 128)`."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Bytes of the elements, without padding to tiles. A token has none."""
        bits = re.search(r"\d+", self.dtype.replace("pred", "pred8"))
        return -(-math.prod(self.dims) * int(bits[0] if bits else 0) // 8)


class Place(NamedTuple):
    """An array of a result, and its bytes as far as they lie in main memory."""

    array: Array
    bytes: int


@functools.lru_cache(maxsize=4096)
def places(shape: str) -> tuple[Place, ...]:
    """Return the arrays of a shape, those of nested tuples one after the other.

    Memory space S(1) is on the chip of a TPU, whose layouts have tiles, and in the main
    memory of a GPU. Higher ones hold flags and scalars, or are the host's.
    """
    found = []
    for dtype, dims, layout in _ARRAY.findall(shape):
        array = Array(dtype, tuple(ints(dims)))
        space = re.search(r"S\((\d+)\)", layout)
        away = space and (space[1] != "1" or "T(" in layout)
        found.append(Place(array, 0 if away else array.bytes))
    return tuple(found)


def ints(text: str) -> list[int]:
    """Return the whole numbers in a text, signs left out."""
    return [int(found) for found in re.findall(r"\d+", text)]


@dataclasses.dataclass(slots=True)
class Op:
    """One instruction; `kind` is its opcode without the `-start` of an async half."""

    name: str
    opcode: str
    kind: str
    shape: str
    inner: str
    operands: list[str]
    attrs: str

    def attr(self, pattern: str | re.Pattern) -> str:
        """Return what the group of `pattern` finds in the attributes, or ""."""
        found = re.search(pattern, self.attrs)
        return found[1] if found else ""

    def groups(self, devices: int) -> tuple[tuple[int, ...], ...]:
        """Return the groups of a collective among `devices`, or its pairs, sorted."""
        return _groups(self.attr(_GROUPS), devices)


class Body:
    """A computation: its instructions by name, its root, and its module."""

    def __init__(self, module: dict[str, "Body"]):
        self.module = module
        self.ops: dict[str, Op] = {}
        self.root: Op | None = None

    def callees(self, op: Op) -> list["Body"]:
        """Return the computations that `op` calls; of a loop, the test comes first."""
        found = " ".join(_CALLEES.findall(op.attrs))
        return [self.module[name] for name in _NAME.findall(found)]

    def inputs(self, op: Op) -> list[Place]:
        """Return the arrays of all operands, one after the other."""
        return [p for name in op.operands for p in places(self.ops[name].shape)]

    def origin(self, name: str) -> Op:
        """Return the instruction that `name` is a copy of, or that of `name`."""
        op = self.ops[name]
        return self.origin(op.operands[0]) if op.kind in _COPIES else op

    def number(self, name: str) -> int | None:
        """Return the integer constant that `name` is, or None."""
        op = self.origin(name)
        is_number = op.kind == "constant" and re.fullmatch(r"-?\d+", op.inner)
        return int(op.inner) if is_number else None

    def uncast(self, op: Op) -> Op:
        """Return the instruction that `op` is a bitcast of, or `op`."""
        return self.uncast(self.ops[op.operands[0]]) if op.kind == "bitcast" else op

    @functools.cached_property
    def passes(self) -> bool:
        """Whether all that is done here is to pass a parameter on."""
        return self.uncast(self.root).kind == "parameter"

    @functools.cached_property
    def parameters(self) -> dict[int, str]:
        """The names of the parameters by their numbers."""
        ops = self.ops.values()
        return {int(op.inner): op.name for op in ops if op.kind == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[Op]]:
        """The instructions that take what is named, where there are any."""
        users = collections.defaultdict(list)
        for op in self.ops.values():
            for name in dict.fromkeys(op.operands):
                users[name].append(op)
        return users

    @functools.cached_property
    def starts(self) -> bool:
        """Whether a TPU starts a collective here that other computations go on with."""
        return any('"AsyncCollectiveStart"' in op.attrs for op in self.ops.values())

    def continues(self, op: Op) -> bool:
        """Say whether `op` goes on with what was started, and counted, elsewhere.

        A TPU hides a collective behind other work in a chain of fusions: one ends in
        AsyncCollectiveStart, some compute, one ends in AsyncCollectiveDone; the text
        repeats the collective in each.
        """
        if op.opcode.endswith(("-done", "-update")):
            return True
        marks = ("async_collective_fusion_config", '"AsyncCollectiveDone"')
        return not self.starts and any(mark in op.attrs for mark in marks)

    def trips(self, loop: Op) -> int | None:
        """Return how often a loop runs: as XLA noted it, or as its counter says.

        A counter is an element of the loop's state that starts at a constant, has one
        added to it, and is compared with one. On a TPU nothing is noted.
        """
        if known := loop.attr(r'"known_trip_count":\{"n":"(\d+)"'):
            return int(known)
        test, inside = self.callees(loop)
        before, after = self.ops[loop.operands[0]], inside.root
        index, limit, side = _counter(test, test.root)
        way = test.root.attr(r"direction=([LG][TE])")
        if index is None or not way or not before.kind == after.kind == "tuple":
            return None
        start = self.number(before.operands[index])
        add = inside.origin(after.operands[index])
        same, step, _ = _counter(inside, add)
        sign = 1 if (way[0] == "L") == (side == 1) else -1
        if start is None or add.kind != "add" or same != index or step * sign <= 0:
            return None
        return len(range(start, limit + sign * (way[1] == "E"), step))


def parse(text: str) -> tuple[list[Body], Body, int]:
    """Return the computations in order, that of ENTRY, and the number of devices.

    Raises ValueError when the text holds no ENTRY computation.
    """
    module: dict[str, Body] = {}
    entry, body = None, Body(module)
    for line in text.splitlines():
        if line[:1] in ("%", "E") and line.endswith("{"):
            body = module[_NAME.search(line)[1]] = Body(module)
            entry = body if line[0] == "E" else entry
        elif found := _OP.match(line):
            root, name, shape, opcode = found.groups()
            start, stop = found.end(), line.index(")", found.end())
            while line.count("(", start, stop) > line.count(")", start, stop):
                stop = line.index(")", stop + 1)
            inner, kind = line[start:stop], opcode.removesuffix("-start")
            operands = _NAME.findall(inner)
            op = Op(name, opcode, kind, shape, inner, operands, line[stop + 1 :])
            body.ops[name] = op
            body.root = op if root else body.root
        elif line.startswith(('"', "}}")):  # attributes may hold line breaks
            op.attrs += line
    if entry is None:
        raise ValueError(
            "text must be an optimized HLO module with an ENTRY computation; got "
            f"{text[:60]!r}. Pass compiled.as_text()."
        )
    head = text.partition("\n")[0]
    sizes = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", head)
    return list(module.values()), entry, math.prod(map(int, sizes))


def _counter(body: Body, op: Op) -> tuple[int | None, int, int]:
    """Return the element of the state that `op` takes, its constant and whose side."""
    sides = [body.number(name) for name in op.operands]
    others = [body.origin(name) for name in op.operands if body.number(name) is None]
    if len(sides) != 2 or [op.kind for op in others] != ["get-tuple-element"]:
        return None, 0, -1
    side = int(sides[0] is None)
    return int(others[0].attr(r"index=(\d+)")), sides[side], side


@functools.lru_cache(maxsize=4096)
def _groups(attribute: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """Return groups of devices that are written out, as an iota, or as mesh axes."""
    name, _, text = attribute.partition("=")
    if text.startswith("mesh["):
        groups = _mesh_groups(text)
    elif text.startswith("["):
        shape, ids = text.split("<=")
        groups = np.reshape(_iota(ids), ints(shape)).tolist()
    else:
        groups = [ints(group) for group in re.findall(r"\{([\d,]+)\}", text)]
    if name != "source_target_pairs":
        groups = [sorted(group) for group in groups] or [range(devices)]
    return tuple(sorted(map(tuple, groups)))


def _mesh_groups(text: str) -> list[list[int]]:
    """Return groups of `mesh['x'=8,'y'=2] {'x':(2)4}`, over axes or parts of axes.

    `:(2)4` is the part of size 4 that comes after the first 2 of the axis.
    """
    axes, ids, over = re.fullmatch(
        r"mesh\[([^\]]*)\](?:, device_ids=\((.*)\))? \{([^}]*)\}", text
    ).groups()
    sizes = {name: int(size) for name, size in re.findall(r"([^,=]+)=(\d+)", axes)}
    groups = collections.defaultdict(list)
    where = itertools.product(*map(range, sizes.values()))
    for device, place in zip(_iota(ids or f"{[*sizes.values()]}"), where, strict=True):
        rest = dict(zip(sizes, place, strict=True))
        for name, first, part in re.findall(r"([^,:]+)(?::\((\d+)\)(\d+))?", over):
            size = int(part or sizes[name])
            unit = sizes[name] // (int(first or 1) * size)
            rest[name] -= rest[name] // unit % size * unit
        groups[tuple(rest.values())].append(device)
    return list(groups.values())


def _iota(text: str) -> list[int]:
    """Return the ids of `[4,2]T(1,0)`, a transposed iota, or of a plain list."""
    if not text.startswith("["):
        return ints(text)
    dims, _, order = text.partition("T")
    ids = np.arange(math.prod(ints(dims))).reshape(ints(dims))
    return (ids.transpose(ints(order)) if order else ids).ravel().tolist()
