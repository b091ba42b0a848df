"""Tests of resamples by what each kind keeps, and of intervals by order statistics."""

import numpy as np
import pytest

from fm_jax.errors import UserError
from fm_jax.scaling import resamples

CLUSTERS = np.array(["b", "a", "b", "c", "a", "b", "d"])


@pytest.mark.parametrize("kind", resamples.KINDS)
def test_weights_keep_their_mean_and_repeat_by_seed(kind):
    found = resamples.weights(kind, CLUSTERS, 4000, 3)
    assert found.shape == (4000, 7)
    assert found.dtype == np.float64
    assert (found >= 0).all()
    # The mean of a weight is 1, its sd about 1: 4,000 draws leave 0.016.
    np.testing.assert_allclose(found.mean(axis=0), 1, atol=0.08)
    np.testing.assert_array_equal(found, resamples.weights(kind, CLUSTERS, 4000, 3))
    assert (found != resamples.weights(kind, CLUSTERS, 4000, 4)).any()


@pytest.mark.parametrize("kind", ["pairs", "bayesian"])
def test_resamples_of_runs_are_as_large_as_the_sample(kind):
    found = resamples.weights(kind, CLUSTERS, 50, 0)
    np.testing.assert_allclose(found.sum(axis=1), 7, rtol=1e-12)
    assert (found[:, 0] != found[:, 2]).any()


@pytest.mark.parametrize("kind", ["cluster", "bayesian_cluster"])
def test_a_cluster_stays_together_and_clusters_are_as_many(kind):
    found = resamples.weights(kind, CLUSTERS, 50, 0)
    np.testing.assert_array_equal(found[:, 0], found[:, 2])
    np.testing.assert_array_equal(found[:, 0], found[:, 5])
    np.testing.assert_array_equal(found[:, 1], found[:, 4])
    one_of_each = found[:, [1, 0, 3, 6]]
    np.testing.assert_allclose(one_of_each.sum(axis=1), 4, rtol=1e-12)


def test_draws_with_replacement_are_whole_and_dirichlet_weights_never_nil():
    whole = resamples.weights("pairs", CLUSTERS, 100, 0)
    assert (whole == whole.round()).all()
    assert (whole == 0).any()
    assert (resamples.weights("bayesian", CLUSTERS, 4000, 0) > 0).all()


def test_counts_vary_as_the_multinomial_and_the_dirichlet_do():
    n = len(CLUSTERS)
    pairs = resamples.weights("pairs", CLUSTERS, 40_000, 0).var(axis=0)
    np.testing.assert_allclose(pairs, (n - 1) / n, rtol=0.05)
    bayesian = resamples.weights("bayesian", CLUSTERS, 40_000, 0).var(axis=0)
    np.testing.assert_allclose(bayesian, (n - 1) / (n + 1), rtol=0.05)


def test_an_interval_is_of_percentiles_along_the_first_axis():
    draws = np.arange(201.0)[:, None] * np.array([1.0, -2.0])
    draws = np.random.default_rng(0).permutation(draws)
    expected = [[5.0, 195.0], [-390.0, -10.0]]
    np.testing.assert_allclose(resamples.interval(draws), expected)
    np.testing.assert_allclose(resamples.interval(draws[:, 0], level=0.5), [50, 150])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: resamples.weights("pair", CLUSTERS, 5, 0), "must be .* mean 'pairs'"),
        (lambda: resamples.weights("pairs", CLUSTERS, 0, 0), "1 resample or more; got"),
        (lambda: resamples.weights("pairs", CLUSTERS[:1], 5, 0), "2 or more runs to"),
        (lambda: resamples.weights("cluster", CLUSTERS[[0, 2]], 5, 0),
         "bootstrap cluster must have 2 or more clusters to choose from; got 1"),
        (lambda: resamples.interval(np.ones(3), level=95), "between 0 and 1; got 95"),
    ],
)  # fmt: skip
def test_what_cannot_be_resampled_is_refused(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_draws_that_are_not_numbers_are_not_passed_over():
    with pytest.raises(ValueError, match="must be numbers; got 1 that are not"):
        resamples.interval(np.array([1.0, np.nan, 2.0]))
