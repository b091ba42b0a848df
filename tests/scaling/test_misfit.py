"""Tests of gradients and curvatures against differences of the misfit itself."""

import numpy as np
import pytest

from fm_jax.scaling import laws, misfit

LAWS = {
    "chinchilla": "chinchilla",
    "tied": "tied",
    "E held": "chinchilla(E=1.7)",
    "A held": "chinchilla(A=400)",
    "tied, B and alpha held": "tied(B=400,alpha=0.3)",
    "kaplan": "kaplan",
    "data_constrained": "data_constrained",
}
THETA = {"E": 1.7, "A": 400.0, "B": 410.0, "alpha": 0.34, "beta": 0.28,
         "R_D": 15.0, "R_N": 5.0,
         "N_c": 5e8, "D_c": 1e10, "alpha_N": 0.24, "alpha_D": 0.25}  # fmt: skip


def _problem(name, space, lanes=3, points=17):
    law = laws.find(LAWS[name])
    rng = np.random.default_rng(0)
    tokens = np.exp(rng.uniform(20, 26, points))
    columns = {"params": np.exp(rng.uniform(16, 23, points)), "tokens": tokens,
               "unique_tokens": tokens / 4.0}  # fmt: skip
    theta = np.array([THETA[n] for n in law.names])
    theta = theta * (1 + 0.01 * rng.standard_normal((lanes, len(theta))))
    loss = law.loss(theta[:1], columns)
    targets = loss * np.exp(0.02 * rng.standard_normal((lanes, points)))
    targets = np.log(targets) if space == "log" else targets
    weights = rng.integers(0, 4, (lanes, points)).astype(float)
    model = misfit.of(law, columns, space)
    return model, theta, (weights, targets), columns


@pytest.mark.parametrize("space", ["log", "linear"])
@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("delta", [0.02, np.inf])
def test_gradient_and_exact_curvature_are_the_misfits_derivatives(name, space, delta):
    model, theta, points, _ = _problem(name, space)
    x = model.coordinates(theta)
    value, slopes, bends = model.expand(x, *points, delta, exact=True)
    np.testing.assert_allclose(value, model.value(x, *points, delta), rtol=1e-12)
    unit = np.sqrt(np.abs(np.diagonal(bends, axis1=1, axis2=2)))
    close = 1e-6 if isinstance(model, misfit.PowerMisfit) else 1e-3
    step = 1e-6
    for i, each in enumerate(step * np.eye(x.shape[1])):
        ahead = model.expand(x + each, *points, delta, exact=True)
        behind = model.expand(x - each, *points, delta, exact=True)
        slope = (ahead[0] - behind[0]) / (2 * step)
        bend = (ahead[1] - behind[1]) / (2 * step)
        scale = np.sqrt(value) * unit[:, i]
        assert (np.abs(slope - slopes[:, i]) < 1e-6 * scale).all()
        scale = unit * unit[:, i : i + 1]
        assert (np.abs(bend - bends[:, i]) < close * scale).all()


@pytest.mark.parametrize("name", ["chinchilla", "tied", "kaplan"])
def test_the_other_curvature_is_that_of_reweighted_least_squares(name):
    model, theta, (weights, targets), columns = _problem(name, "log")
    x, delta, step = model.coordinates(theta), 0.01, 1e-6

    def logs(x):
        return np.log(laws.find(LAWS[name]).loss(model.theta(x), columns))

    steps = step * np.eye(x.shape[1])
    jacobian = [(logs(x + each) - logs(x - each)) / (2 * step) for each in steps]
    pull = weights * np.minimum(1, delta / np.abs(targets - logs(x)))
    expected = np.einsum("rn,prn,qrn->rpq", pull, jacobian, jacobian)
    found = model.expand(x, weights, targets, delta, exact=False)[2]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7 * expected.max())


@pytest.mark.parametrize("name", LAWS)
def test_coordinates_are_another_way_to_say_theta(name):
    model, theta, *_ = _problem(name, "log")
    np.testing.assert_allclose(model.theta(model.coordinates(theta)), theta, rtol=1e-12)


def test_the_misfit_is_hubers_and_its_limits():
    residuals = np.array([[0.5, -2.0, 0.0, 3.0]])
    weights = np.array([[1.0, 2.0, 5.0, 0.0]])
    for delta, expected in (
        (1.0, 0.125 + 2 * (2 - 0.5)),
        (np.inf, 0.125 + 2 * 2.0),
        (0.0, 0.5 + 2 * 2.0),
    ):
        assert misfit.measured(residuals, weights, delta) == pytest.approx(expected)
