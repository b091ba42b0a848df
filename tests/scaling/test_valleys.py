"""Tests of the curves through the losses of a slice and of their lowest points."""

import numpy as np
import pytest

from fm_jax.scaling import valleys


def skew(width, points):
    """Return ln N and losses about the optimum of a law of unequal exponents."""
    x = np.linspace(-np.log(width), np.log(width), points)
    return 20 + x, 1.7 + np.exp(-0.34 * x) / 0.34 + np.exp(0.28 * x) / 0.28


@pytest.mark.parametrize(("method", "degree"), [("parabola", 2), ("cubic", 3)])
def test_a_polynomial_valley_is_that_of_least_squares(method, degree):
    rng = np.random.default_rng(0)
    x = np.sort(rng.uniform(18, 23, 9))
    losses = 3 + 0.05 * (x - 20.6) ** 2 + 0.01 * rng.standard_normal((4, 9))
    at, value, _ = valleys.minima(x, losses, method)
    for y, lowest, height in zip(losses, at, value, strict=True):
        curve = np.polynomial.Polynomial.fit(x, y, degree)
        roots = curve.deriv().roots()
        (best,) = [r.real for r in roots if curve.deriv(2)(r).real > 0]
        assert lowest == pytest.approx(best, abs=1e-9)
        assert height == pytest.approx(curve(best), abs=1e-12)


def test_akima_finds_the_lowest_point_of_its_spline_to_the_grid():
    from scipy import interpolate, optimize

    x, loss = skew(width=6.0, points=9)
    at, value, _ = valleys.minima(x, loss[None], "akima")
    spline = interpolate.Akima1DInterpolator(x, np.log(loss))
    best = optimize.minimize_scalar(
        spline, bounds=(x[2], x[6]), method="bounded", options={"xatol": 1e-10}
    )
    cell = np.ptp(x) / (8 * valleys.GRID_PER_INTERVAL - 1)
    assert abs(at[0] - best.x) <= cell
    assert np.exp(best.fun) <= value[0] <= np.exp(best.fun) * (1 + 1e-5)


def test_akima_averages_repeats_of_a_size():
    x, loss = skew(width=4.0, points=7)
    twice, halves = np.tile(x, 2), np.concatenate([loss * 1.01, loss / 1.01])
    at, _, _ = valleys.minima(x, loss[None], "akima")
    assert valleys.minima(twice, halves[None], "akima")[0] == pytest.approx(at)


def test_noise_of_few_residuals_leans_on_the_median_of_all():
    rng = np.random.default_rng(3)
    squares = (0.02**2) * rng.chisquare(3, 400)
    sds = valleys.moderated_sds(squares, np.full(400, 3))
    assert np.sqrt(np.mean(sds**2)) == pytest.approx(0.02, rel=0.05)
    assert np.std(sds) < 0.5 * np.std(np.sqrt(squares / 3))
    wild = valleys.moderated_sds(np.append(squares, 100.0), np.full(401, 3))
    assert wild[:-1] == pytest.approx(sds, rel=0.02)
    assert wild[-1] > 3


@pytest.mark.parametrize("shared", [0.0, 0.4, 1.0])
def test_noise_that_names_share_is_told_from_the_rest(shared):
    rng = np.random.default_rng(4)
    x, names = np.linspace(-2, 2, 400), np.arange(400)
    common = np.sqrt(shared) * rng.standard_normal(400)
    used = []
    for sd in (0.01, 0.02, 0.04):
        own = np.sqrt(1 - shared) * rng.standard_normal(400)
        used.append(([x, -x], 3 + x**2 + sd * (common + own)))
    sds, correlation = valleys.noise(used, "parabola", [names] * 3)
    assert sds == pytest.approx([0.01, 0.02, 0.04], rel=0.1)
    assert correlation == pytest.approx(shared, abs=0.06)
    # Nothing is shared by rows of one slice alone, or by all of each.
    for apart in ([names, names + 400, names + 800], [np.zeros(400)] * 3):
        assert valleys.noise(used, "parabola", apart)[1] == 0
