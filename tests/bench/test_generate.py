"""Tests of the bench of generated text: what it reports, never how fast it was."""

import pytest

from fm_jax.bench import generate

SMALL = {"batches": (1, 3), "prompt_length": 5, "num_tokens": 6, "rounds": 2}


def test_without_transformers_it_reports_our_own_rates(model_config, monkeypatch):
    def missing(config, params):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(generate, "load_theirs", missing)
    found = generate.run(model_config(num_layers=1), int8=True, **SMALL)
    assert found["transformers"].startswith("no torch: pip install")
    for batch in (1, 3):
        assert found[f"tokens_per_second_batch_{batch}"] > 0
        assert found[f"int8_tokens_per_second_batch_{batch}"] > 0
        assert found[f"prefill_seconds_batch_{batch}"] > 0
        assert f"ratio_batch_{batch}" not in found


def test_both_write_the_same_text_from_the_same_weights(model_config):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    config = model_config(num_layers=1, activation="relu2", qk_norm=True)
    found = generate.run(config, **SMALL)
    assert found["model"].startswith("a Llama of the config's sizes: 1 layers, 12 dims")
    for batch in (1, 3):
        assert found[f"same_text_batch_{batch}"]
        low, high = (
            found[f"ratio_low_batch_{batch}"],
            found[f"ratio_high_batch_{batch}"],
        )
        assert 0 < low <= found[f"ratio_batch_{batch}"] <= high


def test_a_model_that_transformers_has_is_timed_as_it_is(model_config):
    config, name = generate.comparable(model_config(), 40)
    assert name.startswith("the config's own (")
    assert config == model_config(max_length=40)
