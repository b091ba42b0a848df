"""Tests of what is fitted: its columns, its parts, how it is resampled."""

import dataclasses

import numpy as np
import pytest

from fm_jax.errors import UserError
from fm_jax.scaling import laws, problem, resamples
from fm_jax.tables.table import Points
from tests.scaling import surfaces


def _points(columns, *, clusters=None, **extra):
    count = len(columns["loss"])
    names = np.arange(count).astype(str)
    return Points(
        **columns,
        flops=6 * columns["params"] * columns["tokens"],
        cluster=names if clusters is None else clusters,
        is_final=np.ones(count, bool),
        run=names,
        budget=np.full(count, np.nan),
        extra=extra,
        record={},
    )


def _of(points, law="chinchilla"):
    return problem.of(points, laws.find(law), delta=1e-3, space="log")


def test_a_law_reads_its_own_columns():
    columns = surfaces.isoflop(sizes=5)
    unique = columns["tokens"] / 2
    asked = _of(_points(columns, unique_tokens=unique), "data_constrained")
    np.testing.assert_array_equal(asked.columns["unique_tokens"], unique)
    gaps = np.where(np.arange(len(unique)) == 3, np.nan, unique)
    with pytest.raises(UserError, match="gaps in it"):
        _of(_points(columns, unique_tokens=gaps), "data_constrained")


def test_a_part_is_the_problem_of_its_runs():
    asked = _of(_points(surfaces.isoflop(sizes=7)))
    kept = np.arange(len(asked)) % 2 == 0
    part = asked.take(kept)
    assert len(part) == kept.sum()
    theta = np.array([1.7, 400.0, 420.0, 0.33, 0.29])
    np.testing.assert_array_equal(part.residuals(theta), asked.residuals(theta)[kept])


def test_few_runs_are_resampled_by_weights_and_trunks_together():
    many, few = surfaces.isoflop(sizes=9), surfaces.isoflop(sizes=5)
    assert problem.choose_resampling(_of(_points(many))) == "pairs"
    assert problem.choose_resampling(_of(_points(few))) == "bayesian"
    trunks = np.repeat([f"t{i}" for i in range(10)], 2)
    asked = _of(_points(few, clusters=trunks))
    assert problem.choose_resampling(asked) == "bayesian_cluster"
    pairs = np.repeat([f"t{i}" for i in range(40)], 2)
    both = {n: np.tile(c, 4) for n, c in few.items()}
    assert problem.choose_resampling(_of(_points(both, clusters=pairs))) == "cluster"


def test_a_draw_of_clusters_is_that_of_their_repeated_weights():
    columns = surfaces.isoflop(sizes=6)
    clusters = np.array(["a", "b", "c", "d"])[np.arange(24) % 4]
    asked = _of(_points(columns, clusters=clusters))
    theta = asked.fit().theta
    draws, stray = asked.draws(theta, kind="bayesian_cluster", num=20, seed=0)
    assert stray == 0
    # The first draw again, each run alone, with its cluster's weight.
    weights = resamples.weights("bayesian_cluster", clusters, 20, 0)
    assert all(np.ptp(weights[:, clusters == c], axis=1).max() == 0 for c in "abcd")
    alone = dataclasses.replace(asked, clusters=np.arange(24).astype(str))
    again, _, _ = alone.refit(theta, weights[:1])
    np.testing.assert_allclose(again[0], draws[0], rtol=1e-6)


def test_objectives_are_named():
    assert problem.objective_name(0.0, "log").startswith("least absolute")
    assert problem.objective_name(np.inf, "linear") == "least squares of loss"
    assert problem.objective_name(1e-3, "log") == "Huber(0.001) of ln loss, summed"
