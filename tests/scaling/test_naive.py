"""Tests of the loop that the kernel is timed beside: it must do the same work."""

import numpy as np
import pytest

from fm_jax.scaling import laws, naive, problem


@pytest.fixture(scope="module")
def asked():
    return problem.of(naive._drawn(), laws.LAWS["chinchilla"], delta=1e-3, space="log")


def test_the_loops_objective_is_the_one_that_is_fitted(asked):
    fitted = asked.fit()
    e, a, b, alpha, beta = fitted.theta
    x = np.array([np.log(a), np.log(b), np.log(e), alpha, beta])
    logs = (
        np.log(asked.columns["params"]),
        np.log(asked.columns["tokens"]),
        np.log(asked.loss),
    )
    assert naive.objective(x, *logs) == pytest.approx(fitted.objective, rel=1e-10)


def test_the_loop_never_ends_below_ours(asked, monkeypatch):
    monkeypatch.setattr(naive, "SAMPLE", 3)
    found = naive.compare(asked, np.random.default_rng(0))
    assert found["below"] > -1e-9
    assert found["ratio"] == pytest.approx(
        (found["loop_point"] + found["loop_draws"]) / (found["point"] + found["draws"])
    )
