"""Tests of two steps in turn: who takes part and what is said, never who is faster."""

import dataclasses

import pytest

from fm_jax import config as configs
from fm_jax import configfile
from fm_jax.bench import race, versus
from fm_jax.errors import UserError


@pytest.fixture(scope="module")
def config():
    raw = configfile.load("configs/bench.py:tiny").to_dict()
    raw["model"] |= {"num_layers": 1, "embed_dim": 12, "num_heads": 2, "vocab_size": 37}
    raw["model"]["max_length"] = raw["data"]["max_length"] = 11
    raw["train"]["batch_size"] = raw["eval"]["batch_size"] = 3
    return configs.check(raw)


SECONDS = {"fm_jax": (2, 4), "pytorch": (3, 4), "pytorch_compiled": (1, 8)}


class Worker:
    """A process that takes as long as it is told to."""

    def __init__(self, spec):
        self.name, self.spec = spec["side"], spec
        self.ready = {"library": f"of {self.name}"}
        self._left = list(SECONDS[self.name])

    def turn(self):
        return race.Sample(self._left.pop(0), cpu_seconds=1, faults=10, busy=0.25)

    def end(self):
        return {"peak_host_bytes": 7}

    def close(self):
        pass


def test_ratios_are_those_of_each_round(config, monkeypatch):
    monkeypatch.setattr(race, "Worker", Worker)
    found = versus.versus(config, num_steps=5, rounds=2)
    assert found["fm_jax_tokens_per_second"] == 5 * 3 * 11 / 3
    assert found["pytorch_compiled_tokens_per_second"] == 5 * 3 * 11 / 4.5
    assert found["ratio_to_pytorch"] == (3 / 2 + 4 / 4) / 2
    assert found["ratio_to_pytorch_compiled"] == (1 / 2 + 8 / 4) / 2
    assert found["pytorch_library"] == "of pytorch"
    assert found["fm_jax_faults_per_step"] == 2
    assert found["pytorch_peak_host_bytes"] == 7
    assert found["busy"] == found["busy_most"] == 0.25


def test_a_model_of_another_shape_is_refused(config):
    model = dataclasses.replace(config.model, activation="relu2")
    with pytest.raises(UserError) as error:
        versus.versus(dataclasses.replace(config, model=model), num_steps=1, rounds=1)
    assert str(error.value) == (
        "--vs=nanogpt_like must have model.activation='gelu', as GPT-2's shape; got "
        "'relu2'. configs/bench.py is of that shape."
    )
    grouped = dataclasses.replace(config.model, num_kv_heads=1)
    with pytest.raises(
        UserError, match=r"as many model\.num_kv_heads as heads; got 1 of"
    ):
        versus.check(dataclasses.replace(config, model=grouped))
    wide = dataclasses.replace(config.model, head_dim=config.model.head_dim + 2)
    with pytest.raises(UserError, match=r"together are as wide as model\.embed_dim="):
        versus.check(dataclasses.replace(config, model=wide))


def test_both_steps_run_in_processes_of_their_own(config):
    pytest.importorskip("torch")
    found = versus.versus(config, num_steps=1, rounds=2, others=("pytorch",))
    assert found["fm_jax_library"].startswith("jax ")
    assert found["pytorch_library"].startswith("torch ")
    low, high = found["ratio_to_pytorch_low"], found["ratio_to_pytorch_high"]
    assert 0 < low <= found["ratio_to_pytorch"] <= high
