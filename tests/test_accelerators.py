"""Tests of the table of accelerators: who is found in it, and figures that agree."""

import dataclasses

import pytest

from fm_jax import accelerators
from fm_jax.accelerators import CHIPS


@pytest.mark.parametrize(
    "kind, name",
    [
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5e", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
        ("NVIDIA A100-SXM4-40GB", "a100_40gb"),
        ("NVIDIA A100-PCIE-40GB", "a100_40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100 80GB PCIe", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100_pcie"),
        ("NVIDIA H100 NVL", "h100_nvl"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H200 NVL", "h200_nvl"),
        ("NVIDIA B200", "b200"),
    ],
)
def test_a_device_is_found_by_the_longest_beginning_of_its_kind(kind, name):
    assert accelerators.by_kind(kind) is CHIPS[name]


@pytest.mark.parametrize(
    "kind", ["cpu", "", "TPU v3", "TPU v5x", "NVIDIA H1000", "NVIDIA GeForce RTX 4090"]
)
def test_an_unknown_device_has_no_figures(kind):
    assert accelerators.by_kind(kind) is None


def test_no_two_chips_claim_the_same_kind():
    kinds = [kind for chip in CHIPS.values() for kind in (chip.kind, *chip.aliases)]
    assert len(set(kinds)) == len(kinds)


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_the_figures_of_a_chip_are_in_the_units_that_they_say(chip):
    assert CHIPS[chip.name] is chip
    assert 1e14 < chip.flops["bfloat16"] < 1e16
    assert 2**33 < chip.usable_hbm_bytes < chip.hbm_bytes < 2**38
    # Each way out of a device is slower than the one before it.
    assert chip.flops["bfloat16"] > 100 * chip.hbm_bytes_per_second
    assert chip.hbm_bytes_per_second > 2 * chip.link_bytes_per_second
    assert chip.link_bytes_per_second > 2 * chip.dcn_bytes_per_second
    assert chip.dcn_bytes_per_second > 1e9
    assert all(dataclasses.asdict(chip)[key] for key in ("source", "chips_per_host"))


def test_a_chip_that_shows_as_two_devices_has_twice_as_many_on_a_host():
    assert CHIPS["tpu7x"].devices_per_host == 2 * CHIPS["v5p"].devices_per_host
    assert CHIPS["h100"].devices_per_host == 8
