"""The config file of a prediction: runnable, as large and long as it says."""

import json
import math
import time

import numpy as np
import pytest

from fm_jax import config as configs
from fm_jax import configfile
from fm_jax.errors import UserError
from fm_jax.models import counts
from fm_jax.scaling import laws, predict
from fm_jax.sweeps import labpage, ladder, recipe
from fm_jax.sweeps import sweep as sweeps

LAW = laws.LAWS["chinchilla"]
THETA = np.array([1.817218, 477.826, 2143.417, 0.3473105, 0.3671724])


def _fit(**more):
    spread = 1 + 0.01 * np.random.default_rng(0).standard_normal((200, 5))
    record = {"law": LAW.name, "residual_sd": 0.01}
    record |= dict(zip(LAW.names, map(float, THETA), strict=True))
    ends = {"params": [1e6, 1e8], "tokens": [1e7, 1e9], "flops_6nd": [1e14, 1e17]}
    fit = {
        "inputs": {
            "count": "total",
            "path": "runs.csv",
            "sha256": "ab" * 32,
            "rows": 37,
        },
        "range": ends,
        "approach3": record,
        "by_count": {"non_embedding": record | {"range": ends, "warnings": []}},
        "warnings": ["few decades", "approach 2: few sizes"],
    }
    draws = {"approach3": THETA * spread, "approach3_non_embedding": THETA * spread}
    return fit | more, draws


def _sweep(**changed):
    """Return sweep.json's config of a sweep with rules of its own."""
    raw = configfile.load(str(recipe.SWEEP)).to_dict()
    raw["base"]["model"]["activation"] = "relu2"
    raw["base"]["data"]["max_length"] = 128
    raw["base"]["optimizer"]["learning_rate"] = 3e-3
    raw["design"] |= {"kind": "ladder", "sizes": (64, 128), "tokens_per_param": (20.0,)}
    raw["size"] |= {"aspect": 32.0, "head_dim": 32, "count": "non_embedding"}
    raw["budget"] |= {"batch": "porian", "learning_rate": "porian"}
    for key, value in changed.items():
        section, name = key.split("__")
        raw[section][name] = value
    return json.loads(json.dumps(sweeps.check(raw).raw))


def _made(asked, fit, draws):
    found = predict.predict(fit, draws, LAW, **asked)
    return found, recipe.recipe(found, fit=fit, draws=draws, law=LAW)


def _written(tmp_path, asked, fit, draws):
    found, made = _made(asked, fit, draws)
    path = tmp_path / labpage.file_name(found)
    text = labpage.write(made, path, found=found, fit=fit)
    return found, made, path, text


@pytest.mark.parametrize("asked", [{"flops": 3e17}, {"params": 5e7}, {"tokens": 2e9}])
def test_the_file_trains_what_it_says(tmp_path, asked):
    fit, draws = _fit()
    found, made, path, _ = _written(tmp_path, asked, fit, draws)
    raw = configfile.load(str(path)).to_dict()
    config = configs.check(raw)
    assert config.model.vocab_size == sweeps.vocabulary(config)
    sizes = counts.params(config.model)
    assert (made.params, made.params_total) == (sizes.total, sizes.total)
    length = config.data.max_length
    tokens = config.train.steps * config.train.batch_size * length
    assert made.tokens == tokens
    assert made.flops == 6 * sizes.total * tokens
    assert made.flops_exact == counts.flops_per_token(config.model, length) * tokens
    changed = configfile.difference(configfile.load_base(), raw)
    assert changed.keys() == made.overrides.keys()
    sections = {key.partition(".")[0] for key in changed}
    assert sections <= {"model", "train", "schedule", "optimizer"}
    assert made.params == pytest.approx(found["params"]["value"], rel=0.2)


def test_the_expected_loss_is_that_of_the_achieved_run():
    fit, draws = _fit()
    _, made = _made({"flops": 3e17}, fit, draws)
    at = {"params": np.array([made.params]), "tokens": np.array([made.tokens])}
    assert made.loss["value"] == LAW.loss(THETA, at)[0]
    ends = np.quantile(LAW.loss(draws["approach3"], at)[:, 0], [0.025, 0.975])
    np.testing.assert_allclose(made.loss["interval"], ends, rtol=1e-12)


def test_a_compute_is_kept_and_tokens_give_way_to_the_size():
    fit, draws = _fit()
    found, made = _made({"flops": 1e15}, fit, draws)
    assert made.flops == pytest.approx(1e15, rel=0.01)
    assert abs(math.log(made.params / found["params"]["value"])) > recipe.FAR
    assert any("params are as near as it gets" in text for text in made.warnings)
    assert any("tokens are as near as it gets" in text for text in made.warnings)
    found, made = _made({"params": 1e6}, fit, draws)
    assert made.tokens == pytest.approx(found["tokens"]["value"], rel=0.01)


def test_no_other_size_is_nearer():
    fit, draws = _fit(sweep=_sweep())
    found, made = _made({"flops": 1e17}, fit, draws)
    size, base = (_sweep()[name] for name in ("size", "base"))
    far = [
        abs(
            math.log(
                ladder.count_of(dial, "total", size, base["model"])
                / found["params"]["value"]
            )
        )
        for dial in range(32, 2048, 32)
    ]
    assert abs(math.log(made.params / found["params"]["value"])) == min(far)


def test_a_sweep_s_own_rules_make_the_run(tmp_path):
    fit, draws = _fit(sweep=_sweep())
    _, made, path, _ = _written(tmp_path, {"flops": 1e17}, fit, draws)
    config = configs.check(configfile.load(str(path)).to_dict())
    assert config.model.activation == "relu2"
    assert config.data.max_length == config.model.max_length == 128
    assert config.model.head_dim == 32
    assert config.model.num_layers == round(config.model.embed_dim / 32)
    # Porian et al., 2406.19146: the rate falls as N^(-1/3) from where it was tuned.
    anchor = _sweep()["budget"]["anchor_params"]
    body = counts.params(config.model).non_embedding
    expected = 3e-3 * (body / anchor) ** (-1 / 3)
    assert config.optimizer.learning_rate == pytest.approx(expected, rel=1e-3)
    rows = _sweep()["base"]["train"]["batch_size"] * (body / anchor) ** (2 / 3)
    assert config.train.batch_size == round(rows)
    assert not any("no sweep" in text for text in made.warnings)


def test_branches_are_followed_by_a_run_with_their_schedule(tmp_path):
    sweep = _sweep(design__kind="branches", design__decay_fraction=0.3)
    fit, draws = _fit(sweep=sweep)
    _, _, path, _ = _written(tmp_path, {"flops": 1e17}, fit, draws)
    config = configs.check(configfile.load(str(path)).to_dict())
    assert (config.schedule.name, config.schedule.decay_fraction) == ("wsd", 0.3)


def test_the_count_of_the_fit_sizes_the_decoder():
    fit, draws = _fit()
    found, made = _made({"flops": 3e16, "count": "non_embedding"}, fit, draws)
    _, whole = _made({"flops": 3e16}, fit, draws)
    assert made.count == "non_embedding"
    assert made.params < made.params_total
    assert made.params == pytest.approx(found["params"]["value"], rel=0.2)
    assert made.params_total > whole.params_total  # the same law, of fewer parameters


def test_a_table_s_own_count_is_declared_or_taken_as_total():
    fit, draws = _fit()
    fit["inputs"]["count"] = "as given"
    _, made = _made({"flops": 3e16}, fit, draws)
    assert made.count == "total"
    assert any("does not say what its params count" in w for w in made.warnings)
    _, made = _made({"flops": 3e16, "count": "matmul"}, fit, draws)
    assert made.count == "matmul"
    assert not any("does not say" in text for text in made.warnings)


def test_a_large_model_has_a_large_batch_and_many_steps_of_a_small_one_are_said():
    fit, draws = _fit()
    _, made = _made({"flops": 1e21}, fit, draws)
    assert made.steps < 100_000
    fit, draws = _fit(sweep=_sweep(budget__batch="fixed"))
    _, made = _made({"flops": 1e21}, fit, draws)
    assert any("steps are many" in text for text in made.warnings)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"params": 5e7, "tokens_per_param": 0.5},
            r"at least one token a parameter; got 0\.\d+, \d",
        ),
        ({"flops": 1e9}, r"at least one token a parameter; got 0\.0004"),
        ({"params": 1e6, "tokens": 1e8}, r"at least 1000000 steps; got \d+, of"),
    ],
)
def test_a_run_that_is_none_is_refused(asked, message):
    sweep = _sweep(budget__min_steps=1_000_000) if "tokens" in asked else None
    fit, draws = _fit(**({"sweep": sweep} if sweep else {}))
    with pytest.raises(UserError, match=message):
        _made(asked, fit, draws)


def test_the_largest_that_may_be_asked_for_takes_no_minute():
    fit, draws = _fit()
    begun = time.process_time()
    _made({"flops": predict.MOST_FLOPS}, fit, draws)
    assert time.process_time() - begun < 10


def test_a_warm_up_is_said_shortly_and_is_as_long(tmp_path):
    fit, draws = _fit()
    _, _, path, _ = _written(tmp_path, {"flops": 3e17}, fit, draws)
    config = configs.check(configfile.load(str(path)).to_dict())
    fraction = config.schedule.warmup_fraction
    assert fraction == 0.02  # base's, of steps that are many
