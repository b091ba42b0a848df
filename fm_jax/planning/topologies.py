"""Machines by name, such as v5e:4x4 or h100:8, and devices to compile for them."""

import dataclasses
import importlib.util
import itertools
import math
import os
import re

from fm_jax import accelerators, machine
from fm_jax.errors import UserError, unknown

# The shapes that are sold (docs.cloud.google.com/tpu/docs). libtpu refuses none of the
# others: it compiles for some that do not exist, and of some it ends the process.
_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_BELOW_CUBE = ((1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
# From one cube of 4x4x4 on, any AxBxC of multiples of 4 with A <= B <= C, up to so many
# chips: the pod of a v4 and TPU7x, the largest job of a v5p.
_CUBES_UP_TO = {"v4": 4096, "v5p": 6144, "tpu7x": 9216}

# Simulated devices beyond this take seconds to start; TPUs' cost next to nothing.
_MOST_SIMULATED, _MOST_DEVICES = 8192, 32768

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+) ?([KMGT]?)(?:i?B| ?bytes)?\b"


@dataclasses.dataclass(frozen=True)
class Topology:
    """A machine: `num_slices` slices (or groups of hosts) of `shape` chips each."""

    chip: str
    shape: tuple[int, ...]
    num_slices: int = 1

    @property
    def name(self) -> str:
        """Return the name that `parse` reads back."""
        slices = f"*{self.num_slices}" if self.num_slices > 1 else ""
        return f"{self.chip}:{'x'.join(map(str, self.shape))}{slices}"

    @property
    def num_chips(self) -> int:
        """Return the chips of all slices."""
        return math.prod(self.shape) * self.num_slices

    @property
    def num_devices(self) -> int:
        """Return the jax devices of all slices: two for each chip of some kinds."""
        chip = accelerators.CHIPS.get(self.chip)
        return self.num_chips * (chip.devices_per_chip if chip else 1)

    @property
    def is_simulated(self) -> bool:
        """Return whether CPU devices stand in, as for all but TPUs."""
        return self.chip not in accelerators.TPUS


def parse(name: str) -> Topology:
    """Return the topology of a name: CHIP:SHAPE, or CHIP:SHAPE*SLICES for several.

    Raises UserError for a chip or a shape that does not exist, with those that do.
    """
    read = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)(?:\*(\d+))?", name.strip().lower())
    if not read:
        raise UserError(
            f"--topology must be CHIP:SHAPE or CHIP:SHAPE*SLICES; got {name!r}. "
            "For example v5e:4x4, v5p:4x4x8*2, h100:64 or cpu:8."
        )
    chip, shape, slices = read.groups()
    if chip != "cpu" and chip not in accelerators.CHIPS:
        raise unknown("the chip of --topology", chip, [*accelerators.CHIPS, "cpu"])
    topology = Topology(chip, tuple(map(int, shape.split("x"))), int(slices or 1))
    if not _exists(chip, topology.shape):
        raise UserError(
            f"--topology must be one of the known names; got {name!r}. "
            f"Known: {', '.join(_nearest(topology))}{_rule(chip)}."
        )
    most = _MOST_SIMULATED if topology.is_simulated else _MOST_DEVICES
    if not 1 <= topology.num_devices <= most:
        raise UserError(
            f"--topology must have 1 to {most} devices; got {name!r} with "
            f"{topology.num_devices}. Change its chips or slices."
        )
    return topology


def known(chip: str) -> list[str]:
    """Return the names of one slice of a chip, smallest first; of cubes the usual."""
    return [Topology(chip, shape).name for shape in _shapes(chip)]


def prepare(topology: Topology) -> None:
    """Set this process up for `devices`; must come before jax starts its backend.

    The process then computes on CPU alone. Raises RuntimeError when jax has started
    with another number of CPU devices than the topology asks for.
    """
    for name, value in (machine.QUIET | {"TF_CPP_MIN_LOG_LEVEL": "3"}).items():
        os.environ.setdefault(name, value)
    import jax

    jax.config.update("jax_platforms", "cpu")
    if topology.is_simulated:
        try:
            jax.config.update("jax_num_cpu_devices", topology.num_devices)
        except RuntimeError as error:
            count = jax.local_device_count("cpu")
            if count != topology.num_devices:
                raise RuntimeError(
                    "a topology must be prepared before jax starts; got "
                    f"{topology.name!r} after a start with {count} CPU devices. "
                    "Call prepare() first, or in a process of its own."
                ) from error


def devices(topology: Topology) -> list:
    """Return the topology's jax devices: they can be compiled for, TPUs not run on.

    Prepares the process. Devices of several slices have a `slice_index`, simulated
    ones do not. Raises UserError when libtpu is missing, RuntimeError as `prepare`.
    """
    if not topology.is_simulated and not _finds_libtpu():
        raise UserError(
            "--topology of TPUs must find libtpu, which compiles for them; got "
            f"{topology.name!r} without it. Install it: pip install 'fm_jax[tpu]'."
        )
    prepare(topology)
    import jax
    from jax.experimental import topologies

    if topology.is_simulated:
        return jax.devices("cpu")
    shape = "x".join(map(str, topology.shape))
    described = topologies.get_topology_desc(
        platform="tpu",
        topology_name=f"{topology.chip}:{shape}",
        num_slices=topology.num_slices,
        **_options(topology),
    )
    return list(described.devices)


def out_of_memory(message: str) -> tuple[int, int | None] | None:
    """Return the bytes needed and there are, of XLA's refusal; None for other errors.

    TPU programs are refused when compiled. On CPU and GPU one buffer is refused as it
    is allocated, in words that do not say how many bytes there are.
    """
    for pattern in (
        rf"HLO temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)",
        rf"memory space hbm\. Used {_SIZE} of {_SIZE} hbm",
    ):
        if found := re.search(pattern, message):
            needed, unit, there, its_unit = found.groups()
            return _bytes(needed, unit), _bytes(there, its_unit)
    # TensorCore and SparseCore share the memory, and each says what it takes.
    if found := re.search(rf"exceeding available bytes: {_SIZE}", message):
        used = re.findall(rf"Hbm usage:? {_SIZE}", message)
        return sum(_bytes(*each) for each in used), _bytes(*found.groups())
    found = re.search(
        rf"Out of memory (?:while trying to allocate|allocating) {_SIZE}", message
    )
    return (_bytes(*found.groups()), None) if found else None


def _rule(chip: str) -> str:
    """Return what `known` leaves out, in the words of an error."""
    if chip in _CUBES_UP_TO:
        return (
            ", and any AxBxC of multiples of 4 with A <= B <= C up to "
            f"{_CUBES_UP_TO[chip]} chips"
        )
    if chip in accelerators.TPUS:
        return ""
    return ", and any other count" if chip == "cpu" else ", and any multiple of 8"


def _shapes(chip: str) -> list[tuple[int, ...]]:
    """Return the shapes that are listed, smallest first."""
    if chip not in accelerators.TPUS:
        counts = [1, 2, 4, *(2**i for i in range(3, 11))]
        return [(count,) for count in counts]
    if chip not in _CUBES_UP_TO:
        return list(_FLAT)
    sides = itertools.combinations_with_replacement((4, 8, 16), 3)
    cubes = [shape for shape in sides if _exists(chip, shape)]
    return [*_BELOW_CUBE, *sorted(cubes, key=math.prod)]


def _exists(chip: str, shape: tuple[int, ...]) -> bool:
    if chip == "cpu":
        return len(shape) == 1 and shape[0] >= 1
    if chip not in accelerators.TPUS:
        host = accelerators.CHIPS[chip].chips_per_host
        is_count = len(shape) == 1 and shape[0] >= 1
        return is_count and (shape[0] < host or shape[0] % host == 0)
    if chip not in _CUBES_UP_TO:
        return shape in _FLAT
    if shape in _BELOW_CUBE:
        return True
    cubes = len(shape) == 3 and all(side and side % 4 == 0 for side in shape)
    in_order = list(shape) == sorted(shape)
    return cubes and in_order and math.prod(shape) <= _CUBES_UP_TO[chip]


def _nearest(topology: Topology) -> list[str]:
    """Return the known names of its chip, nearest number of chips first."""
    wanted = max(math.prod(topology.shape), 1)
    shapes = sorted(
        _shapes(topology.chip), key=lambda s: abs(math.log(math.prod(s) / wanted))
    )
    return [Topology(topology.chip, shape).name for shape in shapes]


def _options(topology: Topology) -> dict:
    """Return what libtpu must be told beside the name.

    By itself it takes a host for 2x2 chips, and shows a chip of v4 as two devices,
    where jax on the machine itself shows one.
    """
    options = {}
    if topology.chip == "v4":
        options["chip_config_name"] = "megacore"
    if math.prod(topology.shape) == 1 or topology.shape == (2, 4):  # on one host
        options["chips_per_host_bounds"] = (*topology.shape, 1)[:3]
    return options


def _finds_libtpu() -> bool:
    if os.environ.get("TPU_LIBRARY_PATH"):
        return True
    spec = importlib.util.find_spec("libtpu")
    # A folder of that name beside the program is found too, and has no origin.
    return spec is not None and spec.origin is not None


def _bytes(number: str, unit: str) -> int:
    return round(float(number) * _UNITS[unit])
