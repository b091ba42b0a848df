"""Tests of what a fit is checked by: held-out runs, other choices, warnings."""

import dataclasses

import numpy as np
import pytest

from fm_jax.scaling import checks, laws, problem, resamples
from fm_jax.tables.table import Points
from tests.scaling import surfaces


def _problem(columns, *, law="chinchilla", delta=1e-3, space="log"):
    count = len(columns["loss"])
    names = np.arange(count).astype(str)
    points = Points(
        params=columns["params"],
        tokens=columns["tokens"],
        loss=columns["loss"],
        flops=6 * columns["params"] * columns["tokens"],
        cluster=names,
        is_final=np.ones(count, bool),
        run=names,
        budget=np.full(count, np.nan),
        extra={},
        record={},
    )
    return problem.of(points, laws.find(law), delta=delta, space=space)


@pytest.fixture(scope="module")
def asked():
    return _problem(surfaces.isoflop())


@pytest.fixture(scope="module")
def fitted(asked):
    return asked.fit()


@pytest.fixture(scope="module")
def draws(asked, fitted):
    return asked.draws(fitted.theta, kind="pairs", num=300, seed=0)[0]


def _warnings(asked, draws=None):
    fitted = asked.fit()
    if draws is None:
        draws, _ = asked.draws(fitted.theta, kind="bayesian", num=200, seed=0)
    tested = checks.held_out(asked, fitted.theta, draws, kind="bayesian", seed=0)
    return checks.warnings(asked, fitted, draws, tested)


# ---- held-out runs


def test_no_held_out_run_is_among_those_fitted(asked, fitted, draws):
    found = checks.held_out(asked, fitted.theta, draws, kind="pairs", seed=0)
    assert [row["test"] for row in found] == sorted(
        (row["test"] for row in found), reverse=True
    )
    for row in found:
        assert row["train"] + row["test"] == len(asked)
        assert row["train"] == np.sum(asked.flops <= row["cut"])
    assert found[-1]["test"] == 0
    assert "mare" not in found[-1]


def test_runs_of_one_budget_are_held_out_together(asked, fitted, draws):
    off = 1 + 1e-3 * np.random.default_rng(0).random(len(asked))
    jittered = dataclasses.replace(asked, flops=asked.flops * off)
    rows = checks.held_out(jittered, fitted.theta, draws, kind="pairs", seed=0)
    assert [row["train"] for row in rows] == [18, 27, 36]


def test_held_out_error_is_that_of_a_fit_made_by_hand(asked, fitted, draws):
    row = checks.held_out(asked, fitted.theta, draws, kind="pairs", seed=0)[0]
    kept = asked.flops <= row["cut"]
    theta = asked.take(kept).fit().theta
    e, a, b, alpha, beta = theta
    n, d = asked.columns["params"][~kept], asked.columns["tokens"][~kept]
    guess = e + a / n**alpha + b / d**beta
    errors = np.abs(guess / asked.loss[~kept] - 1)
    assert row["mare"] == pytest.approx(errors.mean(), rel=1e-9)
    assert row["worst"] == pytest.approx(errors.max(), rel=1e-9)
    assert row["a"] == pytest.approx(beta / (alpha + beta), rel=1e-12)


def test_intervals_of_held_out_losses_hold_at_about_their_rate():
    inside, tested = 0.0, 0
    for seed in range(8):
        asked = _problem(surfaces.isoflop(sizes=13, seed=seed))
        theta = asked.fit().theta
        for row in checks.held_out(asked, theta, theta[None], kind="pairs", seed=0):
            if row["test"]:
                inside += row["coverage"] * row["test"]
                tested += row["test"]
    # Runs of one table share their fit, so this is far fewer than `tested` trials.
    assert 0.85 < inside / tested <= 1


# ---- sensitivity


def test_sensitivity_names_other_objectives_and_subsets(asked, fitted):
    rows = {row["what"]: row for row in checks.sensitivity(asked, fitted.theta)}
    assert rows["as asked"]["A"] == fitted.theta[1]
    assert "Huber(1e-3) of ln loss" not in rows
    squares = dataclasses.replace(asked, delta=np.inf).fit().theta
    assert rows["least squares of ln loss"]["E"] == pytest.approx(squares[0], rel=1e-9)
    assert rows["without the 5 largest residuals"]["runs"] == len(asked) - 5
    smallest = rows["without the smallest third by compute"]["runs"]
    assert smallest < len(asked)


# ---- warnings


def test_a_law_that_holds_over_many_decades_has_no_warning(asked, draws):
    assert _warnings(asked, draws) == []


def test_few_decades_are_said():
    asked = _problem(surfaces.isoflop(budgets=(1e18, 3e18, 1e19)))
    assert any("1.0 decades of compute" in said for said in _warnings(asked))


def test_a_floor_that_is_not_there_is_said():
    columns = surfaces.isoflop(noise=1e-4)
    columns["loss"] = columns["loss"] - surfaces.TRUTH["E"]
    found = _warnings(_problem(columns))
    assert any("these runs hardly see the floor" in said for said in found)
    columns["loss"] = columns["loss"] - 0.05
    found = _warnings(_problem(columns))
    assert any("E is at its bound" in said for said in found)


def test_a_law_that_bends_another_way_is_said():
    columns = surfaces.isoflop(noise=1e-4)
    u, v = np.log(columns["params"]), np.log(columns["tokens"])
    columns["loss"] = columns["loss"] * np.exp(0.002 * (u - u.mean()) * (v - v.mean()))
    assert any("the residuals have a shape" in s for s in _warnings(_problem(columns)))


def test_scattered_losses_are_said():
    asked = _problem(surfaces.isoflop(noise=0.05))
    assert any("the law does not hold" in said for said in _warnings(asked))


def test_structure_is_not_found_in_noise_more_often_than_its_level():
    p_values = []
    for seed in range(60):
        asked = _problem(surfaces.isoflop(seed=seed), delta=np.inf)
        p_values.append(checks.structure(asked, asked.fit().theta)[0])
    assert np.mean(np.array(p_values) < 0.05) < 0.15
    assert min(p_values) > 1e-4


def test_correlation_finds_the_pair_that_moves_together(asked):
    rng = np.random.default_rng(0)
    x = 0.01 * rng.standard_normal(4000)
    draws = np.tile([1.7, 400.0, 410.0, 0.34, 0.28], (4000, 1))
    draws *= 1 + 0.01 * rng.standard_normal(draws.shape)
    draws[:, 0], draws[:, 4] = 1.7 + x, 0.28 - x
    pair, value = checks.correlation(asked, draws)
    assert set(pair) == {"E", "beta"}
    assert value == pytest.approx(-1)


def test_correlation_does_not_depend_on_units(asked, draws):
    million = dataclasses.replace(
        asked,
        columns=asked.columns | {"params": asked.columns["params"] / 1e6},
    )
    moved = draws.copy()
    moved[:, 1] = draws[:, 1] / 1e6 ** draws[:, 3]
    pair, value = checks.correlation(asked, draws)
    again = checks.correlation(million, moved)
    assert again[0] == pair
    assert again[1] == pytest.approx(value, abs=1e-9)
    assert abs(value) < 0.99


def test_few_runs_and_few_clusters_are_said():
    few = _problem({n: c[::5] for n, c in surfaces.isoflop().items()})
    assert len(few) == 8
    assert any("8 runs for 5 parameters" in said for said in _warnings(few))
    halves = np.array(["a", "b"])[np.arange(36) % 2]
    asked = dataclasses.replace(_problem(surfaces.isoflop()), clusters=halves)
    assert any("of 2 clusters" in said for said in _warnings(asked))


def test_an_interval_leaves_out_what_is_no_number():
    draws = np.concatenate([np.linspace(0, 1, 101), [np.nan, np.inf]])
    expected = resamples.interval(np.linspace(0, 1, 101))
    assert checks.interval(draws) == pytest.approx(list(expected))
    assert np.isnan(checks.interval(np.array([np.nan]))).all()


def test_the_spread_of_seeds_is_that_between_runs_of_one_place():
    columns = surfaces.isoflop(sizes=5, noise=0.0)
    assert checks.replicate_sd(_problem(columns)) is None
    rng = np.random.default_rng(0)
    again = {name: np.tile(column, 40) for name, column in columns.items()}
    again["loss"] = again["loss"] * np.exp(0.01 * rng.standard_normal(800))
    assert checks.replicate_sd(_problem(again)) == pytest.approx(0.01, rel=0.08)
    rates = np.tile(np.arange(40.0), (20, 1)).T.ravel()  # each run at its own
    assert checks.replicate_sd(_problem(again), [rates]) is None
