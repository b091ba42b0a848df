"""Tests of lines through optima, of one draw or of many."""

import numpy as np
import pytest

from fm_jax.scaling import lines


def test_a_line_is_that_of_weighted_least_squares():
    rng = np.random.default_rng(2)
    x, y, w = rng.standard_normal((3, 8))
    slope, start = np.polyfit(x, y, 1, w=np.abs(w))
    y_gap = np.where(np.arange(8) == 3, np.nan, y)
    w_gap = np.where(np.arange(8) == 3, 0.0, 1.0)
    assert lines.line(x, y, w**2) == pytest.approx((start, slope), abs=1e-12)
    slope, start = np.polyfit(np.delete(x, 3), np.delete(y, 3), 1)
    assert lines.line(x, y_gap, w_gap) == pytest.approx((start, slope), abs=1e-12)


def test_lines_of_draws_leave_out_what_is_not_there_and_count_the_rest():
    rng = np.random.default_rng(1)
    x, optima = rng.standard_normal(5), rng.standard_normal((3, 5, 2))
    optima[1, 2] = np.nan
    optima[2, :4] = np.nan
    draws, num_refused = lines.of_draws(x, optima)
    assert num_refused == 1
    rest = np.array([0, 1, 3, 4])
    for draw, kept, which in zip(draws, optima, (np.arange(5), rest), strict=False):
        for i in (0, 1):
            slope, start = np.polyfit(x[which], kept[which, i], 1)
            assert draw[2 * i : 2 * i + 2] == pytest.approx((start, slope))


def test_excess_scatter_is_found_where_it_is_and_only_there():
    rng = np.random.default_rng(2)
    x = np.linspace(0, 1, 200)
    noise = 0.1 * rng.standard_normal((400, 200))
    best = 3 + 2 * x + 0.1 * rng.standard_normal(200)
    assert lines.excess(x, best, noise) < 0.04
    best += 0.3 * rng.standard_normal(200)
    assert lines.excess(x, best, noise) == pytest.approx(0.3, rel=0.15)
    assert lines.excess(x[:2], best[:2], noise[:, :2]) == 0


def test_scatter_known_from_few_residuals_has_the_tails_of_student():
    from scipy import stats

    drawn = lines.scatter((40000, 3), 4, np.random.default_rng(3))
    assert stats.kstest(drawn[:, 1], stats.t(4).cdf).pvalue > 0.01
    assert stats.kstest(drawn.sum(1) / np.sqrt(3), stats.t(4).cdf).pvalue > 0.01


def test_the_variance_of_what_is_hardly_there_is_infinite():
    draws = np.array([[1.0, 1.0, np.nan], [3.0, np.nan, np.nan]])
    found = lines.variance(draws)
    assert found.tolist() == [2.0, np.inf, np.inf]
    assert lines.precision(found).tolist() == [0.5, 0.0, 0.0]
    assert np.isfinite(lines.precision(np.zeros(2))).all()
