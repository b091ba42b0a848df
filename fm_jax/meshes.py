"""The mesh: which devices stand along which axis, by named presets or by sizes."""

import itertools
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from fm_jax.errors import UserError, unknown

# Outermost first: neighbours on the last axis are neighbours in the machine, so the
# axes that talk most stand last, and those of data alone may cross slices and hosts.
AXES = ("data", "fsdp", "expert", "context", "tensor")

# Sizes by name; axes left out are 1, and -1 takes the devices that are left.
PRESETS: dict[str, dict[str, int]] = {
    "ddp": {"data": -1},
    "fsdp": {"fsdp": -1},
    "hsdp": {"data": 2, "fsdp": -1},
    "tensor": {"tensor": -1},
    "fsdp_tensor": {"fsdp": -1, "tensor": 2},
    "context": {"fsdp": -1, "context": 2},
}


def sizes(preset: str, given: Mapping[str, int], count: int) -> dict[str, int]:
    """Return the size of every axis for `count` devices.

    given: a size by axis, 0 for the preset's. One size may be -1 and takes what is
    left; a given -1 takes that place from the preset's. Raises UserError when the
    sizes do not multiply to `count`, with the nearest that do.
    """
    if preset not in PRESETS:
        raise unknown("mesh.preset", preset, PRESETS)
    chosen = {axis: PRESETS[preset].get(axis, 1) for axis in AXES}
    if -1 in given.values():
        chosen = {axis: max(size, 1) for axis, size in chosen.items()}
    chosen |= {axis: size for axis, size in given.items() if size}
    free = [axis for axis, size in chosen.items() if size == -1]
    said = {axis: size for axis, size in chosen.items() if size != -1}
    shown = " * ".join(f"{a}={n}" for a, n in chosen.items() if n != 1) or "all 1"
    if len(free) > 1 or min(said.values()) < 1:
        raise UserError(
            f"mesh must have sizes >= 1 and at most one -1; got {shown}. "
            "Set --config.mesh.data=-1 and the others to 1."
        )
    fixed = math.prod(said.values())
    if free and count % fixed == 0:
        return chosen | {free[0]: count // fixed}
    if free or fixed != count:
        demand = "divide" if free else "multiply to"
        raise UserError(
            f"mesh must {demand} the {count} devices; got {shown}. Nearest that work: "
            f"{' or '.join(_nearest(count, said, has_rest=bool(free)))}."
        )
    return chosen


def make(
    axis_sizes: Mapping[str, int],
    *,
    dcn: Mapping[str, int] | None = None,
    devices: Sequence | None = None,
) -> Mesh:
    """Return the mesh of all devices, or of `devices`, with sizes as `sizes` gave them.

    dcn: how much of an axis runs between slices (or hosts) joined by the slower
    network; each slice holds `axis_sizes / dcn`. Raises UserError when an axis does not
    divide by its part, or the parts do not multiply to the slices that there are.
    """
    devices = list(jax.devices() if devices is None else devices)
    outer = {axis: 1 for axis in AXES} | dict(dcn or {})
    for axis in AXES:
        if axis_sizes[axis] % outer[axis]:
            raise UserError(
                f"mesh.{axis} must divide by mesh.dcn_{axis}; got {axis_sizes[axis]} "
                f"and {outer[axis]}."
            )
    groups = _slices(devices, math.prod(outer.values()))
    inner = tuple(axis_sizes[axis] // outer[axis] for axis in AXES)
    blocks = np.stack([_arranged(inner, group) for group in groups])
    blocks = blocks.reshape(*outer.values(), *inner)
    # d0 d1 .. i0 i1 .. -> d0 i0 d1 i1 ..: a slice is a block of the whole.
    order = [i for pair in zip(*np.split(np.arange(10), 2), strict=True) for i in pair]
    array = blocks.transpose(order).reshape([axis_sizes[axis] for axis in AXES])
    # Auto, said aloud: the default has become Explicit, under which optax and gathers
    # on sharded tables fail.
    return Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _slices(devices: list, count: int) -> list[list]:
    """Return the devices in `count` groups: by slice, else by process and id."""
    known = sorted({getattr(device, "slice_index", None) or 0 for device in devices})
    if len(known) > 1:
        if len(known) != count:
            raise UserError(
                "mesh.dcn_data * mesh.dcn_fsdp must be the number of slices; got "
                f"{count} for {len(known)} slices. Set the one of an axis that they "
                "divide."
            )
        return [[d for d in devices if d.slice_index == index] for index in known]
    if count == 1:
        return [devices]
    in_order = sorted(devices, key=lambda d: (d.process_index, d.id))
    size = len(devices) // count
    return [in_order[i * size : (i + 1) * size] for i in range(count)]


def _arranged(shape: tuple[int, ...], devices: list) -> np.ndarray:
    try:
        return mesh_utils.create_device_mesh(shape, devices)
    except NotImplementedError:  # the shape does not follow the axes of the torus
        return mesh_utils.create_device_mesh(
            shape, devices, allow_split_physical_axes=True
        )


def _nearest(count: int, said: Mapping[str, int], *, has_rest: bool) -> list[str]:
    """Return the two ways nearest to `said` to make `count` of the axes it names.

    With `has_rest` another axis takes what they leave.
    """
    axes = [axis for axis, size in said.items() if size != 1] or ["data"]
    divisors = [n for n in range(1, count + 1) if count % n == 0]
    ways = [
        way
        for way in itertools.product(divisors, repeat=len(axes))
        if math.prod(way) == count or (has_rest and count % math.prod(way) == 0)
    ]

    def distance(way):
        pairs = zip(axes, way, strict=True)
        return sum(abs(math.log(size / said[axis])) for axis, size in pairs)

    return [
        " * ".join(f"{a}={n}" for a, n in zip(axes, way, strict=True))
        for way in sorted(ways, key=distance)[:2]
    ]
