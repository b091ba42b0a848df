"""What a design is said to tell, against fits of simulated noise and closed forms."""

import numpy as np
import pytest
from scipy import integrate

from fm_jax.errors import UserError
from fm_jax.scaling import frontier, information, laws, solver

LAW = laws.LAWS["chinchilla"]
THETA = np.array([1.817218, 477.826, 2143.417, 0.3473105, 0.3671724])
TARGET = 1e21
NUM = 1500


def _design(budgets=(1e17, 3e17, 1e18), spread=(0.25, 0.5, 1, 2, 4)):
    flops = np.repeat(budgets, len(spread))
    centre, _ = frontier.optimum(LAW, THETA, flops)
    params = centre * np.tile(spread, len(budgets))
    return {"params": params, "tokens": flops / 6 / params}


def _fits(columns, noise, delta):
    """Return the parameters of NUM fits to losses with Gaussian noise in ln."""
    rng = np.random.default_rng(3)
    loss = LAW.loss(THETA, columns)
    losses = loss * np.exp(noise * rng.standard_normal((NUM, len(loss))))
    draws, _, converged = solver.refit(
        columns, loss, LAW, THETA, losses=losses, delta=delta
    )
    assert converged.mean() > 0.99  # the rest met the rounding of their losses
    return draws


def test_slopes_are_those_of_calculus():
    columns = _design()
    _, a, b, alpha, beta = THETA
    params, tokens = columns["params"], columns["tokens"]
    first, second = params**-alpha, tokens**-beta
    exact = np.stack(
        [
            np.ones_like(params),
            first,
            second,
            -a * first * np.log(params),
            -b * second * np.log(tokens),
        ],
        axis=1,
    )
    exact /= LAW.loss(THETA, columns)[:, None]
    found = information.jacobian(LAW, THETA, columns)
    np.testing.assert_allclose(found, exact, rtol=1e-8)


def test_the_variance_is_that_of_the_inverse_of_the_information():
    columns = _design()
    slopes = information.jacobian(LAW, THETA, columns)
    scaled = slopes * THETA / 0.003  # or the inverse loses its digits
    covariance = np.linalg.inv(scaled.T @ scaled) * np.outer(THETA, THETA)
    # Of a = beta / (alpha + beta), and of ln N* = (ln G) + a ln(C / 6).
    _, a, b, alpha, beta = THETA
    total = alpha + beta
    of_a = np.array([0, 0, 0, -beta, alpha]) / total**2
    ln_g = np.log(alpha * a / beta / b) / total
    of_g = np.array([0, 1 / a, -1 / b, 1 / alpha - ln_g, -1 / beta - ln_g]) / total
    found = information.optimum_sd(LAW, THETA, columns, 0.003, TARGET)
    for name, gradient in (("a", of_a), ("params", of_g + of_a * np.log(TARGET / 6))):
        expected = np.sqrt(gradient @ covariance @ gradient)
        assert found[name] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("noise", [0.0003, 0.001])
def test_least_squares_scatter_as_much_as_the_design_says(noise):
    columns = _design()
    draws = _fits(columns, noise, np.inf)
    # An sd from NUM fits is itself off by 1 / sqrt(2 NUM), 1.8 %; the rest is that the
    # estimates are not quite Gaussian.
    said = information.optimum_sd(LAW, THETA, columns, noise, TARGET)
    params, tokens = frontier.optimum(LAW, draws, TARGET)
    at = {"params": params[:, None], "tokens": tokens[:, None]}
    seen = {
        "params": np.std(np.log(params)),
        "tokens": np.std(np.log(tokens)),
        "loss": np.std(LAW.loss(draws, at)),
        "a": np.std(LAW.exponents(draws)[0]),
    }
    assert said.keys() == seen.keys()
    for name in said:
        assert seen[name] == pytest.approx(said[name], rel=0.06), name


@pytest.mark.parametrize("delta", [1e-2, 1e-3, 3e-4])
def test_huber_fits_scatter_by_the_inflation_more(delta):
    columns, noise = _design(spread=np.geomspace(0.2, 5, 15)), 1e-3
    ratio = information.inflation(noise, delta)
    said = information.optimum_sd(LAW, THETA, columns, noise, TARGET)["params"]
    params, _ = frontier.optimum(LAW, _fits(columns, noise, delta), TARGET)
    assert np.std(np.log(params)) == pytest.approx(ratio * said, rel=0.06)


def test_the_inflation_is_what_quadrature_gives():
    noise = 0.003
    for delta in (1e-4, 1e-3, 1e-2):

        def density(x):
            return np.exp(-x * x / 2 / noise**2) / noise / np.sqrt(2 * np.pi)

        ends = {"a": -12 * noise, "b": 12 * noise, "points": [-delta, delta]}
        exact = {"epsabs": 1e-15, "epsrel": 1e-10, "limit": 200}
        squared = integrate.quad(
            lambda x, d=delta: np.clip(x, -d, d) ** 2 * density(x), **ends, **exact
        )[0]
        within = integrate.quad(density, -delta, delta, **exact)[0]
        expected = np.sqrt(squared) / within / noise
        assert information.inflation(noise, delta) == pytest.approx(expected, rel=1e-6)
    assert information.inflation(noise, np.inf) == 1
    assert information.inflation(noise, 0) == pytest.approx(np.sqrt(np.pi / 2))
    # Least absolute deviations have 2 / pi of the efficiency of least squares.
    assert information.inflation(noise, 1e-5) == pytest.approx(np.sqrt(np.pi / 2), 5e-3)


def test_twice_the_runs_halve_the_variance():
    columns = _design()
    twice = {name: np.tile(column, 2) for name, column in columns.items()}
    once = information.optimum_sd(LAW, THETA, columns, 0.003, TARGET)
    both = information.optimum_sd(LAW, THETA, twice, 0.003, TARGET)
    for name in once:
        assert both[name] == pytest.approx(once[name] / np.sqrt(2), rel=1e-6)


def test_a_noisy_run_counts_by_its_own_noise():
    columns = _design()
    noise = np.full(15, 0.003)
    noise[4] = 1e9  # as if it were not there
    without = {name: np.delete(column, 4) for name, column in columns.items()}
    found = information.optimum_sd(LAW, THETA, columns, noise, TARGET)
    assert found == pytest.approx(
        information.optimum_sd(LAW, THETA, without, 0.003, TARGET), rel=1e-6
    )


@pytest.mark.parametrize(
    "columns",
    [
        # One size, two sizes, one ratio of tokens to params, four runs for five.
        {"params": np.full(6, 1e8), "tokens": np.geomspace(1e9, 1e11, 6)},
        {"params": [1e8] * 4 + [2e8] * 4, "tokens": [1e9, 3e9, 9e9, 2e10] * 2},
        {"params": [1e8, 3e8, 1e9, 3e9], "tokens": [2e9, 3e10, 1e11, 3e10]},
    ],
)
def test_what_a_design_leaves_open_is_infinite(columns):
    found = information.optimum_sd(LAW, THETA, columns, 1e-6, TARGET)
    assert found["params"] == found["tokens"] == found["a"] == np.inf


def test_a_held_parameter_makes_up_for_runs():
    columns = {"params": [1e8] * 4 + [2e8] * 4, "tokens": [1e9, 3e9, 9e9, 2e10] * 2}
    held = laws.fixed(LAW, E=THETA[0])
    found = information.optimum_sd(held, THETA[1:], columns, 0.003, TARGET)
    assert 0 < found["params"] < np.inf


def test_a_law_without_an_optimum_has_no_small_sd():
    theta = THETA * [1, 1, 1, -1, 1]
    found = information.optimum_sd(LAW, theta, _design(), 0.003, TARGET)
    assert set(found.values()) == {np.inf}


def test_laws_that_read_more_are_told_what_the_target_has():
    theta = np.array([1.8690, 521.2, 1488.0, 0.35266, 0.35266, 15.387756, 5.309743])
    law = laws.LAWS["data_constrained"]
    columns = _design(budgets=(1e17, 1e18, 1e19))
    columns["unique_tokens"] = columns["tokens"] / np.tile([1, 4, 8, 30, 60], 3)
    target = {"unique_tokens": 1e9}
    found = information.optimum_sd(law, theta, columns, 0.003, 1e20, target=target)
    assert all(0 < sd < np.inf for sd in found.values())


def test_noise_must_be_above_zero():
    with pytest.raises(ValueError, match=r"noise must be > 0; got 0\.0"):
        information.optimum_sd(LAW, THETA, _design(), 0.0, TARGET)


def _made(delta, space, sd=0.003):
    return {
        "options": {"delta": delta, "space": space},
        "range": {"loss": [2.0, 8.0]},
        "approach3": {"residual_sd": sd},
    }


def test_the_noise_of_a_run_is_inflated_by_the_objective():
    inflation = information.inflation
    found = information.run_noise(_made(1e-3, "log"))
    assert found == 0.003 * inflation(0.003, 1e-3)
    assert information.run_noise(_made(None, "log")) == 0.003  # JSON has no inf
    assert information.run_noise(_made(None, "linear"), 0.01) == 0.01
    # In nats a residual of ln loss is as large as the loss: 4, in the middle.
    found = information.run_noise(_made(1e-3, "linear"))
    assert found == pytest.approx(0.003 * inflation(0.012, 1e-3))
    for sd in (0.0, None):
        with pytest.raises(UserError, match=r"residual_sd of the fit must be > 0; got"):
            information.run_noise(_made(1e-3, "log", sd))
