"""The optimum of a compute against scipy, identities and published numbers."""

import numpy as np
import pytest
from scipy import optimize

from fm_jax.scaling import frontier, laws

CHINCHILLA = laws.LAWS["chinchilla"]
# E, A, B, alpha, beta of Huber(1e-3) on Epoch's 240 points of Hoffmann et al.
THETA = np.array([1.817218, 477.826, 2143.417, 0.3473105, 0.3671724])
FLOPS = np.array([3e15, 5.76e23, 1e27])
OTHERS = {
    "chinchilla": ({}, THETA),
    "tied": ({}, THETA[:4]),
    "kaplan": ({}, np.array([0.3, 6.4e13, 1.8e13, 0.076, 0.103])),
    # Muennighoff et al., 2305.16264, with 25e9 different tokens.
    "data_constrained": (
        {"unique_tokens": 25e9},
        np.array([1.8690, 521.2, 1488.0, 0.35266, 0.35266, 15.387756, 5.309743]),
    ),
}


def _loss(law, theta, params, tokens, columns=None):
    at = {"params": np.atleast_1d(params), "tokens": np.atleast_1d(tokens)}
    at |= {name: np.full(at["params"].shape, v) for name, v in (columns or {}).items()}
    return law.loss(theta, at)


def _by_scipy(law, theta, flops, columns):
    def loss(ln_params):
        params = np.exp(ln_params)
        return _loss(law, theta, params, flops / 6 / params, columns)[0]

    found = optimize.minimize_scalar(
        loss, bounds=(0, np.log(flops / 6)), method="bounded", options={"xatol": 1e-10}
    )
    return np.exp(found.x), found.fun


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("flops", [1e18, 1e22])
def test_the_optimum_is_not_beaten_by_scipy(name, flops):
    columns, theta = OTHERS[name]
    law = laws.LAWS[name]
    params, tokens = frontier.optimum(law, theta, flops, columns=columns)
    other, least = _by_scipy(law, theta, flops, columns)
    np.testing.assert_allclose(params, other, rtol=2e-5)
    found = _loss(law, theta, params, tokens, columns)[0]
    assert found <= least * (1 + 1e-15)


@pytest.mark.parametrize("name", ["chinchilla", "tied"])
def test_the_search_finds_the_closed_form(name):
    law, theta = laws.LAWS[name], OTHERS[name][1]
    params, tokens = frontier.optimum(law, theta, FLOPS)
    searched = frontier.search(law, theta, FLOPS)
    np.testing.assert_allclose(searched[0], params, rtol=2e-10)
    np.testing.assert_allclose(6 * params * tokens, FLOPS, rtol=1e-14)


def test_the_optimum_is_the_one_that_the_published_fit_implies():
    params, tokens = frontier.optimum(CHINCHILLA, THETA, 5.76e23)
    assert params == pytest.approx(7.319e10, rel=2e-4)
    assert tokens / params == pytest.approx(17.92, abs=0.01)


def test_the_optimum_grows_by_the_exponents_of_the_law():
    for name in ("chinchilla", "tied", "kaplan"):
        law, theta = laws.LAWS[name], OTHERS[name][1]
        params, tokens = frontier.optimum(law, theta, np.array([1e20, 1e22]))
        a, b = law.exponents(theta)
        assert np.log(params[1] / params[0]) == pytest.approx(a * np.log(100), rel=1e-8)
        assert np.log(tokens[1] / tokens[0]) == pytest.approx(b * np.log(100), rel=1e-8)


def test_a_minimum_on_a_kink_is_found():
    """While tokens are new, the optimum lies where params begin to count less."""
    columns, theta = OTHERS["data_constrained"]
    _, a, b, alpha, _, _, _ = theta
    params, _ = frontier.optimum(
        laws.LAWS["data_constrained"], theta, 1e18, columns=columns
    )
    expected = (a / b) ** (1 / (2 * alpha)) * np.sqrt(1e18 / 6)
    assert params == pytest.approx(expected, rel=1e-6)


def test_draws_and_computes_broadcast():
    draws = THETA * np.random.default_rng(0).uniform(0.9, 1.1, (4, 5))
    for find in (frontier.optimum, frontier.search):
        params, tokens = find(CHINCHILLA, draws[:, None], FLOPS)
        assert params.shape == tokens.shape == (4, 3)
        alone, _ = find(CHINCHILLA, draws[2], FLOPS[1])
        np.testing.assert_allclose(params[2, 1], alone, rtol=1e-12)


def test_a_held_parameter_changes_no_optimum():
    held = laws.fixed(CHINCHILLA, E=THETA[0])
    found = frontier.optimum(held, THETA[1:], FLOPS)
    np.testing.assert_array_equal(found, frontier.optimum(CHINCHILLA, THETA, FLOPS))


def test_without_an_optimum_there_is_no_number():
    theta = np.array([THETA, THETA * [1, 1, 1, -1, 1], THETA * [1, 1, 0, 1, 1]])
    for find in (frontier.optimum, frontier.search):
        params, tokens = find(CHINCHILLA, theta, 1e21)
        np.testing.assert_array_equal(np.isnan(params), [False, True, True])
        np.testing.assert_array_equal(np.isnan(tokens), [False, True, True])
    low, high = frontier.flat_range(CHINCHILLA, theta, 1e21)
    np.testing.assert_array_equal(np.isnan([low, high]), [[False, True, True]] * 2)


@pytest.mark.parametrize("name", OTHERS)
def test_the_flat_range_ends_where_the_loss_is_up_by_the_tolerance(name):
    columns, theta = OTHERS[name]
    law = laws.LAWS[name]
    params, tokens = frontier.optimum(law, theta, 1e21, columns=columns)
    limit = (1 + frontier.NEAR) * _loss(law, theta, params, tokens, columns)
    low, high = frontier.flat_range(law, theta, 1e21, columns=columns)
    assert low < params < high
    for end in (low, high):
        found = _loss(law, theta, end, 1e21 / 6 / end, columns)
        np.testing.assert_allclose(found, limit, rtol=1e-12)


def test_a_range_that_no_loss_leaves_ends_at_one_parameter_and_one_token():
    flat = THETA * [1e9, 1, 1, 1, 1]  # E is all of the loss
    low, high = frontier.flat_range(CHINCHILLA, flat, 1e12)
    assert low == pytest.approx(1)
    assert high == pytest.approx(1e12 / 6)


@pytest.mark.parametrize("name", ["chinchilla", "kaplan"])
def test_params_and_tokens_of_an_optimum_find_each_other(name):
    law, theta = laws.LAWS[name], OTHERS[name][1]
    params, tokens = frontier.optimum(law, theta, FLOPS)
    np.testing.assert_allclose(
        frontier.tokens_of(law, theta, params), tokens, rtol=1e-7
    )
    np.testing.assert_allclose(
        frontier.params_of(law, theta, tokens), params, rtol=1e-7
    )


def test_a_law_without_optimum_has_no_tokens_for_params():
    theta = THETA * [1, 1, 1, -1, 1]
    assert np.isnan(frontier.tokens_of(CHINCHILLA, theta, 1e9))
