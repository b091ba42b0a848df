"""Tests of what an isoFLOP fit gets wrong by its window, and of its correction."""

import numpy as np
import pytest

from fm_jax.scaling import bias, lines, slices
from tests.scaling.isoflops import (
    CHINCHILLA,
    LAW,
    SURFACES,
    expected,
    load,
    optimum,
    surface,
    true_line,
)


def fitted(columns, loss, theta=CHINCHILLA, law=LAW, **options):
    """Return a fit, its bias [S, 2], and the line [4] through the bias."""
    found = slices.fit(columns, loss, budget=columns["flops"], **options)
    wrong = bias.of(found, law, theta, columns)
    log_c = np.log([s.budget for s in found.slices])
    return found, wrong, lines.pair(log_c, wrong)


def test_the_bias_of_a_narrow_window_follows_the_third_order_formula():
    """(beta - alpha) (delta^2/2 - W^2/10), of the module's docstring, 2603.22339."""
    theta, points, half = (1.69, 406.4, 410.7, 0.4, 0.2), 4001, 0.02
    for off in (0.0, 0.02):
        _, wrong, _ = fitted(
            *surface(theta, width=np.exp(half), points=points, off=off),
            theta,
            num_bootstraps=2,
        )
        formula = (0.2 - 0.4) * (off**2 / 2 - half**2 / 10)
        assert wrong[:, 0] == pytest.approx(formula, rel=0.01)


@pytest.mark.parametrize("method", ["parabola", "cubic"])
@pytest.mark.parametrize("name", list(SURFACES))
def test_the_bias_subtracted_gives_the_true_optimum_of_the_true_law(name, method):
    theta = SURFACES[name]
    columns, loss = surface(theta, width=8, points=9, off=0.3, drift=0.04)
    found, wrong, line = fitted(columns, loss, theta, method=method)
    right = bias.corrected(found, wrong)
    if name == "asym" and method == "parabola":  # a drift moves the exponent itself
        assert abs(found.line[1] - true_line(theta)[1]) > 1e-3
    assert right.line == pytest.approx(true_line(theta), abs=1e-6)
    assert line == pytest.approx(found.line - true_line(theta), abs=1e-6)
    sizes = [s.params_optimum for s in right.slices]
    budgets = np.array([s.budget for s in found.slices])
    assert sizes == pytest.approx(optimum(theta, budgets)[0], rel=1e-6)


def test_the_bias_moves_the_draws_with_the_line():
    columns, loss = surface(width=16)
    loss = loss + 0.002 * np.random.default_rng(0).standard_normal(len(loss))
    found, wrong, line = fitted(columns, loss)
    right = bias.corrected(found, wrong)
    assert right.line == pytest.approx(found.line - line, abs=1e-9)
    assert right.draws == pytest.approx(found.draws - line, abs=1e-6)


def test_the_bias_knows_flops_that_are_not_6nd():
    columns, loss = surface(width=4)
    columns["flops"] = columns["flops"] * 1.2  # 7.2 N D
    found, wrong, _ = fitted(columns, loss)
    right = bias.corrected(found, wrong)
    budgets = np.array([s.budget for s in found.slices])
    at = np.log(optimum(CHINCHILLA, budgets / 1.2))
    share = np.polyfit(np.log(budgets), at.T, 1)
    expected = [share[1, 0], share[0, 0], share[1, 1], share[0, 1]]
    assert right.line == pytest.approx(expected, abs=1e-6)


class Flat:
    """A law without a best size, at budgets up to `largest`; there the usual one."""

    def __init__(self, largest):
        self.largest = largest

    def loss(self, theta, columns):
        flat = 2 + columns["tokens"] ** -0.3
        is_flat = 6 * columns["params"] * columns["tokens"] < self.largest
        return np.where(is_flat, flat, LAW.loss(np.array(theta), columns))


def test_a_law_without_a_best_size_leaves_the_bias_unknown():
    columns, loss = surface()
    found, wrong, _ = fitted(columns, loss, law=Flat(np.inf))
    assert np.isnan(wrong).all()
    right = bias.corrected(found, wrong)
    assert right.skipped == "the bias is known of 0 used slices, 2 needed"
    assert all(s.flags[-1] == "bias_unknown" for s in right.slices)
    assert right.record()["skipped"] == right.skipped


def test_a_slice_of_unknown_bias_is_left_out_of_the_line():
    columns, loss = surface(SURFACES["asym"], width=8, drift=0.04)
    theta = SURFACES["asym"]
    found, wrong, _ = fitted(columns, loss, theta, law=Flat(1.1e18))
    right = bias.corrected(found, wrong)
    assert [s.used for s in right.slices] == [False, False, True, True, True]
    assert right.optima.shape[1] == len(right.noise) == 3
    assert right.line == pytest.approx(true_line(theta), abs=1e-6)


@pytest.mark.parametrize(
    ("name", "width"),
    [("symmetric", 16), ("chinchilla", 16), ("chinchilla", 2), ("asym", 16)],
)
def test_the_bias_is_that_of_the_reference(name, width):
    load("chinchilla_epoch.csv")
    theta = SURFACES[name]
    _, _, line = fitted(*surface(theta, width=width, points=15), theta)
    key = f"ap2.bias.{name}.pm{width}x"
    assert true_line(theta)[3] + line[3] == expected(f"{key}.b")
    assert 100 * np.expm1(line[2]) == expected(f"{key}.Dstar_err%")
