"""Tests of machines by name, of the devices behind them and of XLA's refusals."""

import importlib.util
import json
import os
import subprocess
import sys

import jax
import pytest

from fm_jax import accelerators
from fm_jax.errors import UserError
from fm_jax.planning import topologies
from fm_jax.planning.topologies import Topology, out_of_memory, parse

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="compiling for TPUs needs libtpu: pip install 'fm_jax[tpu]'",
)


@pytest.mark.parametrize(
    "name, chip, shape, slices, devices",
    [
        ("v5e:1x1", "v5e", (1, 1), 1, 1),
        ("v5e:16x16*2", "v5e", (16, 16), 2, 512),
        ("v6e:8x16", "v6e", (8, 16), 1, 128),
        ("v4:2x2x4", "v4", (2, 2, 4), 1, 16),
        ("v5p:4x12x20*3", "v5p", (4, 12, 20), 3, 2880),
        ("tpu7x:2x2x1", "tpu7x", (2, 2, 1), 1, 8),
        ("h100:5", "h100", (5,), 1, 5),
        ("h200:64", "h200", (64,), 1, 64),
        ("b200:8*4", "b200", (8,), 4, 32),
        ("cpu:7", "cpu", (7,), 1, 7),
    ],
)
def test_a_name_says_chip_shape_slices_and_devices(name, chip, shape, slices, devices):
    topology = parse(name)
    assert topology == Topology(chip, shape, slices)
    assert topology.num_devices == devices
    assert topology.name == name


def test_case_and_blanks_around_a_name_mean_nothing():
    assert parse(" V5E:4x4 ") == parse("v5e:4x4")


@pytest.mark.parametrize("chip", [*accelerators.CHIPS, "cpu"])
def test_every_listed_name_is_known_and_listed_by_size(chip):
    listed = [parse(name) for name in topologies.known(chip)]
    sizes = [topology.num_chips for topology in listed]
    assert sizes == sorted(sizes)
    assert all(topology.chip == chip for topology in listed)


@pytest.mark.parametrize("chip", [*accelerators.CHIPS, "cpu"])
def test_cpu_devices_stand_in_for_all_but_tpus(chip):
    is_tpu = accelerators.CHIPS[chip].kind.startswith("TPU") if chip != "cpu" else False
    assert parse(topologies.known(chip)[0]).is_simulated != is_tpu


def test_a_shape_that_is_not_sold_is_refused_with_those_that_are_nearest_first():
    with pytest.raises(UserError) as caught:
        parse("v5e:3x3")
    assert str(caught.value) == (
        "--topology must be one of the known names; got 'v5e:3x3'. Known: v5e:2x4, "
        "v5e:4x4, v5e:2x2, v5e:4x8, v5e:8x8, v5e:1x1, v5e:8x16, v5e:16x16."
    )


@pytest.mark.parametrize(
    "name, rule",
    [
        ("v5p:4x8x4", "multiples of 4 with A <= B <= C up to 6144 chips."),
        ("v5p:16x16x28", "multiples of 4 with A <= B <= C up to 6144 chips."),
        ("tpu7x:4x4x6", "multiples of 4 with A <= B <= C up to 9216 chips."),
        ("v4:0x4x4", "multiples of 4 with A <= B <= C up to 4096 chips."),
        ("v5p:4x4", "multiples of 4 with A <= B <= C up to 6144 chips."),
        ("v6e:4x2", "Known: v6e:2x4, "),
        ("v5e:32x32", "Known: v5e:16x16, "),
        ("h100:12", "Known: h100:16, h100:8, "),
        ("h100:12", ", and any multiple of 8."),
        ("h100:0", "Known: h100:1, "),
        ("cpu:2x4", ", and any other count."),
    ],
)
def test_a_refused_shape_comes_with_the_rule_of_its_chip(name, rule):
    with pytest.raises(UserError, match="--topology must be one of") as caught:
        parse(name)
    assert rule in str(caught.value)


def test_an_unknown_chip_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"chip of --topology .* Did you mean 'h100'"):
        parse("h10:8")


@pytest.mark.parametrize("name", ["", "v5e", "v5e:", "v5e:4x", "v5e:4x4*", "8"])
def test_a_malformed_name_is_refused_with_examples(name):
    with pytest.raises(UserError, match=r"must be CHIP:SHAPE .* v5p:4x4x8"):
        parse(name)


@pytest.mark.parametrize("name", ["v5e:4x4*0", "v5e:16x16*129", "cpu:9000"])
def test_none_and_too_many_devices_are_refused(name):
    with pytest.raises(UserError, match=r"must have 1 to \d+ devices; got"):
        parse(name)


def test_simulated_devices_are_those_of_this_process_where_as_many():
    devices = topologies.devices(parse(f"h100:{jax.device_count()}"))
    assert devices == jax.devices("cpu")


def test_another_number_of_devices_is_refused_once_jax_has_started():
    jax.devices()
    with pytest.raises(
        RuntimeError, match=r"before jax starts; got 'cpu:3' after .* 8"
    ):
        topologies.devices(parse("cpu:3"))


def test_without_libtpu_the_way_to_it_is_said(monkeypatch):
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"without it. Install it: pip install 'fm_jax"):
        topologies.devices(parse("v5e:4x4"))


def _in_its_own_process(code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )


def test_simulated_devices_come_in_the_number_asked_for():
    found = _in_its_own_process(
        "from fm_jax.planning import topologies\n"
        "print(len(topologies.devices(topologies.parse('h100:3*2'))))"
    )
    assert found.stdout == "6\n"


DESCRIBE = """
import json, sys
from fm_jax import accelerators
from fm_jax.planning import topologies
found = {}
for name in json.loads(sys.argv[1]):
    devices = topologies.devices(topologies.parse(name))
    found[name] = {
        "count": len(devices),
        "chip": accelerators.by_kind(devices[0].device_kind).name,
        "slices": len({getattr(d, "slice_index", 0) for d in devices}),
        "hosts": len({d.process_index for d in devices}),
    }
print(json.dumps(found))
"""

MACHINES = {  # devices, slices, hosts
    "v5e:1x1": (1, 1, 1),
    "v5e:2x2": (4, 1, 1),
    "v5e:2x4": (8, 1, 1),
    "v5e:4x8": (32, 1, 8),
    "v5e:4x4*2": (32, 2, 8),
    "v6e:16x16": (256, 1, 64),
    "v4:1x1x1": (1, 1, 1),
    "v4:2x2x4": (16, 1, 4),
    "v5p:2x2x1*3": (12, 3, 3),
    "v5p:4x4x12": (192, 1, 48),
    "tpu7x:1x1x1": (2, 1, 1),
    "tpu7x:2x2x2": (16, 1, 2),
}


@needs_libtpu
def test_libtpu_gives_the_devices_slices_and_hosts_of_a_name_and_says_nothing():
    found = subprocess.run(
        [sys.executable, "-c", DESCRIBE, json.dumps(list(MACHINES))],
        capture_output=True,
        text=True,
        check=True,
        env={k: v for k, v in os.environ.items() if not k.startswith("TPU_")},
    )
    described = json.loads(found.stdout)
    for name, (count, slices, hosts) in MACHINES.items():
        chip = name.split(":")[0]
        assert described[name] == {
            "count": count, "chip": chip, "slices": slices, "hosts": hosts,
        }, name  # fmt: skip
        assert parse(name).num_devices == count
    assert found.stderr == ""


REFUSED = """
import jax, json, sys
from fm_jax import accelerators
from fm_jax.planning import topologies
found = {}
for name in json.loads(sys.argv[1]):
    devices = topologies.devices(topologies.parse(name))
    place = jax.sharding.SingleDeviceSharding(devices[0])
    x = jax.ShapeDtypeStruct((2**18, 2**18), "float32", sharding=place)
    try:
        jax.jit(lambda x: x.sum()).lower(x).compile()
    except jax.errors.JaxRuntimeError as error:
        found[name] = topologies.out_of_memory(str(error))
print(json.dumps(found))
"""


@needs_libtpu
def test_the_compiler_allows_what_the_table_says():
    names = ["v4:1x1x1", "v5e:1x1", "v5p:1x1x1", "v6e:1x1", "tpu7x:1x1x1"]
    found = subprocess.run(
        [sys.executable, "-c", REFUSED, json.dumps(names)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name, (needed, there) in json.loads(found.stdout).items():
        assert needed == 2**38, name
        assert there == pytest.approx(
            accelerators.CHIPS[name.split(":")[0]].usable_hbm_bytes, abs=1
        ), name
    assert len(json.loads(found.stdout)) == len(names)


@pytest.mark.parametrize(
    "message, needed, there",
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required "
            "for HLO temporaries (16.50T) exceeds available HBM (15.75G).",
            16.5 * 2**40,
            15.75 * 2**30,
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in "
            "memory space hbm. Used 20.93G of 15.48G hbm. Exceeded hbm capacity by "
            "5.45G.\n\nTotal hbm usage >= 21.45G:\n    reserved        530.01M",
            20.93 * 2**30,
            15.48 * 2**30,
        ),
        (
            "RESOURCE_EXHAUSTED: TPU TensorCore Hbm usage: 34.50G, SparseCore Hbm "
            "usage 512.00M, exceeding available bytes: 31.25G",
            35 * 2**30,
            31.25 * 2**30,
        ),
        (
            "RESOURCE_EXHAUSTED: Out of memory allocating 17592186044416 bytes.",
            2**44,
            None,
        ),
        (
            "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 33762398024 "
            "bytes.",
            33762398024,
            None,
        ),
        (
            "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 16.00GiB.",
            2**34,
            None,
        ),
    ],
)
def test_a_refusal_says_the_bytes_needed_and_there_are(message, needed, there):
    assert out_of_memory(message) == (
        round(needed),
        None if there is None else round(there),
    )


def test_the_refusal_of_this_backend_is_read():
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        # Beyond the addresses of a process, so that no system promises it.
        jax.numpy.zeros((2**26, 2**22), "float32").block_until_ready()
    assert out_of_memory(str(caught.value)) == (2**50, None)


@pytest.mark.parametrize("message", ["", "INVALID_ARGUMENT: 3.00G of 4.00G", "oom"])
def test_another_error_is_no_refusal_for_memory(message):
    assert out_of_memory(message) is None
