"""Tests of the rows that each figure draws: that they are the fit's own numbers."""

import dataclasses

import numpy as np
import pytest

from fm_jax.scaling import drawn, fit, laws
from fm_jax.tables import table
from tests.scaling import surfaces

ALL = {"isoflop", "frontier", "residuals", "contours", "draws", "cut"}
ODD = 17  # the run that is far from the law


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    columns = surfaces.isoflop()
    columns["loss"][ODD] *= 1.05
    path = surfaces.write(tmp_path_factory.mktemp("tables") / "runs.csv", columns)
    return fit.run(path, fit.Options(num_bootstraps=1200))


@pytest.fixture(scope="module")
def rows(found):
    return drawn.tables(found)


def _tables(found, *, draws=None, points=None, **record):
    return drawn.tables(
        dataclasses.replace(
            found,
            points=found.points if points is None else points,
            draws=found.draws if draws is None else draws,
            record=found.record | record,
        )
    )


def _columns(rows, series):
    mine = [row for row in rows if row["series"] == series]
    return {key: [row[key] for row in mine] for key in mine[0]}


def _hoffmann(found):
    return (
        found.record["approach3"][name] for name in ("E", "A", "B", "alpha", "beta")
    )


def test_each_figure_has_rows_of_equal_keys(rows):
    assert set(rows) == ALL
    for table_of in rows.values():
        assert len({tuple(row) for row in table_of}) == 1
        for value in (value for row in table_of for value in row.values()):
            assert value is None or type(value) in (str, bool, int, float)


def test_the_frontier_is_the_closed_form_and_its_band_that_of_the_draws(found, rows):
    line = _columns(rows["frontier"], "approach3")
    _, a, b, alpha, beta = _hoffmann(found)
    flops = np.array(line["flops"])
    best = (alpha * a / beta / b) ** (1 / (alpha + beta))
    best = best * (flops / 6) ** (beta / (alpha + beta))
    np.testing.assert_allclose(line["params"], best, rtol=1e-12)
    np.testing.assert_allclose(line["tokens"], flops / 6 / best, rtol=1e-12)
    _, a, b, alpha, beta = found.draws["approach3"].T
    best = (alpha * a / beta / b) ** (1 / (alpha + beta))
    best = best * (flops[-1] / 6) ** (beta / (alpha + beta))
    low, high = np.percentile(best, [2.5, 97.5])
    assert line["params_low"][-1] == pytest.approx(low, rel=1e-9)
    assert line["params_high"][-1] == pytest.approx(high, rel=1e-9)
    # At a given compute the ratio falls by the square of the size.
    low, high = np.percentile(flops[-1] / 6 / best**2, [2.5, 97.5])
    assert line["ratio_high"][-1] == pytest.approx(high, rel=1e-9)
    assert flops[-1] == pytest.approx(drawn.BEYOND * found.points.flops.max())


def test_lines_in_the_table_s_own_flops_are_drawn_along_6nd(found, rows):
    """As if the table's flops were 9ND: only what is told in them moves."""
    ends = found.record["range"] | {"flops_ratio": 1.5}
    points = dataclasses.replace(found.points, flops=1.5 * found.points.flops)
    other = _tables(found, points=points, range=ends)
    for series in ("approach3", "run"):
        assert _columns(other["frontier"], series) == _columns(rows["frontier"], series)
    record = found.record["approach2"]
    line = _columns(other["frontier"], "approach2")
    own = 1.5 * np.array(line["flops"])
    expected = record["coefficient"] * own ** record["a"]
    np.testing.assert_allclose(line["params"], expected, rtol=1e-12)
    assert np.all(np.array(line["params_low"]) < line["params"])
    assert np.all(np.array(line["params_high"]) > line["params"])
    for figure, series in (("frontier", "slice"), ("cut", "cut"), ("cut", "all")):
        before, after = (_columns(t[figure], series)["flops"] for t in (rows, other))
        np.testing.assert_allclose(1.5 * np.array(after), before)


def test_the_isoflop_line_is_that_of_approach_2(found, rows):
    line, record = _columns(rows["frontier"], "approach2"), found.record["approach2"]
    slope = np.diff(np.log(line["params"])) / np.diff(np.log(line["flops"]))
    np.testing.assert_allclose(slope, record["a"], rtol=1e-9)
    slope = np.diff(np.log(line["tokens"])) / np.diff(np.log(line["flops"]))
    np.testing.assert_allclose(slope, record["b"], rtol=1e-9)
    assert np.all(np.array(line["params_low"]) < line["params"])
    assert np.all(np.array(line["params_high"]) > line["params"])


@pytest.mark.parametrize("method", ["parabola", "cubic", "akima"])
def test_a_slice_s_curve_is_lowest_at_its_minimum(found, method):
    path = found.record["inputs"]["path"]
    other = fit.run(path, fit.Options(num_bootstraps=100, slices=method))
    rows = _tables(other)["isoflop"]
    curve, minima = _columns(rows, "slice"), _columns(rows, "minimum")
    assert any(minima["used"])
    for index, budget in enumerate(minima["budget"]):
        if minima["params"][index] is None:
            continue
        mine = np.array(curve["budget"]) == budget
        sizes, losses = (np.array(curve[key])[mine] for key in ("params", "loss"))
        step = sizes[1] / sizes[0]
        lowest = losses.argmin()
        assert 1 / step < minima["params"][index] / sizes[lowest] < step
        assert minima["loss"][index] <= losses[lowest] + 1e-4


def test_runs_of_no_budget_are_drawn_without_one(found):
    points = dataclasses.replace(found.points, flops=found.points.flops.copy())
    points.flops[3] *= 2
    rows = _tables(found, points=points)["isoflop"]
    budgets = _columns(rows, "run")["budget"]
    assert budgets[3] is None
    assert sum(budget is None for budget in budgets) == 1


def test_residuals_name_the_run_that_is_far_off(found, rows):
    e, a, b, alpha, beta = _hoffmann(found)
    points, runs = found.points, _columns(rows["residuals"], "run")
    law = e + a / points.params**alpha + b / points.tokens**beta
    np.testing.assert_allclose(runs["residual"], np.log(points.loss / law), atol=1e-12)
    assert [row for row, said in enumerate(runs["named"]) if said] == [ODD]
    assert runs["row"][ODD] == ODD


def test_the_contours_are_the_law_and_the_path_its_least_loss(found, rows):
    e, a, b, alpha, beta = _hoffmann(found)

    def law(params, tokens):
        return e + a / params**alpha + b / tokens**beta

    for series in ("surface", "path"):
        at = {k: np.array(v) for k, v in _columns(rows["contours"], series).items()}
        expected = law(at["params"], at["tokens"])
        np.testing.assert_allclose(at["loss"], expected, rtol=1e-12)
    for off in (0.97, 1.03):  # along the same compute
        assert np.all(law(at["params"] * off, at["tokens"] / off) > at["loss"])
    equal = _columns(rows["contours"], "isoflop")
    np.testing.assert_allclose(
        6 * np.array(equal["params"]) * equal["tokens"], equal["flops"]
    )


def test_draws_are_shown_in_part_and_their_interval_is_of_all(found, rows):
    shown = _columns(rows["draws"], "draw")
    assert list(shown) == ["series", "E", "alpha", "beta", "a"]
    assert len(shown["E"]) == drawn.MAX_DRAWS < len(found.draws["approach3"])
    low, high = (_columns(rows["draws"], series) for series in ("low", "high"))
    for name in ("E", "alpha", "beta", "a"):
        interval = [low[name][0], high[name][0]]
        assert interval == pytest.approx(found.record["approach3"]["ci"][name])


def test_cuts_are_the_held_out_fits_and_end_in_the_fit_itself(found, rows):
    tested = [one for one in found.record["held_out"] if one["test"]]
    cuts, whole = (_columns(rows["cut"], series) for series in ("cut", "all"))
    for key, name in (("flops", "cut"), ("a", "a"), ("mare", "mare")):
        assert cuts[key] == [one[name] for one in tested]
    assert cuts["a_low"] == [one["ci"]["a"][0] for one in tested]
    assert whole["a"] == [found.record["approach3"]["a"]]


@pytest.mark.parametrize(
    ("missing", "left"),
    [
        ({"approach2": {"skipped": "no budgets"}}, ALL - {"isoflop"}),
        ({"draws": {}}, ALL - {"draws"}),
        ({"held_out": []}, ALL - {"cut"}),
    ],
)
def test_what_a_fit_lacks_has_no_rows(found, missing, left):
    assert set(_tables(found, **missing)) == left


def test_without_draws_the_frontier_has_no_band(found):
    line = _columns(_tables(found, draws={})["frontier"], "approach3")
    assert set(line["params_low"]) == {None}
    assert None not in line["params"]


def test_draws_without_an_optimum_are_left_out_and_counted(found):
    draws = found.draws["approach3"].copy()
    draws[:6, found.law.names.index("B")] = 0.0
    draws[6] = np.nan
    rows = _tables(found, draws={"approach3": draws})
    line = _columns(rows["frontier"], "approach3")
    assert set(line["draws_missing"]) == {7}
    assert None not in line["params_low"]


def test_a_law_that_reads_more_has_a_surface_at_its_median_and_no_frontier(found):
    law = laws.LAWS["data_constrained"]
    # Muennighoff et al. (arXiv 2305.16264), with exp of what they print.
    theta = {"E": 1.87, "A": 521.0, "B": 1488.0, "alpha": 0.353, "beta": 0.353}
    theta |= {"R_D": 15.39, "R_N": 5.31}
    unique = np.where(np.arange(len(found.points.loss)) % 3, 1e9, 3e9)
    points = dataclasses.replace(found.points, extra={"unique_tokens": unique})
    record = found.record | {"approach3": theta}
    rows = drawn.tables(fit.Fit(points, law, record, {}))
    assert {row["series"] for row in rows["frontier"]}.isdisjoint({"approach3"})
    surface = _columns(rows["contours"], "surface")
    at = {"params": np.array(surface["params"]), "tokens": np.array(surface["tokens"])}
    at["unique_tokens"] = np.full(len(at["params"]), 1e9)
    expected = law.loss(np.array([theta[name] for name in law.names]), at)
    np.testing.assert_allclose(surface["loss"], expected, rtol=1e-12)


def test_many_runs_are_thinned_but_outliers_stay(found):
    points = found.points
    times = 200
    many = {
        name: np.tile(getattr(points, name), times)
        for name in ("params", "tokens", "loss", "flops", "cluster", "is_final", "run",
                     "budget")
    }  # fmt: skip
    many["loss"][4321] *= 1.4
    points = table.Points(**many, extra={}, record={})
    rows = _tables(found, points=points)
    shown = _columns(rows["residuals"], "run")
    most = drawn.MAX_RUNS
    assert most <= len(shown["row"]) <= most + drawn.MAX_NAMED
    assert 4321 in shown["row"]
    for name in ("frontier", "contours", "isoflop"):
        assert len(_columns(rows[name], "run")["params"]) == most
