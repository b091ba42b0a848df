"""Tests of the figures of a fit: that they say all they must, and are drawn alike."""

import dataclasses
import gc

import matplotlib
import numpy as np
import pytest

from fm_jax.scaling import drawn, fit, plot
from tests.scaling import surfaces

ODD = 17  # the run that is far from the law


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    columns = surfaces.isoflop()
    columns["loss"][ODD] *= 1.05
    path = surfaces.write(tmp_path_factory.mktemp("tables") / "runs.csv", columns)
    return fit.run(path, fit.Options(num_bootstraps=100))


def _figures(found, **record):
    found = dataclasses.replace(found, record=found.record | record)
    return plot.figures(drawn.tables(found), found.record)


def _texts(figure):
    return {text.get_text() for text in figure.findobj(matplotlib.text.Text)}


def test_each_figure_says_its_units(found):
    said = {name: _texts(figure) for name, figure in _figures(found).items()}
    for name, unit in (
        ("isoflop", "loss (nats per token)"),
        ("isoflop", "budget (FLOPs)"),
        ("frontier", "loss of a run (nats per token)"),
        ("frontier", "compute C (FLOPs)"),
        ("residuals", "100 ln(loss / fitted loss)"),
        ("contours", "loss (nats per token)"),
        ("draws", "E (nats per token)"),
        ("cut", "largest compute kept in the fit (FLOPs)"),
        ("cut", "error beyond the cut (%)"),
    ):
        assert unit in said[name], name


def test_the_run_that_is_far_off_is_named(found):
    assert f"row {ODD}" in _texts(_figures(found)["residuals"])


def test_draws_without_an_optimum_are_counted_in_the_key(found):
    draws = found.draws["approach3"].copy()
    draws[:7] = np.nan
    figures = _figures(dataclasses.replace(found, draws={"approach3": draws}))
    said = "95 % bootstrap interval; 7 draws have no optimum"
    assert said in _texts(figures["frontier"])


def test_a_fit_without_slices_or_draws_is_drawn(found):
    bare = dataclasses.replace(found, draws={})
    figures = _figures(bare, approach2={"skipped": "no budgets"})
    assert set(figures) == {"frontier", "residuals", "contours", "cut"}
    assert all(plot.png(figure) for figure in figures.values())


def test_a_law_without_optimum_or_exponent_is_drawn(found):
    rows = drawn.tables(found)
    rows["frontier"] = [r for r in rows["frontier"] if r["series"] != "approach3"]
    rows["contours"] = [r for r in rows["contours"] if r["series"] != "path"]
    ends = dict.fromkeys(("a", "a_low", "a_high"))
    rows["cut"] = [row | ends for row in rows["cut"]]
    figures = plot.figures(rows, found.record)
    assert "parametric (approach 3)" not in _texts(figures["frontier"])
    assert "least loss for the compute" not in _texts(figures["contours"])
    assert "all runs" not in _texts(figures["cut"])


@pytest.mark.parametrize(
    "made", [{"budgets": (1e19,)}, {"budgets": (1e18, 1e20), "sizes": 3}, {"noise": 0}]
)
def test_few_or_perfect_runs_are_drawn_without_a_warning(made, tmp_path, recwarn):
    path = surfaces.write(tmp_path / "few.csv", surfaces.isoflop(**made))
    few = fit.run(path, fit.Options(num_bootstraps=100))
    gc.collect()  # what an earlier test left to be collected warns now, not below
    recwarn.clear()
    figures = _figures(few)
    assert {"frontier", "residuals", "contours"} <= set(figures)
    assert all(plot.png(figure).startswith(b"\x89PNG") for figure in figures.values())
    assert not [str(one.message) for one in recwarn]


def test_the_same_fit_gives_the_same_bytes_whatever_style_is_set(found):
    first = {name: plot.png(figure) for name, figure in _figures(found).items()}
    before = dict(matplotlib.rcParams)
    loud = {"font.size": 20, "axes.grid": False, "lines.linewidth": 9}
    with matplotlib.rc_context(loud):
        again = {name: plot.png(figure) for name, figure in _figures(found).items()}
    assert first == again
    assert dict(matplotlib.rcParams) == before
    assert all(b"Software" not in image for image in first.values())
