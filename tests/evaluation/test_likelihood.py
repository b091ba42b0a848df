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
