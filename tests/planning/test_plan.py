"""Tests of plans in this process: the step that is read is the step that runs."""

import dataclasses
import pathlib
import re

import jax
import numpy as np
import pytest

from fm_jax import accelerators, configfile
from fm_jax import config as configs
from fm_jax.compiled import program
from fm_jax.errors import UserError
from fm_jax.planning import plan as plans
from fm_jax.planning import topologies
from fm_jax.planning.topologies import Topology
from fm_jax.train import closing, run

ROOT = pathlib.Path(__file__).parent.parent.parent


@pytest.fixture
def raw(tmp_path):
    """Return the raw config of a run of a few steps on a text of its own."""
    rng = np.random.default_rng(0)
    for name in ("train", "eval"):
        words = rng.choice(["the", "cat", "sat", "another"], 400)
        (tmp_path / f"{name}.txt").write_text(" ".join(words))
    raw = configfile.load(str(ROOT / "configs" / "quickstart.py")).to_dict()
    raw["data"] |= {
        "source": "text", "paths": (str(tmp_path / "train.txt"),),
        "eval_paths": (str(tmp_path / "eval.txt"),), "tokenizer": "bytes",
        "max_length": 16, "cache_dir": str(tmp_path / "cache"),
    }  # fmt: skip
    raw["model"] |= {"num_layers": 2, "num_heads": 2, "embed_dim": 16, "mlp_dim": 24}
    raw["train"] |= {"batch_size": 16, "steps": 2, "accumulation": 2, "ema_decay": 0.9}
    raw["mesh"]["preset"] = "fsdp"
    raw["eval"] |= {"every": 0, "batch_size": 8, "max_batches": 1}
    raw["checkpoint"]["every"] = 0
    raw["sample"]["num_tokens"] = 0
    return raw


def _here(chip=None) -> plans.Machine:
    return plans.machine_of(None, jax.devices(), chip)


def _instructions(text: str) -> str:
    """Return a program's text without the files and calls that it was written by."""
    kept = [
        part
        for part in text.split("\n\n")
        if not re.match("FileNames|FunctionNames|FileLocations|StackFrames", part)
    ]
    return re.sub(r", metadata=\{[^}]*\}", "", "\n\n".join(kept))


@pytest.mark.slow
def test_a_plan_reads_the_very_step_that_training_runs(raw, tmp_path, monkeypatch):
    config = configs.check(raw)
    ran = {}
    predicted = closing.predicted

    def keep(parts, compiled, peak, held_before):
        ran.update(parts=parts, compiled=compiled)
        return predicted(parts, compiled, peak, held_before)

    monkeypatch.setattr(closing, "predicted", keep)
    run.train(config, tmp_path / "run", ["fm", "train"])
    parts = ran["parts"]

    read = []
    monkeypatch.setattr(
        program, "read", lambda text, old=program.read: read.append(text) or old(text)
    )
    resolved, corpus = plans.corpus_of(config)
    plan = plans.make(resolved, _here(), corpus)
    estimate = parts.estimate(ran["compiled"], None)
    assert plan.estimate == estimate
    assert (plan.config, plan.parts.num_steps) == (parts.config, parts.num_steps)
    planned, trained = map(_instructions, read)
    assert planned == trained
    assert planned.count("\n") > 100  # and it is a whole step


def test_what_is_kept_is_what_the_state_takes_on_a_device(raw):
    plan = plans.make(plans.corpus_of(configs.check(raw))[0], _here(), None)
    with plan.parts.layout.active():
        state = plan.parts.init(jax.random.key(0))
    first = jax.devices()[0]
    held = sum(
        piece.data.nbytes
        for leaf in jax.tree.leaves(state)
        for piece in leaf.addressable_shards
        if piece.device == first
    )
    memory = plan.estimate.memory
    assert memory.params + memory.optimizer + memory.average == held
    saved = plans.record(plan, mfu=0.5)["checkpoint"]
    assert saved["bytes"] == sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def test_a_plan_fits_up_to_the_last_byte(raw):
    config = plans.corpus_of(configs.check(raw))[0]
    plan = plans.make(config, _here(), None)
    assert plan.fits  # where nothing is known of the memory
    total = plan.estimate.memory.total
    for capacity, fits in ((total, True), (total - 1, False)):
        machine = dataclasses.replace(plan.machine, capacity=capacity)
        assert dataclasses.replace(plan, machine=machine).fits == fits
    refused = dataclasses.replace(plan, estimate=None, needed=total + 7)
    assert not refused.fits
    assert refused.bytes_needed == total + 7


def test_a_published_chip_gives_its_memory_and_the_devices_of_a_host():
    chip = accelerators.CHIPS["v5p"]
    found = plans.machine_of(Topology("v5p", (4, 4, 4), 2), jax.devices(), chip)
    assert (found.name, found.num_slices) == ("v5p:4x4x4*2", 2)
    assert found.capacity == chip.usable_hbm_bytes
    assert found.devices_per_host == 4
    assert not found.is_simulated
    found = plans.machine_of(
        topologies.parse("h100:8"), jax.devices(), accelerators.CHIPS["h100"]
    )
    assert (found.devices_per_host, found.is_simulated) == (8, True)


def test_an_error_of_the_compiler_that_is_not_of_memory_is_not_hidden(raw, monkeypatch):
    config = plans.corpus_of(configs.check(raw))[0]

    def refuse(self, *args, **kwargs):
        raise jax.errors.JaxRuntimeError("INTERNAL: not of memory")

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    with pytest.raises(jax.errors.JaxRuntimeError, match="not of memory"):
        plans.make(config, _here(), None)


def test_a_step_that_the_compiler_refuses_is_recorded_with_what_it_needs(
    raw, monkeypatch
):
    config = plans.corpus_of(configs.check(raw))[0]

    def refuse(self, *args, **kwargs):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. "
            "Used 20.00G of 15.75G hbm."
        )

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    machine = _here(accelerators.CHIPS["v5e"])
    found = plans.record(plans.make(config, machine, None), mfu=0.5)
    assert found["memory"]["needed"] == 20 * 2**30
    assert not found["memory"]["fits"]
    assert found["flops_per_step"]["compiled"] is None
    assert "roofline" not in found
    assert found["at_mfu"]["mfu"] == 0.5


def test_epochs_of_a_corpus_of_unknown_size_are_refused(raw):
    raw["train"] |= {"steps": 0, "epochs": 2.0}
    config = plans.corpus_of(configs.check(raw))[0]
    with pytest.raises(UserError, match=r"train\.epochs needs a corpus of known size"):
        plans.make(config, _here(), None)


def test_a_bpe_that_is_not_trained_yet_has_the_ids_that_are_asked_for(raw):
    raw["data"] |= {"tokenizer": "bpe", "vocab_size": 1000}
    config, corpus = plans.corpus_of(configs.check(raw))
    assert (config.model.vocab_size, corpus) == (1024, None)
    raw["model"]["vocab_size"] = 1001
    config, _ = plans.corpus_of(configs.check(raw))
    assert config.model.vocab_size == 1001


def test_a_model_with_fewer_ids_than_its_tokenizer_is_refused(raw):
    raw["model"]["vocab_size"] = 256
    with pytest.raises(UserError, match=r"must hold the tokenizer's ids; got 256"):
        plans.corpus_of(configs.check(raw))
