"""What a compiled step needs and how fast it can be: memory by kind, a roofline.

Read from the very program that runs, so that a plan made without the machine and the
report of a run on it say the same things.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from fm_jax import meshes
from fm_jax.accelerators import Chip
from fm_jax.compiled import program


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device while a step runs.

    `params` are those that train, `frozen` those that do not, as they are held.
    `gradients` are as large as the former in float32, and with `activations` (all
    the rest) make up the program's temporaries. `host` is what is offloaded.
    """

    params: int
    optimizer: int
    average: int
    batch: int
    gradients: int
    activations: int
    host: int
    frozen: int = 0

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return sum(vars(self).values()) - self.host


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """What one device says in a step by one kind of collective over one set of axes."""

    kind: str
    axes: tuple[str, ...]
    count: int
    bytes: int
    wire_bytes: float
    crosses_slices: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """A step on one device: memory, work, and the seconds below which it cannot be.

    `flops` and `bytes_accessed` are those of the compiled program, recomputation and
    all. Seconds are those of products at the peak rate, of main memory and of the
    network at full bandwidth, each as if alone; None where nothing can be said.
    """

    memory: Memory
    flops: int
    bytes_accessed: int
    traffic: tuple[Traffic, ...]
    compute_seconds: float | None
    memory_seconds: float | None
    network_seconds: float | None

    @property
    def seconds(self) -> float | None:
        """The roofline: the slowest of the three, the others hidden behind it."""
        alone = (self.compute_seconds, self.memory_seconds, self.network_seconds)
        return max((s for s in alone if s is not None), default=None)


def of_step(
    compiled: jax.stages.Compiled,
    *,
    state: Any,
    batch: dict,
    mesh: jax.sharding.Mesh,
    num_slices: int,
    chip: Chip | None,
    dtype: str,
    is_own_compiler: bool = True,
) -> Estimate:
    """Return the estimate of a compiled train step.

    state, batch: the abstract arguments with their shardings. dtype: of the operands of
    products. The mesh's devices lie in `num_slices` slices. Without `is_own_compiler`
    another machine's compiler made the program: its traffic with main memory, which
    follows from what is fused, says nothing of this chip.
    """
    read = program.read(compiled.as_text())
    said = traffic(read, mesh, num_slices)
    seconds: dict[str, float | None] = dict.fromkeys(("compute", "memory", "network"))
    if chip is not None:
        seconds = {
            "compute": read.flops / chip.flops.get(dtype, chip.flops["bfloat16"]),
            "memory": read.bytes_accessed / chip.hbm_bytes_per_second
            if is_own_compiler
            else None,
            "network": sum(_network_seconds(t, chip) for t in said),
        }
    return Estimate(
        memory=_memory(compiled.memory_analysis(), state, batch),
        flops=read.flops,
        bytes_accessed=read.bytes_accessed,
        traffic=said,
        **{f"{name}_seconds": value for name, value in seconds.items()},
    )


def traffic(
    read: program.Program, mesh: jax.sharding.Mesh, num_slices: int = 1
) -> tuple[Traffic, ...]:
    """Return the collectives merged by kind and mesh axes, the largest first."""
    slice_of = _slice_numbers(mesh, num_slices)
    merged: dict[tuple, Traffic] = {}
    for one in read.collectives:
        axes = _axes_of(one.groups, mesh)
        crosses = any(len({slice_of[d] for d in group}) > 1 for group in one.groups)
        key = (one.kind, axes, crosses)
        old = merged.get(key)
        merged[key] = Traffic(
            kind=one.kind,
            axes=axes,
            count=one.count + (old.count if old else 0),
            bytes=one.bytes + (old.bytes if old else 0),
            wire_bytes=one.wire_bytes + (old.wire_bytes if old else 0),
            crosses_slices=crosses,
        )
    return tuple(sorted(merged.values(), key=lambda t: -t.wire_bytes))


def state_memory(state: Any, batch: dict) -> dict[str, int]:
    """Return the bytes on one device of what is there before and after a step."""
    return {
        "params": device_bytes(state.params),
        "frozen": device_bytes(state.frozen),
        "optimizer": device_bytes((state.step, state.opt_state)),
        "average": device_bytes(state.ema),
        "batch": device_bytes(batch),
    }


def device_bytes(tree: Any) -> int:
    """Return the bytes that a tree of sharded abstract arrays takes on one device."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _memory(stats, state, batch) -> Memory:
    kept = state_memory(state, batch)
    temporaries = stats.temp_size_in_bytes + max(
        0, stats.output_size_in_bytes - stats.alias_size_in_bytes
    )
    gradients = min(temporaries, kept["params"])
    return Memory(
        **kept,
        gradients=gradients,
        activations=temporaries - gradients,
        host=stats.host_temp_size_in_bytes,
    )


def _axes_of(groups: tuple[tuple[int, ...], ...], mesh) -> tuple[str, ...]:
    """Return the mesh axes along which the members of a group differ."""
    varying: set[str] = set()
    for group in groups:
        places = np.array(np.unravel_index(group, mesh.devices.shape))
        moved = np.any(places != places[:, :1], axis=1)
        varying |= {
            axis for axis, is_moved in zip(meshes.AXES, moved, strict=True) if is_moved
        }
    return tuple(axis for axis in meshes.AXES if axis in varying)


def _slice_numbers(mesh, num_slices: int) -> list[int]:
    devices = list(mesh.devices.flat)
    known = [getattr(d, "slice_index", None) for d in devices]
    if num_slices > 1 and len(set(known)) > 1:
        return known
    order = sorted(range(len(devices)), key=lambda i: devices[i].id)
    numbers = [0] * len(devices)
    for rank, index in enumerate(order):
        numbers[index] = rank * num_slices // len(devices)
    return numbers


def _network_seconds(traffic: Traffic, chip: Chip) -> float:
    rate = (
        chip.dcn_bytes_per_second
        if traffic.crosses_slices
        else chip.link_bytes_per_second
    )
    return traffic.wire_bytes / rate


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a device is full, or the host."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, jax.errors.JaxRuntimeError) and (
        "RESOURCE_EXHAUSTED" in str(error) or "Out of memory" in str(error)
    )


# ---- as text


def memory_lines(memory: Memory, capacity: int | None) -> list[str]:
    """Return the table of a device's memory, beside what it has."""
    rows = {
        "parameters": memory.params,
        "frozen parameters": memory.frozen,
        "optimizer": memory.optimizer,
        "average of weights": memory.average,
        "batch": memory.batch,
        "gradients": memory.gradients,
        "activations and the rest": memory.activations,
    }
    lines = [f"  {name:26}{size(value):>12}" for name, value in rows.items() if value]
    there = f" of {size(capacity)}" if capacity else ""
    lines.append(f"  {'a device in all':26}{size(memory.total):>12}{there}")
    if memory.host:
        lines.append(f"  {'offloaded to the host':26}{size(memory.host):>12}")
    return lines


def traffic_lines(traffic: Sequence[Traffic]) -> list[str]:
    """Return the table of what a device says in a step."""
    return [
        f"  {t.kind:20}{'*'.join(t.axes):20}{t.count:>8,} times{size(t.bytes):>12}"
        + ("  between slices" if t.crosses_slices else "")
        for t in traffic
    ] or ["  none"]


def size(count: float) -> str:
    """Return bytes in the unit that suits them (powers of ten)."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} B"
