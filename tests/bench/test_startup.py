"""Tests of the bench of a run's start: what it runs and adds up, never how fast."""

import re

import pytest

from fm_jax import config as configs
from fm_jax import configfile
from fm_jax.bench import startup
from fm_jax.errors import UserError

PARTS = ("import", "data", "trace", "compile", "first_step", "other")


@pytest.fixture
def raw(tmp_path):
    raw = configfile.load("configs/bench.py:tiny").to_dict()
    raw["model"] |= {"num_layers": 1, "embed_dim": 12, "num_heads": 2, "vocab_size": 37}
    raw["data"] |= {"source": "synthetic", "tokenizer": "symbols", "max_length": 7}
    raw["data"]["cache_dir"] = str(tmp_path)
    raw["synthetic"] |= {"num_symbols": 29, "num_tokens": 900, "num_eval_tokens": 90}
    raw["sample"]["num_tokens"] = 0
    return raw


@pytest.mark.slow
def test_a_run_of_the_command_is_timed_from_its_start_to_its_first_step(raw):
    found = startup.startup(configs.check(raw))
    for kind in ("cold", "warm"):
        parts = [found.pop(f"{kind}_{part}_seconds") for part in PARTS]
        assert min(parts) >= 0
        whole = found.pop(f"{kind}_first_step_after_seconds")
        assert sum(parts) == pytest.approx(whole)
    assert not found


def test_parts_are_all_of_the_whole_and_medians_of_rounds(raw, monkeypatch):
    # Each round a process without and one with compiled programs.
    totals = iter([9, 4, 20, 3, 7, 8])

    def phases(config, folder, name):
        data = {"prepare_data": 0.25, "wait_for_data": 0.25}
        spent = {"import": 1.0, "init": 0.5, "train": 0.125, **data}
        return spent | {"total": float(next(totals))}

    monkeypatch.setattr(startup, "_phases", phases)
    found = startup.startup(configs.check(raw), rounds=3)
    assert found["cold_first_step_after_seconds"] == 9
    assert found["warm_first_step_after_seconds"] == 4
    assert found["cold_data_seconds"] == found["warm_data_seconds"] == 0.5
    assert found["warm_first_step_seconds"] == 0.125
    assert found["warm_trace_seconds"] == found["warm_compile_seconds"] == 0
    assert found["warm_other_seconds"] == 4 - 1.625


def test_what_a_process_said_that_failed_is_said(raw):
    raw["mesh"]["data"] = 64
    with pytest.raises(UserError, match="must reach its first step") as caught:
        startup.startup(configs.check(raw))
    assert re.search("got: fm: .*64", str(caught.value))
