"""The optimum as fit.json has it: as a prediction has it, and what it leaves out."""

import numpy as np
import pytest

from fm_jax.scaling import frontier, laws, optimum, predict

LAW = laws.LAWS["chinchilla"]
THETA = np.array([1.817218, 477.826, 2143.417, 0.3473105, 0.3671724])
DRAWS = THETA * (1 + 0.01 * np.random.default_rng(0).standard_normal((300, 5)))


def test_a_fit_and_its_prediction_say_the_same_of_a_compute():
    ends = {"params": [1e7, 1e10], "tokens": [1e9, 1e12], "flops_6nd": [1e18, 1e22]}
    third = dict(zip(LAW.names, map(float, THETA), strict=True))
    fit = {"inputs": {"count": "total"}, "range": ends, "approach3": third}
    fit |= {"warnings": []}
    third["residual_sd"] = 0.01
    found = predict.predict(fit, {"approach3": DRAWS}, LAW, flops=1e23)
    row = optimum.row(LAW, THETA, DRAWS, 1e23, largest=1e22)
    assert row["extrapolation"] == found["extrapolation"] == pytest.approx(10)
    for name in ("params", "tokens", "tokens_per_param", "loss"):
        assert row[name] == found[name]["value"]
        assert row["ci"][name] == found[name]["interval"]
    assert row["flat"] == found["flat_range"]


def test_the_loss_is_that_of_the_run_that_would_be_trained():
    row = optimum.row(LAW, THETA, DRAWS, 1e23, largest=1e22)
    at = {name: np.array([row[name]]) for name in ("params", "tokens")}
    ends = np.quantile(LAW.loss(DRAWS, at)[:, 0], [0.025, 0.975])
    np.testing.assert_allclose(row["ci"]["loss"], ends, rtol=1e-12)
    # Each draw's own best run is never worse than that one.
    params, tokens = frontier.optimum(LAW, DRAWS, 1e23)
    own = {"params": params[:, None], "tokens": tokens[:, None]}
    assert np.quantile(LAW.loss(DRAWS, own), 0.975) < ends[1]


def test_draws_without_an_optimum_are_counted():
    draws = DRAWS.copy()
    draws[:7, 3] = -0.1
    row = optimum.row(LAW, THETA, draws, 1e23, largest=1e22)
    assert row["draws_without"] == 7
    assert np.isfinite(row["ci"]["params"]).all()


def test_a_law_that_reads_more_has_no_row_of_its_own():
    law = laws.LAWS["data_constrained"]
    row = optimum.row(law, np.ones(7), np.ones((9, 7)), 1e23, largest=1e22)
    assert row["skipped"] == "the law data_constrained reads " + ", ".join(law.columns)
