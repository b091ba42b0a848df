"""Tests of estimates: what a compiled step says, holds and takes."""

import dataclasses
import json
import os
import pathlib

import jax
import jaxlib
import numpy as np
import pytest

from fm_jax import accelerators, configfile, meshes
from fm_jax import config as configs
from fm_jax.compiled import estimates, program
from fm_jax.train import compose

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "collectives.json"
ROOT = pathlib.Path(__file__).parent.parent.parent


def _compiled(**overrides):
    """Return the parts and the compiled train step of a small model."""
    raw = configfile.load(str(ROOT / "configs" / "quickstart.py")).to_dict()
    raw["model"] |= {
        "num_layers": 3,
        "embed_dim": 16,
        "num_heads": 8,
        "num_kv_heads": 4,
        "mlp_dim": 48,
        "vocab_size": 64,
        "dtype": "float32",
    }
    raw["data"]["max_length"] = 32
    raw["train"] |= {"batch_size": 16, "steps": 10, "loss_chunk": 8}
    for key, value in overrides.items():
        section, name = key.split("__")
        raw[section][name] = value
    config = configs.check(raw)
    layout = compose.open_layout(config)
    parts = compose.build(config, layout, corpus_tokens=1)
    with layout.active():
        batch = parts.abstract_batch(config.train.batch_size)
        lowered = parts.train_step.lower(parts.abstract, batch)
        return parts, lowered.compile()


def _said(preset):
    sizes = {"mesh__data": 2, "mesh__tensor": 4} if preset == "tensor" else {}
    parts, compiled = _compiled(mesh__preset=preset, **sizes)
    found = estimates.traffic(program.read(compiled.as_text()), parts.layout.mesh)
    return sorted(
        f"{t.kind} over {'*'.join(t.axes)}: {t.count} times, {t.bytes} bytes"
        for t in found
    )


@pytest.mark.parametrize("preset", meshes.PRESETS)
def test_each_preset_says_what_it_said_before_and_nothing_more(preset):
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    found = _said(preset)
    if os.environ.get("FM_WRITE_GOLDEN"):  # after a change that was meant and looked at
        golden |= {"jaxlib": jaxlib.__version__, preset: found}
        GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
    if golden["jaxlib"] != jaxlib.__version__:
        pytest.skip(f"the golden file was written with jaxlib {golden['jaxlib']}")
    assert found == golden[preset]


def test_data_parallel_devices_say_their_gradients_once():
    parts, compiled = _compiled()
    found = estimates.traffic(program.read(compiled.as_text()), parts.layout.mesh)
    (said,) = found
    assert (said.kind, said.axes) == ("all-reduce", ("data",))
    weights = estimates.device_bytes(parts.abstract.params)
    # Every gradient in float32, once, and a few sums and norms.
    assert weights <= said.bytes <= 1.05 * weights
    assert said.wire_bytes == pytest.approx(2 * said.bytes * 7 / 8)
    assert not said.crosses_slices


def test_what_crosses_slices_is_told_apart():
    parts, compiled = _compiled(
        mesh__preset="hsdp", mesh__dcn_data=2, train__batch_size=16
    )
    read = program.read(compiled.as_text())
    found = estimates.traffic(read, parts.layout.mesh, num_slices=2)
    assert {t.axes for t in found if t.crosses_slices} >= {("data",)}
    assert all("data" in t.axes for t in found if t.crosses_slices)
    assert any(t.axes == ("fsdp",) and not t.crosses_slices for t in found)


def test_logits_are_never_whole():
    # Odd sizes, so that 7 * 40 * 416 passes for nothing else.
    sizes = {
        "data__max_length": 40,
        "model__vocab_size": 416,
        "train__batch_size": 8,
        "eval__batch_size": 8,
    }
    for chunk, is_whole in ((8, False), (0, True)):
        _, compiled = _compiled(train__loss_chunk=chunk, **sizes)
        arrays = program.read(compiled.as_text()).arrays
        logits = [a for a in arrays if 416 in a.dims and np.prod(a.dims) >= 40 * 416]
        assert bool(logits) == is_whole


def test_weights_are_never_whole_on_a_device_but_one_layer_at_a_time():
    parts, compiled = _compiled(mesh__preset="fsdp")
    arrays = program.read(compiled.as_text()).arrays
    stacked = {
        leaf.shape
        for leaf in jax.tree.leaves(parts.abstract.params)
        if leaf.ndim > 2 and leaf.size > 1000
    }
    assert stacked and not stacked & {array.dims for array in arrays}


@pytest.mark.parametrize("layers", [24, 96])
def test_the_program_does_not_grow_with_depth(layers):
    few = _compiled(model__num_layers=4)[1].as_text()
    many = _compiled(model__num_layers=layers)[1].as_text()
    # Fusions differ by a few lines; unrolled, it would be six times as long and more.
    assert many.count("\n") == pytest.approx(few.count("\n"), rel=0.05)
    # And yet the work is counted for all layers.
    works = [program.read(text).flops for text in (few, many)]
    assert works[1] > 0.8 * works[0] * layers / 4 - works[0]


def test_memory_is_split_into_what_there_is_to_hold():
    parts, compiled = _compiled(mesh__preset="fsdp", train__ema_decay=0.9)
    memory = parts.estimate(compiled, None).memory
    params = estimates.device_bytes(parts.abstract.params)
    assert memory.params == memory.average == memory.gradients == params
    assert 2 * params <= memory.optimizer <= 2 * params + 64
    assert memory.batch == 2 * 32 * 6 * 4  # rows, positions, arrays, bytes
    stats = compiled.memory_analysis()
    held = stats.argument_size_in_bytes + stats.temp_size_in_bytes
    held += stats.output_size_in_bytes - stats.alias_size_in_bytes
    # XLA drops an argument that the step does not read, and pads.
    assert memory.total == pytest.approx(held, rel=0.01)


def test_moments_in_bfloat16_halve_the_optimizer():
    whole, _ = _compiled(mesh__preset="fsdp")
    half, _ = _compiled(
        mesh__preset="fsdp", optimizer__mu_dtype="bfloat16",
        optimizer__nu_dtype="bfloat16",
    )  # fmt: skip
    sizes = [estimates.device_bytes(p.abstract.opt_state[1]) for p in (whole, half)]
    assert sizes[1] == pytest.approx(sizes[0] / 2, rel=0.01)


def test_the_roofline_is_the_slowest_of_the_three():
    parts, compiled = _compiled()
    chip = dataclasses.replace(
        accelerators.CHIPS["v5e"],
        flops={"bfloat16": 1e9},
        hbm_bytes_per_second=1e8,
        link_bytes_per_second=1e6,
    )
    found = parts.estimate(compiled, chip)
    assert found.compute_seconds == found.flops / 1e9
    assert found.memory_seconds == found.bytes_accessed / 1e8
    (said,) = found.traffic
    assert found.network_seconds == said.wire_bytes / 1e6
    assert found.seconds == max(
        found.compute_seconds, found.memory_seconds, found.network_seconds
    )
    assert parts.estimate(compiled, None).seconds is None


@pytest.mark.parametrize(
    "count, text",
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2.5e9, "2.5 GB"), (3e12, "3 TB")],
)
def test_bytes_are_shown_in_the_unit_that_suits_them(count, text):
    assert estimates.size(count) == text
