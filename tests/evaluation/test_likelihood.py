"""Tests of held-out metrics: weighted sums, divided once."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax import objectives
from fm_jax.evaluation import likelihood


def _pass_through(params, batch):
    return batch


def _sums(nll, weight, correct=0.0, num_bytes=1.0):
    return {"nll": nll, "weight": weight, "correct": correct, "bytes": num_bytes}


def test_metrics_are_sums_over_all_batches_divided_once():
    batches = [_sums(6.0, 2.0, 1.0, 5.0), _sums(3.0, 10.0, 6.0, 31.0)]
    found = likelihood.evaluate(_pass_through, {}, batches)
    assert found == {
        "loss": 9 / 12,
        "bits_per_byte": pytest.approx(9 / math.log(2) / 36, rel=1e-15),
        "accuracy": 7 / 12,
        "tokens": 12.0,
        # Residuals 6 - 0.75 * 2 and 3 - 0.75 * 10: sqrt(2 / 1 * 2 * 4.5^2) / 12.
        "loss_se": pytest.approx(9 / 12, rel=1e-15),
    }


def test_a_batch_without_weight_changes_nothing():
    real = _sums(6.0, 2.0, 1.0, 5.0)
    padding = _sums(0.0, 0.0, 0.0, 0.0)
    assert likelihood.evaluate(
        _pass_through, {}, [padding, real, padding]
    ) == likelihood.evaluate(_pass_through, {}, [real])


def test_sums_that_float32_would_lose_are_kept():
    # 2**24 + 1 is 2**24 in float32.
    large, small = jnp.float32(2**24), jnp.float32(1)
    batches = [_sums(large, large)] + [_sums(small, small)] * 3
    found = likelihood.evaluate(_pass_through, {}, batches)
    assert found["tokens"] == 2**24 + 3


def test_the_step_is_given_the_params_and_each_batch():
    seen = []

    def step(params, batch):
        seen.append((params, batch))
        return _sums(1.0, 1.0)

    likelihood.evaluate(step, {"w": 3}, iter(["a", "b"]))
    assert seen == [({"w": 3}, "a"), ({"w": 3}, "b")]


def test_a_model_that_knows_nothing_has_the_loss_of_a_uniform_guess():
    vocab, bytes_per_token = 23, 3

    def step(head_VD, x_BTD):
        batch, length, _ = x_BTD.shape
        targets_BT = jnp.arange(batch * length).reshape(batch, length) % vocab
        _, sums = objectives.cross_entropy(
            x_BTD,
            head_VD,
            targets_BT,
            jnp.ones((batch, length)),
            softcap=0.0,
            z_loss=0.0,
            chunk=0,
            dtype=jnp.float32,
        )
        return sums | {"bytes": batch * length * bytes_per_token}

    head_VD = np.zeros((vocab, 4), np.float32)
    batches = [np.ones((2, 5, 4), np.float32), np.ones((3, 7, 4), np.float32)]
    found = likelihood.evaluate(step, head_VD, batches)
    assert found["tokens"] == 31
    assert found["loss"] == pytest.approx(math.log(vocab), rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(math.log2(vocab) / 3, rel=1e-6)


def _without_bytes(sums):
    return {name: x for name, x in sums.items() if "bytes" not in name}


@pytest.mark.parametrize("is_there", [True, False])
def test_what_is_no_text_has_no_bits_per_byte(is_there):
    text = [_sums(6.0, 2.0, 1.0, 5.0), _sums(3.0, 10.0, 6.0, 31.0)]
    labels = [sums | {"bytes": 0.0} for sums in text]
    if not is_there:
        labels = [_without_bytes(sums) for sums in text]
    found = likelihood.evaluate(_pass_through, {}, labels)
    whole = likelihood.evaluate(_pass_through, {}, text)
    assert whole.pop("bits_per_byte") > 0
    assert found == whole


def test_other_sums_are_metrics_when_divided_by_the_weight():
    batches = [_sums(6.0, 2.0) | {"margin": -1.0}, _sums(3.0, 10.0) | {"margin": 4.0}]
    found = likelihood.evaluate(_pass_through, {}, batches)
    assert found.pop("margin") == 3 / 12
    plain = [_sums(6.0, 2.0), _sums(3.0, 10.0)]
    assert found == likelihood.evaluate(_pass_through, {}, plain)


# ---- components of a mixture


def _mixed_sums(nll, weight, num_bytes, correct=(0.0, 0.0, 0.0)):
    """Return a batch's sums of three components, as device arrays."""
    sums = {"nll": nll, "weight": weight, "bytes": num_bytes, "correct": correct}
    apart = {f"component_{n}": jnp.array(x, jnp.float32) for n, x in sums.items()}
    return _sums(sum(nll), sum(weight), sum(correct), sum(num_bytes)) | apart


def test_each_component_has_its_own_sums_divided_once():
    batches = [
        _mixed_sums([6.0, 1.0, 0.0], [2.0, 4.0, 0.0], [5.0, 4.0, 0.0], [1.0, 2.0, 0]),
        _mixed_sums([3.0, 2.0, 0.0], [10.0, 8.0, 0.0], [31.0, 6.0, 0.0], [6.0, 3.0, 0]),
    ]
    names = ("wiki", "code", "held/back")
    found = likelihood.evaluate(_pass_through, {}, batches, names=names)
    whole = likelihood.evaluate(_pass_through, {}, batches)
    assert {n: x for n, x in found.items() if "/" not in n} == whole
    # Of what had no tokens nothing is said.
    assert {n: x for n, x in found.items() if "/" in n} == {
        "loss/wiki": 9 / 12,
        "loss/code": 3 / 12,
        "accuracy/wiki": 7 / 12,
        "accuracy/code": 5 / 12,
        "bits_per_byte/wiki": pytest.approx(9 / math.log(2) / 36, rel=1e-15),
        "bits_per_byte/code": pytest.approx(3 / math.log(2) / 10, rel=1e-15),
        "tokens/wiki": 12.0,
        "tokens/code": 12.0,
    }


@pytest.mark.parametrize("is_there", [True, False])
def test_components_that_are_no_text_have_no_bits_per_byte(is_there):
    nll, weight, correct = [6.0, 1.0, 0.0], [2.0, 4.0, 0.0], [1.0, 3.0, 0.0]
    batch = _mixed_sums(nll, weight, [0.0, 0.0, 0.0], correct)
    batch = batch if is_there else _without_bytes(batch)
    found = likelihood.evaluate(_pass_through, {}, [batch], names=("a", "b", "c"))
    assert {n: x for n, x in found.items() if "/" in n} == {
        "loss/a": 3.0,
        "accuracy/a": 0.5,
        "tokens/a": 2.0,
        "loss/b": 0.25,
        "accuracy/b": 0.75,
        "tokens/b": 4.0,
    }


def test_a_single_component_is_the_whole():
    batches = [_sums(6.0, 2.0), _sums(3.0, 10.0)]
    found = likelihood.evaluate(_pass_through, {}, batches, names=("wiki",))
    assert found == likelihood.evaluate(_pass_through, {}, batches)


def test_sums_of_components_that_float32_would_lose_are_kept():
    small = _mixed_sums([0.0, 0.0, 1.0], [0.0, 0.0, 1.0], [0.0, 0.0, 3.0])
    large = _mixed_sums([0.0, 0.0, 2.0**24], [0.0, 0.0, 2.0**24], [0.0, 0.0, 5.0])
    batches = [large, *[small] * 3]
    found = likelihood.evaluate(_pass_through, {}, batches, names=("a", "b", "c"))
    assert found["tokens/c"] == 2**24 + 3


# ---- standard errors


def test_the_standard_error_is_the_spread_of_the_loss_over_draws_of_the_text():
    rng = np.random.default_rng(0)
    losses, errors = [], []
    for _ in range(3000):
        weight = rng.integers(20, 60, 40)
        nll = weight * (2 + rng.normal(0, 0.3, 40))  # batches are clusters
        batches = [_sums(*pair) for pair in zip(nll, weight, strict=True)]
        found = likelihood.evaluate(_pass_through, {}, batches)
        losses.append(found["loss"])
        errors.append(found["loss_se"])
    assert np.mean(errors) == pytest.approx(np.std(losses), rel=0.05)


def test_the_standard_error_of_equal_batches_is_that_of_a_mean():
    nll = [3.0, 5.0, 4.0, 8.0]
    found = likelihood.evaluate(_pass_through, {}, [_sums(x, 2.0) for x in nll])
    expected = np.std(np.array(nll) / 2, ddof=1) / math.sqrt(4)
    assert found["loss_se"] == pytest.approx(expected, rel=1e-14)


def test_one_batch_has_no_standard_error():
    batches = [_sums(6.0, 2.0), _sums(0.0, 0.0, 0.0, 0.0)]
    found = likelihood.evaluate(_pass_through, {}, batches, bayes=[5.0, 0.0])
    assert not {"loss_se", "excess_se"} & found.keys()
    assert found["excess_loss"] == 0.5


# ---- beside the best possible loss


def test_the_excess_is_what_the_loss_is_above_the_best_with_an_error_of_its_own():
    batches = [_sums(6.0, 2.0), _sums(30.0, 10.0), _sums(3.0, 3.0)]
    best = [5.0, 25.0, 1.5]  # the excess is the same for each token
    found = likelihood.evaluate(_pass_through, {}, batches, bayes=best)
    assert found["bayes_loss"] == pytest.approx(31.5 / 15, rel=1e-15)
    assert found["excess_loss"] == pytest.approx(0.5, rel=1e-15)
    assert found["excess_se"] == pytest.approx(0, abs=1e-15)
    assert found["loss_se"] > 0.1


def test_as_many_best_losses_as_batches_are_demanded():
    with pytest.raises(ValueError, match="shape"):
        likelihood.evaluate(_pass_through, {}, [_sums(6.0, 2.0)] * 3, bayes=[1.0, 2.0])


def _metrics(gains, weight=1000.0):
    """Return metrics of batches that are below the best by `gains` nats a token."""
    best = [2.0 * weight] * len(gains)
    batches = [_sums((2.0 - gain) * weight, weight) for gain in gains]
    return likelihood.evaluate(_pass_through, {}, batches, bayes=best)


def test_a_loss_below_the_best_beyond_chance_is_told():
    # 90 nats in all: a model that knows more than there is to know.
    found = _metrics([0.03, 0.029, 0.031])
    assert likelihood.below_bayes(found) == (
        "the held-out loss must not be below the source's Bayes loss; got 1.970000 "
        "against 2.000000 nats/token, 90 nats in all and 0.00058 nats/token of "
        "standard error. Held-out text has leaked into training, or evaluation has a "
        "bug; or, of an hmm or several chains, it is chance: where documents are few "
        "or longer than a batch."
    )
    assert likelihood.below_bayes(_metrics([0.03]))


@pytest.mark.parametrize(
    "gains",
    [
        [-0.03, -0.029, -0.031],  # above it, as it must be
        [0.0, 0.0, 0.0],
        [0.006, 0.0059, 0.0061],  # by 18 nats
        [0.03, -0.03, 0.09],  # by 90, within the spread of batches
        [0.01],
    ],
)
def test_a_loss_that_chance_explains_is_not_told(gains):
    assert not likelihood.below_bayes(_metrics(gains))


def test_nothing_is_told_where_the_best_is_not_known():
    found = likelihood.evaluate(_pass_through, {}, [_sums(6.0, 2.0)])
    assert "bayes_loss" not in found
    assert not likelihood.below_bayes(found)
