"""Tests of descents on functions whose least is known, and of lanes kept apart."""

import numpy as np
import pytest

from fm_jax.scaling import descent, laws, misfit

LAW = laws.LAWS["chinchilla"]
THETA = laws.PUBLISHED["hoffmann"].theta


class Rosenbrock:
    """(1 - a)^2 w + (b - a^2)^2 y within a box, as a model whose misfit it is."""

    def __init__(self, lower=-np.inf, upper=np.inf):
        self.lower, self.upper = np.full(2, lower), np.full(2, upper)

    def value(self, x, weights, targets, delta):
        a, b = x.T
        return weights[:, 0] * (1 - a) ** 2 + targets[:, 0] * (b - a**2) ** 2

    def expand(self, x, weights, targets, delta, *, exact):
        (a, b), w, y = x.T, weights[:, 0], targets[:, 0]
        off = b - a**2
        slopes = np.stack([-2 * w * (1 - a) - 4 * y * a * off, 2 * y * off], axis=1)
        bends = np.empty((len(x), 2, 2))
        bends[:, 0, 0] = 2 * w + 8 * y * a**2 - (4 * y * off if exact else 0)
        bends[:, 0, 1] = bends[:, 1, 0] = -4 * y * a
        bends[:, 1, 1] = 2 * y
        return self.value(x, weights, targets, delta), slopes, bends


def test_a_curved_valley_is_followed_to_its_end():
    starts = np.random.default_rng(0).uniform(-3, 3, (50, 2))
    shared = np.ones((1, 1))
    x, values, arrived = descent.descend(
        Rosenbrock(), starts, shared, 100 * shared, np.inf, 1e-13
    )
    assert arrived.all()
    np.testing.assert_allclose(x, 1, rtol=1e-9)
    assert (values < 1e-18).all()


def test_a_bound_is_reached_and_the_rest_is_best_there():
    starts = np.random.default_rng(0).uniform(-0.5, 0.5, (20, 2))
    shared = np.ones((1, 1))
    x, values, arrived = descent.descend(
        Rosenbrock(-0.5, 0.7), starts, shared, 100 * shared, np.inf, 1e-13
    )
    assert arrived.all()
    np.testing.assert_allclose(x, np.repeat([[0.7, 0.49]], 20, axis=0), rtol=1e-9)
    np.testing.assert_allclose(values, 0.3**2, rtol=1e-9)


@pytest.mark.parametrize("lanes_at_once", [1, 3, 64])
def test_lanes_do_not_see_each_other(monkeypatch, lanes_at_once):
    rng = np.random.default_rng(0)
    columns = {"params": np.exp(rng.uniform(16, 23, 30)),
               "tokens": np.exp(rng.uniform(20, 26, 30))}  # fmt: skip
    targets = np.log(LAW.loss(THETA, columns)) + 0.01 * rng.standard_normal((40, 30))
    weights = rng.exponential(size=(40, 30))
    model = misfit.of(LAW, columns, "log")
    starts = model.coordinates(THETA * np.exp(0.05 * rng.standard_normal((40, 5))))
    together = descent.descend(model, starts, weights, targets, 1e-3, 1e-13)
    monkeypatch.setattr(descent, "IN_CACHE", lanes_at_once * 30)
    apart = descent.descend(model, starts, weights, targets, 1e-3, 1e-13)
    assert together[2].all()
    np.testing.assert_allclose(apart[0], together[0], rtol=1e-6)
    np.testing.assert_allclose(apart[1], together[1], rtol=1e-11)


def test_a_lane_without_a_finite_misfit_does_not_arrive():
    starts = np.array([[np.nan, 1.0], [0.5, 0.5]])
    shared = np.ones((1, 1))
    _, values, arrived = descent.descend(
        Rosenbrock(), starts, shared, shared, np.inf, 1e-13
    )
    assert arrived.tolist() == [False, True]
    assert not np.isfinite(values[0])
