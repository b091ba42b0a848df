"""Tests of the linear probe, against Newton's method and what is known of optima."""

import numpy as np
import pytest

from fm_jax.errors import UserError
from fm_jax.finetune import probe

NUM_CLASSES = 3


def _examples(seed, count, *, dims=5, noise=1.0, shift=0.0):
    """Return features, with scales and offsets of their own, and their classes."""
    rng = np.random.default_rng(seed)
    centres_CD = np.random.default_rng(99).standard_normal((NUM_CLASSES, dims))
    y = rng.integers(0, NUM_CLASSES, count)
    x = centres_CD[y] + noise * rng.standard_normal((count, dims))
    x = x * np.geomspace(0.01, 50, dims) + np.linspace(-3, 7, dims) + shift
    return x.astype(np.float32), y.astype(np.int32)


def _newton(x, y, l2, num_classes=NUM_CLASSES):
    """Return weights [C, D + 1] by Newton's method on the whole Hessian.

    Written from the textbook (Bishop 2006, 4.3.4), with pseudo-inverse steps, for the
    bias is free up to a shift of all classes; damped by halving.
    """
    x1 = np.column_stack([x, np.ones(len(x))])
    count, dims = x1.shape
    hot_NC = np.eye(num_classes)[y]
    ridge = np.tile(np.append(np.full(dims - 1, l2), 0), num_classes)
    flat = np.zeros(num_classes * dims)

    def loss(flat):
        logits = x1 @ flat.reshape(num_classes, dims).T
        lse = np.log(np.exp(logits).sum(1))
        return np.mean(lse - (logits * hot_NC).sum(1)) + ridge @ flat**2 / 2

    for _ in range(60):
        logits = x1 @ flat.reshape(num_classes, dims).T
        p_NC = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        slope = ((p_NC - hot_NC).T @ x1 / count).ravel() + ridge * flat
        hessian = np.diag(ridge)
        for x_D, p_C in zip(x1, p_NC, strict=True):
            bent = np.diag(p_C) - np.outer(p_C, p_C)
            hessian = hessian + np.kron(bent, np.outer(x_D, x_D)) / count
        step = np.linalg.pinv(hessian, rcond=1e-13) @ slope
        size = 1.0
        while loss(flat - size * step) > loss(flat) + 1e-15:
            size /= 2
        flat = flat - size * step
        if np.abs(slope).max() < 1e-12:
            break
    return flat.reshape(num_classes, dims)


def _standard(x):
    x = np.asarray(x, np.float64)
    return (x - x.mean(0)) / x.std(0)


@pytest.mark.parametrize("l2", [3.0, 0.1, 1e-3])
def test_the_optimum_is_that_of_newtons_method(l2):
    x, y = _examples(0, 60)
    x = _standard(x)
    start = np.zeros((NUM_CLASSES, 6))
    found, gradient = probe.minimised(x, y, l2, start)
    assert gradient < probe.GRADIENT
    expected = _newton(x, y, l2)
    # An entry is off by the gradient over the least curvature, which is l2 or more.
    atol = 3 * np.sqrt(found.size) * probe.GRADIENT / min(l2, 0.05)
    np.testing.assert_allclose(found[:, :-1], expected[:, :-1], rtol=0, atol=atol)
    centred = [w[:, -1] - w[:, -1].mean() for w in (found, expected)]
    np.testing.assert_allclose(*centred, rtol=0, atol=atol)


def test_the_gradient_is_the_slope_of_the_loss():
    x, y = _examples(1, 20)
    x = _standard(x)
    rng = np.random.default_rng(0)
    weights, towards = rng.standard_normal((2, NUM_CLASSES, 6))
    _, slope = probe.loss_and_gradient(weights, x, y, 0.3)
    ends = [
        probe.loss_and_gradient(weights + step * towards, x, y, 0.3)[0]
        for step in (1e-5, -1e-5)
    ]
    assert np.sum(slope * towards) == pytest.approx(np.subtract(*ends) / 2e-5, rel=1e-8)


def test_a_probe_takes_features_as_they_are():
    x, y = _examples(2, 200)
    x_valid, y_valid = _examples(3, 300)
    found = probe.fit(x, y, x_valid, y_valid, NUM_CLASSES)
    assert found.kernel.dtype == found.bias.dtype == np.float32
    chosen = next(point for point in found.path if point.l2 == found.l2)
    for features, targets, accuracy in (
        (x, y, chosen.train_accuracy),
        (x_valid, y_valid, chosen.valid_accuracy),
    ):
        logits = features @ found.kernel.T + found.bias
        assert np.mean(logits.argmax(1) == targets) == pytest.approx(accuracy, abs=0.01)
    logits = x_valid.astype(float) @ found.kernel.T.astype(float) + found.bias
    lse = np.log(np.exp(logits).sum(1))
    loss = np.mean(lse - logits[np.arange(300), y_valid])
    assert loss == pytest.approx(chosen.valid_loss, abs=1e-4)
    # And they are worth something: chance is a third.
    assert chosen.valid_accuracy > 0.7


def test_scales_and_offsets_of_features_change_no_answer():
    x, y = _examples(2, 80)
    x_valid, y_valid = _examples(3, 50)
    found = probe.fit(x, y, x_valid, y_valid, NUM_CLASSES)
    factors, offsets = np.float32([4, 0.5, -2, 8, 1]), np.float32([1, 0, -8, 0, 64])
    other = probe.fit(
        x * factors + offsets, y, x_valid * factors + offsets, y_valid, NUM_CLASSES
    )
    assert other.l2 == found.l2
    losses = [[point.valid_loss for point in one.path] for one in (found, other)]
    np.testing.assert_allclose(*losses, rtol=0, atol=1e-4)


def test_the_path_goes_from_strong_to_weak_by_one_factor_and_the_least_loss_wins():
    x, y = _examples(4, 40, noise=2.0)
    x_valid, y_valid = _examples(5, 500, noise=2.0)
    found = probe.fit(x, y, x_valid, y_valid, NUM_CLASSES)
    strengths = np.array([point.l2 for point in found.path])
    np.testing.assert_allclose(strengths[:-1] / strengths[1:], probe.FACTOR)
    losses = [point.valid_loss for point in found.path]
    best = int(np.argmin(losses))
    assert 0 < best < len(losses) - 1
    assert found.l2 == found.path[best].l2
    assert strengths[0] == probe.STRONGEST
    assert strengths[-1] == pytest.approx(probe.WEAKEST)


def test_a_path_whose_strong_end_is_best_goes_on():
    # Classes that features say nothing of: the less kernel the better.
    rng = np.random.default_rng(0)
    x, x_valid = rng.standard_normal((2, 30, 9))
    y, y_valid = rng.integers(0, NUM_CLASSES, (2, 30))
    found = probe.fit(x, y, x_valid, y_valid, NUM_CLASSES)
    assert found.path[0].l2 > 100 * probe.STRONGEST
    assert found.l2 > probe.STRONGEST
    assert np.linalg.norm(found.kernel) < 0.1


def test_examples_that_a_plane_parts_do_not_blow_up():
    x, y = _examples(6, 60, noise=0.05)
    x_valid, y_valid = _examples(7, 60, noise=0.05)
    found = probe.fit(x, y, x_valid, y_valid, NUM_CLASSES)
    chosen = next(point for point in found.path if point.l2 == found.l2)
    assert found.path[-1].l2 < probe.WEAKEST / 2  # the weaker the better here
    assert found.path[-1].l2 > probe.BOUNDS[0] / probe.FACTOR
    assert np.all(np.isfinite(found.kernel))
    assert chosen.train_accuracy == chosen.valid_accuracy == 1
    assert chosen.valid_loss < 1e-3


def test_more_features_than_examples_have_an_optimum_too():
    x, y = _examples(8, 20, dims=40)
    x_valid, y_valid = _examples(9, 50, dims=40)
    found = probe.fit(x, y, x_valid, y_valid, NUM_CLASSES)
    chosen = next(point for point in found.path if point.l2 == found.l2)
    assert chosen.train_accuracy == 1
    assert chosen.valid_accuracy > 0.9


def test_equal_losses_are_won_by_the_strongest():
    # Features that are all alike: the strength is of no consequence.
    y = np.arange(12) % NUM_CLASSES
    x = np.full((12, 4), 2.5, np.float32)
    found = probe.fit(x, y, x, y, NUM_CLASSES)
    assert {point.valid_loss for point in found.path} == {found.path[0].valid_loss}
    assert found.l2 == found.path[0].l2
    assert not np.any(found.kernel)


def test_a_constant_feature_is_not_blown_up():
    x, y = _examples(10, 80)
    x_valid, y_valid = _examples(11, 50)
    plain = probe.fit(x, y, x_valid, y_valid, NUM_CLASSES)
    rng = np.random.default_rng(0)

    def more(x):
        noise = 1e-4 * rng.standard_normal(len(x)).astype(np.float32)  # of 1000
        return np.column_stack([x, 1000 + noise]).astype(np.float32)

    found = probe.fit(more(x), y, more(x_valid), y_valid, NUM_CLASSES)
    np.testing.assert_allclose(found.kernel[:, :5], plain.kernel, rtol=1e-3, atol=1e-4)
    assert np.abs(found.kernel[:, 5]).max() < 0.1


def test_what_cannot_be_probed_is_refused(monkeypatch):
    x, y = _examples(0, 10)
    bad = x.copy()
    bad[3, 2] = np.nan
    with pytest.raises(UserError, match="features must be finite to be probed"):
        probe.fit(x, y, bad, y, NUM_CLASSES)
    with pytest.raises(ValueError, match=r"x must have a row for each .*\(10, 5\)"):
        probe.fit(x, y[:9], x, y, NUM_CLASSES)
    with pytest.raises(ValueError, match="targets must be from 0 to 1; got 0 to 2"):
        probe.fit(x, y, x, y, 2)
    monkeypatch.setattr(probe, "MAX_STEPS", 1)
    with pytest.raises(ValueError, match=r"must converge at l2=10\.0; got a gradient"):
        probe.fit(x, y, x, y, NUM_CLASSES)


def test_a_path_ends_where_steps_do_not_suffice(monkeypatch):
    x, y = _examples(0, 40)
    whole = probe.fit(x, y, x, y, NUM_CLASSES)
    monkeypatch.setattr(probe, "MAX_STEPS", 25)
    cut = probe.fit(x, y, x, y, NUM_CLASSES)
    assert 1 < len(cut.path) < len(whole.path)
    assert cut.l2 == cut.path[-1].l2
