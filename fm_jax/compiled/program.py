"""What a compiled program does, read from the text of its optimized HLO module.

XLA's own cost_analysis() counts the body of a loop once, and a scanned model is one
loop: here every computation counts as often as it runs.
"""

import collections
import dataclasses
import functools
import math
import re

from fm_jax.compiled import kernels, text
from fm_jax.compiled.text import Array, Body, Op, Place

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """All executions of one kind of collective over the same groups of devices.

    `count` is executions in one run of the program, a combined (tuple) one being one.
    `bytes` is the payload on one device, summed over them: the larger of operands and
    results, so what an all-gather has gathered and what a reduce-scatter starts from.
    `groups` are sorted; a device is its place in the flat device order of the mesh.
    Those of a collective-permute are its (source, target) pairs, of `group_size` 2.
    """

    kind: str
    dtype: str
    groups: tuple[tuple[int, ...], ...]
    count: int
    bytes: int

    @property
    def group_size(self) -> int:
        """Devices that take part in one execution, in the largest group."""
        return max(map(len, self.groups))

    @property
    def wire_bytes(self) -> float:
        """Bytes that one device sends in a ring algorithm over its group."""
        if self.kind in ("collective-permute", "collective-broadcast"):
            return float(self.bytes)
        rounds = 2 if self.kind == "all-reduce" else 1
        return rounds * self.bytes * (self.group_size - 1) / self.group_size


@dataclasses.dataclass(frozen=True)
class Program:
    """What one run of a program costs one device.

    `flops` is 2*M*N*K of every dot, convolution and call of a matrix library, and of
    attention kernels (see kernels); products with the padding of a convolution are
    none. `bytes_accessed` estimates traffic with main memory: operands and results of
    every instruction outside fusions, a slice in place of the array that it is cut from
    or put into, what a kernel loads again, and nothing for arrays that a TPU keeps on
    the chip. Branches count as if all were taken, an upper bound. Loops
    whose trips are not known run once; `unknown_loops` counts them. `custom_calls` are
    executions of those whose products, if any, are not in `flops`. `arrays` are the
    distinct results outside fusions, arguments among them, largest first.
    """

    collectives: tuple[Collective, ...]
    flops: int
    bytes_accessed: int
    unknown_loops: int
    custom_calls: dict[str, int]
    arrays: tuple[Array, ...]

    def largest(self, n: int) -> tuple[Array, ...]:
        """Return the n largest arrays that are ever whole in a device's memory."""
        return self.arrays[:n]


def read(module: str) -> Program:
    """Return what the text of `compiled.as_text()` says of a program.

    Raises ValueError when it holds no ENTRY computation.
    """
    bodies, entry, devices = text.parse(module)
    counts, payloads, customs = (collections.Counter() for _ in range(3))
    runs, fused = collections.Counter({entry: 1}), set()
    flops = traffic = unknown = 0
    arrays: set[Array] = set()
    for body in filter(runs.get, reversed(bodies)):  # callers before what they call
        times, in_memory = runs[body], body not in fused
        for op in body.ops.values():
            trips = 1
            if op.kind in KINDS and not body.continues(op):
                key, payload = _collective(body, op, devices, fused=not in_memory)
                counts[key] += times
                payloads[key] += times * payload
            elif op.kind == "while":
                known = body.trips(op)
                trips = 1 if known is None else known
                unknown += known is None
            elif products := _products(body, op):
                flops += times * products
            elif op.kind == "custom-call" and in_memory:
                customs[op.attr(_TARGET)] += times
            if in_memory:
                traffic += times * _traffic(body, op)
                arrays.update(place.array for place in text.places(op.shape))
            if op.kind in _CALLERS:
                for callee in body.callees(op):
                    runs[callee] += times * trips
                    if op.kind in ("fusion", "custom-call"):
                        fused.add(callee)
    found = [Collective(*key, counts[key], payloads[key]) for key in counts]
    return Program(
        tuple(sorted(found, key=lambda c: (-c.bytes, c.kind, c.dtype, c.groups))),
        flops,
        traffic,
        unknown,
        {target: customs[target] for target in customs if target not in _MARKS},
        tuple(sorted(arrays, key=lambda a: (-a.bytes, a.dtype, a.dims))),
    )


_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_CALLERS = ("fusion", "custom-call", "while", "call", "async", "conditional")


# Products.


def _products(body: Body, op: Op) -> int:
    """Return 2*M*N*K of a dot, a convolution or a call of a matrix library."""
    if op.kind == "convolution":
        return _convolution(body, op)
    target = op.attr(_TARGET) if op.kind == "custom-call" else ""
    if target and (estimate := op.attr(r'"cost_estimate":\{"flops":"(\d+)"')):
        return int(estimate)
    if target and (known := kernels.cost(body, op, target)):
        return known.flops
    if op.kind in ("dot", "ragged-dot"):
        contracted = text.ints(op.attr(r"lhs_contracting_dims=\{([^}]*)"))
    elif target.startswith("__cublas$"):
        contracted = text.ints(op.attr(r'"lhs_contracting_dimensions":\[([^\]]*)'))
    elif target == "__onednn$matmul":
        contracted = [-2 if op.attr(r'("transpose_a":true)') else -1]
    else:
        return 0
    lhs = body.inputs(op)[0].array.dims
    result = text.places(op.shape)[0].array.dims
    return 2 * math.prod(result) * math.prod(lhs[dim] for dim in contracted)


def _convolution(body: Body, op: Op) -> int:
    places = (*body.inputs(op)[:2], text.places(op.shape)[0])
    arrays = [place.array.dims for place in places]
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.attrs).groups()
    lhs, rhs, result = (
        dict(zip(*pair, strict=True)) for pair in zip(labels, arrays, strict=True)
    )
    window = dict(re.findall(r"(\w+)=([^ }]+)", op.attr(r"window=\{([^}]*)")))
    total = 2 * result["b"] * result["f"] * rhs["i"]
    for dim in filter(str.isdigit, lhs):
        # Only the low end of the padding matters: the result's size says the rest.
        stride, low, dilate, spread = (
            int(window[key].split("x")[int(dim)].split("_")[0]) if key in window else d
            for key, d in zip(_WINDOW, (1, 0, 1, 1), strict=True)
        )
        sizes = lhs[dim], rhs[dim], result[dim]
        total *= _meetings(*sizes, stride, low, dilate, spread)
    return total


_WINDOW = ("stride", "pad", "lhs_dilate", "rhs_dilate")


@functools.lru_cache(maxsize=4096)
def _meetings(size, kernel, result, stride, low, dilate, spread) -> int:
    """Return in how many (kernel, result) places of one dim an input element stands.

    On a TPU the batch dims of a product become padded or dilated dims of a convolution,
    whose other places are skipped.
    """
    common = math.gcd(stride, dilate)
    every, total = dilate // common, 0
    for k in range(kernel):
        base = k * spread - low  # place p meets base + p*stride, where dilate divides
        if base % common == 0:
            place = -base // common * pow(stride // common, -1, every) % every
            first = max(0, -(base // stride))
            last = min(result - 1, ((size - 1) * dilate - base) // stride)
            total += max(0, (last - place) // every - (first - 1 - place) // every)
    return total


# Collectives.


def _collective(body: Body, op: Op, devices: int, *, fused: bool) -> tuple:
    """Return (kind, dtype, groups) of a collective, and the bytes of its payload.

    A TPU writes a reduce-scatter as a fusion of an all-reduce and its slices.
    """
    users = body.users.get(op.name, [])
    if users and users[0].kind == "get-tuple-element":
        users = body.users.get(users[0].name, [])
    kind = op.kind
    if kind == "all-reduce" and fused and "dynamic-slice" in [u.kind for u in users]:
        kind = "reduce-scatter"
    moved = [place.array for place in body.inputs(op)]
    if kind == "ragged-all-to-all":
        moved = moved[:1]
    groups = op.groups(devices)
    parts = max(map(len, groups)) if kind == "all-gather" else 1
    dtype = "+".join(sorted({array.dtype for array in moved}))
    return (kind, dtype, groups), parts * sum(array.bytes for array in moved)


# Traffic with main memory. A part of None is the whole.

_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("while", "conditional", "call", "async", "opt-barrier", "add-dependency"),
    *("partition-id", "replica-id"),
}
_MARKS = ("AllocateBuffer", "ConcatBitcast")


def _traffic(body: Body, op: Op) -> int:
    """Return the bytes that one execution of an instruction reads and writes."""
    if op.kind in _FREE or op.attr(_TARGET) in _MARKS or body.continues(op):
        return 0
    results, written = _results(body, op), _written(body, op)
    written += [None] * (len(results) - len(written))
    total = sum(
        place.bytes if part is None else min(place.bytes, part)
        for place, part in zip(results, written, strict=False)
    )
    for k, name in enumerate(op.operands):
        size = sum(place.bytes for place in text.places(body.ops[name].shape))
        part = _read(body, op, k)
        total += size if part is None else min(size, part)
    if op.kind == "custom-call":
        known = kernels.cost(body, op, op.attr(_TARGET))
        total += known.bytes_again if known else 0
    return total


def _results(body: Body, op: Op) -> tuple[Place, ...]:
    """Return the arrays of a result, without the operands that async halves repeat."""
    places = text.places(op.shape)
    if op.opcode == "copy-start":
        return places[:1]
    is_half = op.opcode.endswith("-start") and op.kind != "all-reduce"
    return places[len(body.inputs(op)) :] if is_half else places


def _read(body: Body, op: Op, k: int) -> int | None:
    """Return the bytes that `op` reads of operand `k`."""
    if op.kind in ("dynamic-slice", "slice", "gather") and k == 0:
        return _results(body, op)[0].array.bytes
    if op.kind == "dynamic-update-slice" and k == 0:
        return 0
    if op.kind == "scatter" and k < len(op.operands) // 2:
        return _written(body, op)[k]
    if op.kind == "fusion":
        inside = body.callees(op)[0]
        return _read_of(inside, inside.parameters[k])
    return None


def _read_of(body: Body, name: str) -> int | None:
    """Return the bytes that a fusion reads of what `name` is inside it."""
    total = 0
    for user in body.users.get(name, ()):
        if user.kind == "tuple" or body.continues(user):
            continue
        is_same = user.kind == "bitcast"
        if user.kind == "fusion":
            is_same = body.callees(user)[0].passes
        places = [k for k, operand in enumerate(user.operands) if operand == name]
        parts = [0 if is_same else _read(body, user, k) for k in places]
        if is_same or user.kind in ("dynamic-update-slice", "scatter"):
            parts.append(_read_of(body, user.name))
        if None in parts:
            return None
        total += sum(parts)
    return total


def _written(body: Body, op: Op) -> list[int | None]:
    """Return the bytes written of each array of a result."""
    op = body.uncast(op)
    if op.kind == "parameter" or body.continues(op):
        return [0]
    if op.kind == "dynamic-update-slice":
        return [body.inputs(op)[1].array.bytes]
    if op.kind == "scatter":
        updates = body.inputs(op)[-(len(op.operands) // 2) :]
        return [place.array.bytes for place in updates]
    if op.kind != "fusion":
        return [None] * len(text.places(op.shape))
    inside = body.callees(op)[0]
    if inside.starts:  # the result begins with the operands, which stay where they are
        return [0] * len(op.operands)
    root = inside.root
    leaves = root.operands if root.kind == "tuple" else [root.name]
    return [part for leaf in leaves for part in _written(inside, inside.ops[leaf])]
