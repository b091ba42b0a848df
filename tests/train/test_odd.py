"""Tests of steps that go wrong: noticed, kept, made again."""

import json
import shutil

import numpy as np
import pytest

from fm_jax import config as configs
from fm_jax import configfile, events
from fm_jax.errors import DivergedError
from fm_jax.runs import Run
from fm_jax.train import autopsy, feeds, replay, run


def test_a_spike_is_far_above_the_last_losses():
    rng = np.random.default_rng(0)
    spikes = autopsy.Spikes()
    assert not any(spikes.is_one(x) for x in (9.0, 1.0) * 10)  # too few to tell
    assert not any(spikes.is_one(3 + 0.1 * x) for x in rng.standard_normal(200))
    assert not spikes.is_one(3.4)
    assert spikes.is_one(3.8)
    assert 3.8 not in spikes.losses
    assert not spikes.is_one(1.0)  # a fall is none


def test_losses_that_stay_high_are_told_once(tmp_path):
    """Fault 33, numbers: a run diverges and its losses stay finite.

    Promise: once they are over twice the best for 128 steps, that is said, once.
    """
    said = []
    odd = autopsy.Oddities(Run(tmp_path), None, None, None, said.append)
    losses = [2.0, *[4.1] * 127, 3.9, *[4.1] * 127]
    for step, loss in enumerate(losses):
        odd.look(step, loss)
    assert not said
    for step in range(400):
        odd.look(step, 4.1)
    (line,) = said
    assert "over 2 times its best, 2, for 128 steps" in line


@pytest.fixture
def settings(corpus, tmp_path):
    """Return a config of a run that takes no time."""
    raw = configfile.load_base()
    raw["data"] |= {"source": "text", "paths": (str(corpus),), "eval_fraction": 0.2,
                    "tokenizer": "bytes", "max_length": 16,
                    "cache_dir": str(tmp_path / "cache")}  # fmt: skip
    raw["model"] |= {"num_layers": 2, "num_heads": 2, "num_kv_heads": 2,
                     "embed_dim": 16, "mlp_dim": 24, "dtype": "float32"}  # fmt: skip
    raw["train"] |= {"batch_size": 8, "steps": 60, "compile_cache": ""}
    raw["eval"] |= {"every": 0, "max_batches": 2, "batch_size": 8}
    raw["checkpoint"] |= {"every": 0}
    raw["sample"] |= {"num_tokens": 0}
    raw["log"] |= {"every": 1}
    return raw


def _broken(monkeypatch, steps, value):
    """Let the batches of these steps have a weight of `value`."""
    whole = feeds.train_batches

    def batches(parts, data, start):
        for step, batch in enumerate(whole(parts, data, start), start + 1):
            weights = batch["loss_weights"].copy()
            if step in steps:
                weights[1, 2] = value
            yield batch | {"loss_weights": weights}

    monkeypatch.setattr(feeds, "train_batches", batches)


def test_a_run_goes_on_past_a_step_that_is_not_finite_and_keeps_it(
    settings, tmp_path, monkeypatch
):
    """Fault 31, numbers: one batch gives a gradient that is not finite.

    Promise: its step changes nothing and is told; its documents and the norms are kept.
    """
    _broken(monkeypatch, {7, 8}, np.nan)
    found = run.train(configs.check(settings), tmp_path / "run", ["fm", "train"])
    assert found.is_done()
    steps, losses = found.series("train/loss")
    assert steps == [n for n in range(1, 61) if n not in (7, 8)]
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
    assert found.series("train/skipped") == ([7, 8], [1, 1])
    odd = [row for row in events.read(found) if row["event"] == "odd"]
    assert [row["step"] for row in odd] == [7, 8]
    folder = found.path / "odd" / "step-7"
    numbers = json.loads((folder / "numbers.json").read_text())
    assert "train/loss is nan" in numbers["why"]
    layers = numbers["params"]["blocks/attention/query/kernel"]
    assert len(layers) == 2 and all(x > 0 for x in layers)
    assert any("mu/blocks" in name for name in numbers["optimizer"])
    text = (folder / "batch.txt").read_text()
    assert "row 7" in text and ".txt: tokens" in text
    with np.load(folder / "batch.npz") as arrays:
        assert arrays["tokens"].shape == (8, 16)
    assert "WARNING: step 7" in (found.path / "log.txt").read_text()


def test_too_many_such_steps_in_a_row_end_the_run(settings, tmp_path, monkeypatch):
    """Fault 31, numbers: gradients stay not finite.

    Promise: after train.max_skips steps in a row exit 76; nothing of it is saved.
    """
    settings["train"]["max_skips"] = 2
    settings["checkpoint"]["every"] = 4
    _broken(monkeypatch, range(10, 100), np.inf)
    with pytest.raises(DivergedError, match="at step 12"):
        run.train(configs.check(settings), tmp_path / "run", ["fm", "train"])
    found = Run(tmp_path / "run")
    assert found.series("train/skipped")[0] == [10, 11]
    assert "DivergedError" in (found.path / "FAILED").read_text()
    assert (found.path / "exits" / "0").read_text() == "76\n"
    assert sorted(p.name for p in found.checkpoints.iterdir() if p.name.isdigit()) == [
        "4",
        "8",
    ]


def test_a_spike_is_kept_with_its_batch(settings, tmp_path, monkeypatch):
    """Fault 32, numbers: the loss leaps.

    Promise: the step is told and its batch kept; nothing else changes.
    """
    whole = autopsy.Spikes.is_one
    monkeypatch.setattr(
        autopsy.Spikes, "is_one", lambda self, x: whole(self, x + 9 * _is_fifty(self))
    )
    found = run.train(configs.check(settings), tmp_path / "run", ["fm", "train"])
    (odd,) = [row for row in events.read(found) if row["event"] == "odd"]
    assert "spike" in odd["why"]
    assert (found.path / "odd" / f"step-{odd['step']}" / "batch.txt").exists()
    assert len(found.series("train/loss")[0]) == 60


def _is_fifty(spikes) -> bool:
    spikes.seen = getattr(spikes, "seen", 0) + 1
    return spikes.seen == 50


def test_a_run_goes_back_and_leaves_out_what_it_diverged_on(
    settings, tmp_path, monkeypatch
):
    """Fault 31, numbers: a run diverges, and --rewinds is given.

    Promise: it goes back to its last checkpoint, leaves out the batches since, goes on.
    """
    settings["train"]["max_skips"] = 0
    settings["checkpoint"] |= {"every": 20, "keep": 3}
    _broken(monkeypatch, {33}, np.nan)
    config, folder = configs.check(settings), tmp_path / "run"
    with pytest.raises(DivergedError, match="at step 33"):
        run.train(config, folder, ["fm", "train"])
    found = run.train(config, folder, ["fm", "train"], None, 1)
    assert found.is_done()
    steps, losses = found.series("train/loss")
    assert steps == [*range(1, 21), *range(34, 61)]
    assert json.loads((folder / "left_out.json").read_text()) == list(range(21, 34))
    assert not found.series("train/skipped")[0]
    # On a start that goes on before them they are left out as well: the same bits.
    for step in found.checkpoints.iterdir():
        if step.name in ("40", "60"):
            shutil.rmtree(step)
    (folder / "DONE").unlink()
    again = run.train(config, folder, ["fm", "train"])
    assert again.series("train/loss") == (steps, losses)
    odd = replay.replay(folder, 36, lambda line: None)
    assert odd.start == 20 and not odd.changed
    assert "train/loss" in odd.written
