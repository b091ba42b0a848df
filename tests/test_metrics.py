"""Tests of the clock, the machine's peak and the watch over compilation."""

import math
import re
import subprocess
import sys
import time

import jax
import pytest

from fm_jax import accelerators, metrics


class _Time:
    """A clock that moves by hand."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def hand(monkeypatch):
    """Return the time that `metrics` reads, moved by hand."""
    hand = _Time()
    monkeypatch.setattr(metrics, "time", hand)
    return hand


def test_an_inner_phase_is_not_counted_in_the_outer_one(hand):
    clock = metrics.Clock()
    hand.now += 1
    with clock.phase("eval"):
        hand.now += 2
        with clock.phase("data"):
            hand.now += 4
            with clock.phase("eval"):
                hand.now += 8
            hand.now += 16
        hand.now += 32
    hand.now += 64
    clock.settle()
    assert clock.seconds == {"other": 65.0, "eval": 42.0, "data": 20.0}


def test_an_error_ends_its_phase(hand):
    clock = metrics.Clock()
    with pytest.raises(KeyError), clock.phase("data"):
        hand.now += 3
        raise KeyError
    hand.now += 5
    clock.settle()
    assert clock.seconds == {"data": 3.0, "other": 5.0}


def test_phases_add_up_to_the_wall_time_that_went_by():
    readings = [time.perf_counter()]
    clock = metrics.Clock()
    readings.append(time.perf_counter())
    for _ in range(3):
        with clock.phase("step"):
            time.sleep(0.002)
            with clock.phase("checkpoint"):
                time.sleep(0.004)
    readings.append(time.perf_counter())
    clock.settle()
    readings.append(time.perf_counter())
    assert clock.seconds["step"] >= 0.006
    assert clock.seconds["checkpoint"] >= 0.012
    least, most = readings[2] - readings[1], readings[3] - readings[0]
    assert least <= sum(clock.seconds.values()) <= most


def test_a_product_takes_its_flops_over_the_best_time(monkeypatch):
    # A second between any two readings: both products take one second.
    ticks = iter(range(100))
    clock = _Time()
    clock.perf_counter = lambda: float(next(ticks))
    monkeypatch.setattr(metrics, "time", clock)
    assert metrics.measure_matmul("float32", size=24, seconds=5) == 2 * 24**3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_measured_product_has_a_speed(dtype):
    assert metrics.measure_matmul(dtype, size=64, seconds=0.01) > 0


class _Device:
    def __init__(self, kind):
        self.device_kind = kind


@pytest.fixture
def devices(monkeypatch):
    """Return `devices(kind, count, backend)`, which jax then seems to have."""

    def pretend(kind, count, backend):
        monkeypatch.setattr(jax, "devices", lambda: [_Device(kind)] * count)
        monkeypatch.setattr(jax, "device_count", lambda: count)
        monkeypatch.setattr(jax, "default_backend", lambda: backend)
        monkeypatch.setattr(metrics, "measure_matmul", lambda dtype: 7e12)

    return pretend


@pytest.mark.parametrize(
    "kind, name, peak",
    [
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100", 989e12),
        ("NVIDIA H100 PCIe", "NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", "NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-40GB", 312e12),
        ("TPU v4", "TPU v4", 275e12),
        ("TPU v5 lite", "TPU v5 lite", 197e12),
        ("TPU v5p", "TPU v5p", 459e12),
        ("TPU v6 lite", "TPU v6 lite", 918e12),
    ],
)
def test_the_published_peak_is_that_of_all_devices(kind, name, peak, devices):
    devices(kind, 4, "gpu")
    assert metrics.peak_flops("bfloat16") == (4 * peak, f"published for {name}")


@pytest.mark.parametrize(
    "kind, backend, dtype, peak",
    [
        ("NVIDIA H100 80GB HBM3", "gpu", "float32", 28e12),
        ("NVIDIA GeForce RTX 4090", "gpu", "bfloat16", 28e12),
        ("cpu", "cpu", "bfloat16", 7e12),  # simulated devices share the cores
    ],
)
def test_without_a_published_peak_a_product_is_measured(
    kind, backend, dtype, peak, devices
):
    devices(kind, 4, backend)
    assert metrics.peak_flops(dtype) == (peak, "measured matmul")


def test_a_known_device_is_the_chip_of_its_maker(devices):
    devices("NVIDIA H100 80GB HBM3", 4, "gpu")
    chip = accelerators.CHIPS["h100"]
    assert metrics.this_chip(7e12, "bfloat16") == chip
    # What its maker does not say of a dtype is what was measured here.
    found = metrics.this_chip(7e12, "float32")
    assert found.flops == chip.flops | {"float32": 7e12 / 4}


def test_of_another_device_the_products_alone_take_time(devices):
    devices("cpu", 8, "cpu")
    chip = metrics.this_chip(16e12, "float32")
    assert chip.flops["float32"] == 2e12
    assert math.isinf(chip.hbm_bytes_per_second)
    assert math.isinf(chip.link_bytes_per_second)
    assert (chip.name, chip.kind, chip.source) == ("cpu", "cpu", "measured here")


WATCHED = """
import sys, jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
from fm_jax import metrics
x = jax.device_put(jax.numpy.ones(3))
watch = metrics.CompileWatch()
f = lambda x: (x * 2 + 1).sum()
for _ in range(2):  # in the same process, a program is there without the cache
    jax.jit(f)(x)
print(watch.misses, watch.hits, watch.seconds > 0, watch.line())
jax.clear_caches()
jax.jit(f)(x)
print(watch.misses, watch.hits, watch.seconds > 0, watch.line())
"""


GUARDED = """
import jax, numpy as np
jax.config.update("jax_platforms", "cpu")
from fm_jax import metrics
watch, clock = metrics.CompileWatch(), metrics.Clock()
@jax.jit
def double(x):
    return x * 2
@jax.jit
def triple(x):
    return x * 3
with clock.phase("train"):
    double(np.ones(3))
watch.guard(clock, print)
with clock.phase("train"):
    double(np.ones(3))
with clock.phase("eval"):
    triple(np.ones(3))
with clock.phase("eval"):
    triple(np.ones(3))
    print("now")
    triple(np.ones(4))
with clock.phase("train"):
    double(np.ones((2, 3)))
watch.end()
with clock.phase("train"):
    double(np.ones((2, 3, 4)))
"""


def test_a_program_that_is_compiled_again_is_named_with_its_phase():
    found = subprocess.run(
        [sys.executable, "-c", GUARDED], capture_output=True, text=True, check=True
    )
    now, *warned = found.stdout.splitlines()
    assert now == "now"
    for line, name, phase in zip(
        warned, ("triple", "double"), ("eval", "train"), strict=True
    ):
        assert re.fullmatch(
            rf"WARNING: jit.{name}.? was compiled in \d+\.\d s after the first step, "
            rf"in phase {phase}: its arguments' shapes, dtypes or shardings are new",
            line,
        )


def _watched(folder):
    found = subprocess.run(
        [sys.executable, "-c", WATCHED, str(folder)],
        capture_output=True,
        text=True,
        check=True,
    )
    return [line.split(maxsplit=3) for line in found.stdout.splitlines()]


def test_a_compilation_is_a_miss_once_and_a_hit_after(tmp_path):
    first, cleared = _watched(tmp_path / "cache")
    assert first[:3] == ["1", "0", "True"]
    assert cleared[:2] == ["1", "1"]
    again, _ = _watched(tmp_path / "cache")
    assert again[:2] == ["0", "1"]
    assert first[3].startswith("compiled in ")
    assert "persistent cache: 0 hits (0.0 s saved), 1 misses" in first[3]
    assert "persistent cache: 1 hits (" in again[3]
    assert again[3].endswith(" s saved), 0 misses")
