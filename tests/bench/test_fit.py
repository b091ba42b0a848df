"""Tests of the loop that fits are timed beside: it must do the same work."""

import numpy as np
import pytest

from fm_jax.bench import fit
from fm_jax.errors import UserError
from fm_jax.scaling import laws, problem


@pytest.fixture(scope="module")
def asked():
    return problem.of(fit.made_up(), laws.LAWS["chinchilla"], delta=1e-3, space="log")


def test_the_loops_objective_is_the_one_that_is_fitted(asked):
    fitted = asked.fit()
    e, a, b, alpha, beta = fitted.theta
    x = np.array([np.log(a), np.log(b), np.log(e), alpha, beta])
    logs = (
        np.log(asked.columns["params"]),
        np.log(asked.columns["tokens"]),
        np.log(asked.loss),
    )
    assert fit.objective(x, *logs) == pytest.approx(fitted.objective, rel=1e-10)


def test_the_loop_never_ends_below_ours_and_the_ratio_is_of_both_parts():
    found = fit.fit(rounds=1, num_draws=50, sample=3)
    assert (found["runs"], found["resamples"]) == (240, 50)
    assert -1e-9 < found["loop_ends_above_least"] <= found["loop_ends_above_most"]
    loop = found["point_loop_seconds"] + found["bootstrap_loop_seconds"]
    ours = found["point_fit_seconds"] + found["bootstrap_fit_seconds"]
    assert found["ratio"] == pytest.approx(loop / ours)
    assert found["ratio_low"] == found["ratio"] == found["ratio_high"]


def test_a_table_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        fit.fit(str(tmp_path / "nowhere.csv"), rounds=1)
