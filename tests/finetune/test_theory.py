"""Why probing first: fine-tuning can distort features, in two-layer linear networks.

The claims of Kumar et al. 2022 (arXiv 2202.10054, section 3), where all of it can be
computed: fine-tuning from a random head changes features only along inputs that it has
seen, so that those out of distribution no longer fit the head (theorem 3.2: its error
there stays away from 0 at all times, however good the features); probing keeps them;
and fine-tuning from the probe has nothing to distort where features are good.
"""

import numpy as np
import pytest

from tests.finetune import linear

SEEDS = range(8)
RANDOM_HEAD = 1 / np.sqrt(linear.K)  # standard deviation


def _outcomes(seed, sine=None):
    """Return ((error in, out of distribution) by method) of one task.

    sine: of the angles between the features at first and the true ones; None: the
    features at first have nothing to do with them.
    """
    rng = np.random.default_rng(seed)
    task, true = linear.make(rng)
    if sine is None:
        features = linear.directions(rng, linear.K)
    else:
        features = linear.turned(rng, true, sine)
    random = RANDOM_HEAD * rng.standard_normal(linear.K)
    probed = linear.probed(task, features)
    return {
        "LP": task.errors(features.T @ probed),
        "FT": task.errors(linear.tuned(task, random, features).w),
        "LP-FT": task.errors(linear.tuned(task, probed, features).w),
    }


@pytest.mark.parametrize("seed", SEEDS)
def test_of_good_features_probing_first_is_best_in_and_out_of_distribution(seed):
    found = _outcomes(seed, sine=0.02)
    (lp_in, lp_out), (ft_in, ft_out), (both_in, both_out) = found.values()
    assert ft_in < 1e-20
    assert both_in < 1e-20
    assert lp_in > 1e-6  # the features do not hold the truth, and the probe cannot
    assert both_out < 0.9 * lp_out < 0.001
    assert ft_out > 20 * lp_out


@pytest.mark.parametrize("seed", SEEDS)
def test_of_perfect_features_only_fine_tuning_from_a_random_head_errs(seed):
    # Proposition: LP-FT of perfect features has no error out of distribution.
    found = _outcomes(seed, sine=0.0)
    assert max(found["LP"] + found["LP-FT"]) < 1e-25
    assert found["FT"][0] < 1e-20
    assert found["FT"][1] > 0.01


def test_of_bad_features_the_order_is_the_other_way_round():
    rows = [_outcomes(seed) for seed in SEEDS]
    for found in rows:
        assert found["FT"][0] < 1e-20
        assert found["LP-FT"][0] < 1e-20
        assert found["LP"][0] > 0.2
    lp, ft, both = (np.array([r[n][1] for r in rows]) for n in ("LP", "FT", "LP-FT"))
    assert np.mean(lp) > 1.5 * np.mean(ft)
    assert np.mean(lp) > 1.5 * np.mean(both)
    assert np.sum(lp > ft) >= 7  # of 8; 36 of 40 other seeds


@pytest.mark.parametrize("seed", SEEDS)
def test_fine_tuning_errs_out_of_distribution_at_all_times(seed):
    rng = np.random.default_rng(seed)
    task, true = linear.make(rng)
    features = linear.turned(rng, true, 0.0)
    random = RANDOM_HEAD * rng.standard_normal(linear.K)
    assert linear.tuned(task, random, features).least_error > 0.01


@pytest.mark.parametrize("seed", SEEDS)
def test_features_change_only_along_inputs_that_were_seen(seed):
    rng = np.random.default_rng(seed)
    task, true = linear.make(rng)
    random = RANDOM_HEAD * rng.standard_normal(linear.K)
    found = linear.tuned(task, random, true)
    change_KD = found.features - true
    along_KD = change_KD @ task.seen.T @ task.seen
    np.testing.assert_allclose(change_KD, along_KD, rtol=0, atol=1e-12)
    assert np.linalg.norm(change_KD) > 0.1


def test_descent_is_gradient_flow_but_for_its_steps(monkeypatch):
    # Flow keeps v v^T - B B^T as it is; steps ten times smaller come ten times nearer.
    rng = np.random.default_rng(0)
    task, true = linear.make(rng)
    head = RANDOM_HEAD * rng.standard_normal(linear.K)

    def kept(head, features):
        return np.outer(head, head) - features @ features.T

    off = []
    for rate in (linear.RATE, linear.RATE / 10):
        monkeypatch.setattr(linear, "RATE", rate)
        found = linear.tuned(task, head, true)
        off.append(np.linalg.norm(kept(found.head, found.features) - kept(head, true)))
    assert off[0] == pytest.approx(10 * off[1], rel=0.2)
    assert off[0] < 0.1 * np.linalg.norm(kept(head, true))


@pytest.mark.parametrize("seed", SEEDS)
def test_from_the_probe_features_change_less(seed):
    rng = np.random.default_rng(seed)
    task, true = linear.make(rng)
    features = linear.turned(rng, true, 0.02)
    random = RANDOM_HEAD * rng.standard_normal(linear.K)
    heads = (linear.probed(task, features), random)
    moved = [
        np.linalg.norm(linear.tuned(task, head, features).features - features)
        for head in heads
    ]
    assert moved[0] < 0.1 * moved[1]
