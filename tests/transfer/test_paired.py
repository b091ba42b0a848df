import math

import pytest

from fm_jax.transfer import paired

# Quantiles 0.975 of Student's t, from printed tables: 2 and 4 degrees of freedom.
T2, T4 = 4.3027, 2.7764


def test_an_interval_is_that_of_students_t_by_hand():
    # Mean 5, squares of what is left over 16, 0, 0, 4, 4: s^2 = 24 / 4.
    found = paired.estimate([1.0, 5.0, 5.0, 7.0, 7.0])
    assert found.mean == 5.0
    assert found.count == 5
    assert found.half_width == pytest.approx(T4 * math.sqrt(6 / 5), rel=1e-4)


def test_pairs_take_away_what_seeds_share():
    ours = {0: 0.5, 1: 0.75, 2: 1.0}
    theirs = {2: 0.75, 0: 0.5, 1: 0.25}  # differences 0, 0.5, 0.25: s = 0.25
    found = paired.difference(ours, theirs)
    assert found.mean == pytest.approx(0.25)
    assert found.half_width == pytest.approx(T2 * 0.25 / math.sqrt(3), rel=1e-4)
    shifted = {seed: value + 10 * seed for seed, value in ours.items()}
    same = paired.difference(
        shifted, {seed: value + 10 * seed for seed, value in theirs.items()}
    )
    assert same.mean == pytest.approx(found.mean)
    assert same.half_width == pytest.approx(found.half_width)


def test_only_seeds_that_both_have_are_compared():
    found = paired.difference({0: 3.0, 1: 5.0, 2: 9.0}, {1: 4.0, 2: 5.0, 7: 100.0})
    assert (found.mean, found.count) == (2.5, 2)


def test_one_seed_has_no_interval_and_none_no_mean():
    assert paired.estimate([0.25]) == paired.Estimate(0.25, None, 1)
    assert paired.estimate([]) == paired.Estimate(None, None, 0)
    assert not paired.estimate([0.25]).excludes_zero


def test_zero_is_excluded_beyond_half_a_width():
    assert paired.Estimate(-0.5, 0.4, 3).excludes_zero
    assert not paired.Estimate(0.3, 0.4, 3).excludes_zero


def test_a_higher_level_is_wider():
    # t at 0.95, two-sided 90 %, with 2 degrees of freedom: 2.9200.
    found = paired.estimate([1.0, 2.0, 3.0], level=0.9)
    assert found.half_width == pytest.approx(2.9200 / math.sqrt(3), rel=1e-4)
