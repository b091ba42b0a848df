"""Tests of the bench of checkpoints: what it writes and leaves, never how fast."""

import shutil

import jax
import numpy as np
import pytest

from fm_jax import config as configs
from fm_jax import configfile
from fm_jax.bench import checkpoint
from fm_jax.errors import UserError


@pytest.fixture
def config():
    raw = configfile.load("configs/bench.py:tiny").to_dict()
    raw["model"] |= {"num_layers": 1, "embed_dim": 12, "num_heads": 2, "vocab_size": 37}
    raw["train"]["batch_size"] = raw["eval"]["batch_size"] = 8
    return configs.check(raw)


def test_every_byte_of_the_state_is_written_and_read_and_nothing_is_left(
    config, tmp_path
):
    found = checkpoint.checkpoint(config, rounds=2, folder=tmp_path)
    # Parameters and two moments of each in float32, and three counts of steps.
    vectors, matrices = 3 * 12, 12 * 37 + 12 * 256 + 12 * 12 * 12
    assert found["state_bytes"] == 4 * (3 * (vectors + matrices) + 3)
    for name in ("stall", "save", "restore", "bare_write", "bare_read"):
        low, median = found[f"{name}_seconds_low"], found[f"{name}_seconds"]
        assert 0 < low <= median <= found[f"{name}_seconds_high"]
    assert found["stall_seconds"] <= found["save_seconds_high"]
    for name in ("save", "restore"):
        rate = found["state_bytes"] / found[f"{name}_seconds"]
        assert found[f"{name}_bytes_per_second"] == pytest.approx(rate)
        assert found[f"{name}_ratio_low"] <= found[f"{name}_ratio_high"]
    assert list(tmp_path.iterdir()) == []


def test_the_state_that_is_written_is_noise_that_nothing_makes_smaller():
    shape = jax.ShapeDtypeStruct((64, 37), "float32", sharding=_here())
    count = jax.ShapeDtypeStruct((), "int32", sharding=_here())
    draw = checkpoint._noise({"a": shape, "b": {"c": shape, "step": count}})
    found = draw(jax.random.key(3))
    assert found["b"]["step"] == 0
    for x in (found["a"], found["b"]["c"]):
        assert len(np.unique(x)) > 0.99 * x.size
    assert not np.array_equal(found["a"], found["b"]["c"])


def _here():
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def test_a_disk_without_room_is_refused_before_anything_is_written(
    config, tmp_path, monkeypatch
):
    full = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(UserError, match="must have room for two checkpoints"):
        checkpoint.checkpoint(config, rounds=1, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []
