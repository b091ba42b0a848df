"""What one device of each known accelerator can do, by its makers. Imports no jax."""

import dataclasses

_GB, _GIB = 10**9, 2**30
_GBIT = 10**9 // 8  # a Gbit/s, in bytes
_TPU_PAGES = "docs.cloud.google.com/tpu/docs"


@dataclasses.dataclass(frozen=True)
class Chip:
    """The figures of one jax device: of half a chip, where a chip shows as two.

    name: the short name that people type; kind: how jax's `device_kind` begins, and
    aliases: other beginnings of it.
    flops: peak dense FLOP/s by dtype, of those that are trained with.
    hbm_bytes: the device's memory; usable_hbm_bytes: what a program may take of it.
    link_bytes_per_second: what the device can send over all its links within a slice
    (TPU) or an NVLink domain together, in one direction.
    dcn_bytes_per_second: its share of what its host can send to other slices or hosts,
    in one direction.
    chips_per_host: chips that one process drives where there are several processes.
    capability: CUDA's of a GPU.
    source: where the maker states them.
    """

    name: str
    kind: str
    flops: dict[str, float]
    hbm_bytes: int
    usable_hbm_bytes: int
    hbm_bytes_per_second: float
    link_bytes_per_second: float
    dcn_bytes_per_second: float
    chips_per_host: int
    source: str
    devices_per_chip: int = 1
    capability: float = 0.0
    aliases: tuple[str, ...] = ()

    @property
    def devices_per_host(self) -> int:
        """Return how many jax devices one process drives in a machine of several."""
        return self.chips_per_host * self.devices_per_chip


def by_kind(device_kind: str) -> Chip | None:
    """Return the chip whose kind is the longest beginning of jax's `device_kind`.

    A kind ends where a word does: "TPU v5x" is not a "TPU v5". None for unknown ones.
    """
    best, length = None, 0
    for chip in CHIPS.values():
        for kind in (chip.kind, *chip.aliases):
            rest = device_kind.removeprefix(kind)
            begins = device_kind.startswith(kind) and rest[:1] in ("", " ", "-")
            if begins and len(kind) > length:
                best, length = chip, len(kind)
    return best


def _tpu(name: str, kind: str, *aliases: str, **figures) -> Chip:
    figures = {"chips_per_host": 4} | figures
    return Chip(name=name, kind=kind, aliases=aliases, **figures)


def _gpu(name: str, kind: str, *aliases: str, hbm_gib: int, **figures) -> Chip:
    # Makers write GB for what the driver reports as nearly as many GiB. Of it XLA takes
    # three quarters unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise:
    # docs.jax.dev/en/latest/gpu_memory_allocation.html
    return Chip(
        name=name,
        kind=kind,
        aliases=aliases,
        hbm_bytes=hbm_gib * _GIB,
        usable_hbm_bytes=hbm_gib * _GIB * 3 // 4,
        chips_per_host=8,  # DGX and HGX boards, and servers of PCIe cards
        **figures,
    )


# Google states the links' bandwidth as the sum of both directions: half of it is here.
# `usable_hbm_bytes` is what libtpu 0.0.42 says when it refuses a program for its size.
_TPUS = [
    _tpu(
        "v4",
        "TPU v4",
        flops={"bfloat16": 275e12},
        hbm_bytes=32 * _GIB,
        usable_hbm_bytes=int(30.75 * _GIB),
        hbm_bytes_per_second=1200 * _GB,
        link_bytes_per_second=6 * 50 * _GB,  # table 4 of arXiv:2304.01433
        # 25 GB/s a host: jax-ml.github.io/scaling-book/tpus
        dcn_bytes_per_second=25 * _GB / 4,
        source=f"{_TPU_PAGES}/v4",
    ),
    _tpu(
        "v5e",
        "TPU v5 lite",
        "TPU v5e",
        flops={"bfloat16": 197e12},
        hbm_bytes=16 * _GIB,
        usable_hbm_bytes=int(15.75 * _GIB),
        hbm_bytes_per_second=819 * _GB,
        link_bytes_per_second=400 * _GB / 2,  # 4 links
        dcn_bytes_per_second=2 * 100 * _GBIT / 8,  # two cards for 8 chips
        source=f"{_TPU_PAGES}/v5e",
    ),
    _tpu(
        "v5p",
        "TPU v5p",
        "TPU v5",  # what libtpu calls it; jax on the machine itself says v5p
        flops={"bfloat16": 459e12},
        # The page says 95 GiB, but the compiler allows more than that.
        hbm_bytes=96 * _GIB,
        usable_hbm_bytes=int(95.74 * _GIB),
        hbm_bytes_per_second=2765 * _GB,
        link_bytes_per_second=1200 * _GB / 2,  # 6 links
        dcn_bytes_per_second=50 * _GBIT,
        source=f"{_TPU_PAGES}/v5p",
    ),
    _tpu(
        "v6e",
        "TPU v6 lite",
        "TPU v6e",
        flops={"bfloat16": 918e12},
        hbm_bytes=32 * _GIB,
        usable_hbm_bytes=int(31.25 * _GIB),
        hbm_bytes_per_second=1638 * _GB,
        link_bytes_per_second=800 * _GB / 2,  # 4 links
        dcn_bytes_per_second=100 * _GBIT,  # of the table on the page of TPU7x
        source=f"{_TPU_PAGES}/v6e",
    ),
    _tpu(
        "tpu7x",
        "TPU7x",
        devices_per_chip=2,  # so each published figure is halved
        flops={"bfloat16": 2307e12 / 2},
        hbm_bytes=192 * _GIB // 2,
        usable_hbm_bytes=int(94.75 * _GIB),  # the compiler's, already of one device
        hbm_bytes_per_second=7380 * _GB / 2,
        link_bytes_per_second=1200 * _GB / 2 / 2,  # 6 links, shared by the two
        dcn_bytes_per_second=100 * _GBIT / 2,
        source=f"{_TPU_PAGES}/tpu7x",
    ),
]

# NVIDIA states FLOP/s with 2:4 sparsity, and NVLink and PCIe as the sum of both
# directions: half of each is here. A bridge joins PCIe cards only in pairs or fours,
# so their link is PCIe. The network is one card a GPU on DGX systems, and 200 Gbit/s a
# GPU on NVIDIA's reference servers of PCIe cards (2-8-5-200).
# Written down without the data sheet at hand: the networks, the NVL rows, and the PCIe
# card's FLOP/s.
_GPUS = [
    _gpu(
        "a100",
        "NVIDIA A100",  # the PCIe card too: same FLOP/s, slower links
        flops={"bfloat16": 312e12},
        capability=8.0,
        hbm_gib=80,
        hbm_bytes_per_second=2039 * _GB,
        link_bytes_per_second=600 * _GB / 2,
        dcn_bytes_per_second=200 * _GBIT,  # DGX A100
        source="nvidia.com/en-us/data-center/a100",
    ),
    _gpu(
        "a100_40gb",
        "NVIDIA A100-SXM4-40GB",
        "NVIDIA A100-PCIE-40GB",
        flops={"bfloat16": 312e12},
        capability=8.0,
        hbm_gib=40,
        hbm_bytes_per_second=1555 * _GB,
        link_bytes_per_second=600 * _GB / 2,
        dcn_bytes_per_second=200 * _GBIT,  # DGX A100
        source="nvidia.com/en-us/data-center/a100",
    ),
    _gpu(
        "h100",
        "NVIDIA H100",
        flops={"bfloat16": 989e12},
        capability=9.0,
        hbm_gib=80,
        hbm_bytes_per_second=3350 * _GB,
        link_bytes_per_second=900 * _GB / 2,
        dcn_bytes_per_second=400 * _GBIT,  # DGX H100
        source="nvidia.com/en-us/data-center/h100",
    ),
    _gpu(
        "h100_nvl",
        "NVIDIA H100 NVL",
        flops={"bfloat16": 1671e12 / 2},
        capability=9.0,
        hbm_gib=94,
        hbm_bytes_per_second=3900 * _GB,
        link_bytes_per_second=128 * _GB / 2,
        dcn_bytes_per_second=200 * _GBIT,
        source="nvidia.com/en-us/data-center/h100",
    ),
    _gpu(
        "h100_pcie",
        "NVIDIA H100 PCIe",
        flops={"bfloat16": 756e12},
        capability=9.0,
        hbm_gib=80,
        hbm_bytes_per_second=2000 * _GB,
        link_bytes_per_second=128 * _GB / 2,
        dcn_bytes_per_second=200 * _GBIT,
        source="NVIDIA H100 data sheet, 2022",
    ),
    _gpu(
        "h200",
        "NVIDIA H200",
        flops={"bfloat16": 989e12},
        capability=9.0,
        hbm_gib=141,
        hbm_bytes_per_second=4800 * _GB,
        link_bytes_per_second=900 * _GB / 2,
        dcn_bytes_per_second=400 * _GBIT,  # DGX H200
        source="nvidia.com/en-us/data-center/h200",
    ),
    _gpu(
        "h200_nvl",
        "NVIDIA H200 NVL",
        flops={"bfloat16": 1671e12 / 2},
        capability=9.0,
        hbm_gib=141,
        hbm_bytes_per_second=4800 * _GB,
        link_bytes_per_second=128 * _GB / 2,
        dcn_bytes_per_second=200 * _GBIT,
        source="nvidia.com/en-us/data-center/h200",
    ),
    _gpu(
        "b200",
        "NVIDIA B200",
        flops={"bfloat16": 2250e12},
        capability=10.0,
        hbm_gib=180,
        hbm_bytes_per_second=8000 * _GB,
        link_bytes_per_second=1800 * _GB / 2,
        dcn_bytes_per_second=400 * _GBIT,  # DGX B200
        source="nvidia.com/en-us/data-center/dgx-b200",
    ),
]

CHIPS: dict[str, Chip] = {chip.name: chip for chip in [*_TPUS, *_GPUS]}
TPUS = tuple(chip.name for chip in _TPUS)
