"""Tests of the train step: accumulation, averages, a golden run."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fm_jax import optimizers
from fm_jax.models import zoo
from fm_jax.train import step as steps

ROWS, LENGTH = 8, 5
GOLDEN_LOSSES = [4.963785, 3.900653, 3.247282, 2.887306]


@pytest.fixture(scope="module")
def model(model_config):
    return zoo.build(model_config(embed_dim=8, mlp_dim=16, num_layers=2))


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(3)
    weights = rng.random((ROWS, LENGTH), np.float32)
    weights[0] = 0  # a row of padding, and uneven rows
    weights[5, 2:] = 0
    return {
        "tokens": rng.integers(0, 37, (ROWS, LENGTH), np.int32),
        "targets": rng.integers(0, 37, (ROWS, LENGTH), np.int32),
        "loss_weights": weights,
        "positions": np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)),
        "segment_ids": np.ones((ROWS, LENGTH), np.int32),
        "target_bytes": rng.integers(1, 6, (ROWS, LENGTH), np.int32),
    }


def _step(model, tx, **overrides):
    options = {"accumulation": 1, "z_loss": 0.0, "loss_chunk": 0, "ema_decay": 0.0}
    rate = lambda step: 0.125 * (step + 1)  # noqa: E731
    return steps.make_train_step(model, tx, rate, **options | overrides)


def _gradient(model, params, batch, **overrides):
    """Return one step's gradient: what plain descent at rate 1 takes off."""
    tx = optax.sgd(1.0)
    state = steps.TrainState(jnp.int32(0), params, tx.init(params), None)
    after, metrics = jax.jit(_step(model, tx, **overrides))(state, batch)
    return jax.tree.map(lambda a, b: a - b, params, after.params), metrics


def _close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


@pytest.mark.parametrize("accumulation", [2, 4, 8])
def test_accumulated_gradient_is_that_of_the_whole_batch(
    model, batch, random_params, accumulation
):
    params = random_params(model.abstract)
    whole, numbers = _gradient(model, params, batch, z_loss=0.01)
    parts, same = _gradient(
        model, params, batch, z_loss=0.01, accumulation=accumulation
    )
    _close(parts, whole, rtol=2e-5, atol=2e-6)
    _close(same, numbers, rtol=1e-5)


def test_gradient_is_of_the_weighted_mean_over_all_tokens(model, batch, random_params):
    params = random_params(model.abstract)

    def mean_loss(params):
        x, _ = model.hidden(
            params, batch["tokens"], batch["positions"], batch["segment_ids"]
        )
        log_probs = jax.nn.log_softmax(model.logits(params, x))
        nll = -jnp.take_along_axis(log_probs, batch["targets"][..., None], -1)[..., 0]
        return jnp.average(nll, weights=batch["loss_weights"])

    loss, expected = jax.jit(jax.value_and_grad(mean_loss))(params)
    found, metrics = _gradient(model, params, batch)
    _close(found, expected, rtol=1e-4, atol=2e-6)
    assert float(metrics["train/loss"]) == pytest.approx(float(loss), rel=1e-6)
    counted = batch["target_bytes"][batch["loss_weights"] > 0].sum()
    bits = float(loss) * batch["loss_weights"].sum() / math.log(2) / counted
    assert float(metrics["train/bits_per_byte"]) == pytest.approx(bits, rel=1e-5)
    norm = math.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(expected)))
    assert float(metrics["grads/norm"]) == pytest.approx(norm, rel=1e-5)


def test_the_average_follows_the_weights(model, batch):
    tx = optax.sgd(0.5)
    state = steps.create(model, tx, ema_decay=0.75)(jax.random.key(0))
    _close(state.ema, state.params, rtol=0)
    before = state.params
    after, _ = jax.jit(_step(model, tx, ema_decay=0.75))(state, batch)
    expected = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, before, after.params)
    _close(after.ema, expected, rtol=1e-6, atol=1e-7)
    assert after.weights() is after.ema


def test_without_an_average_the_weights_are_the_params(model):
    state = steps.create(model, optax.sgd(0.5), ema_decay=0.0)(jax.random.key(0))
    assert state.ema is None
    assert state.weights() is state.params


def test_evaluation_sums_are_those_of_training_without_z_loss(
    model, batch, random_params
):
    params = random_params(model.abstract)
    sums = jax.jit(steps.make_eval_step(model, loss_chunk=0))(params, batch)
    _, metrics = _gradient(model, params, batch, z_loss=0.5)
    loss = float(sums["nll"] / sums["weight"])
    assert loss == pytest.approx(float(metrics["train/loss"]), rel=1e-6)
    assert (
        float(sums["bytes"]) == batch["target_bytes"][batch["loss_weights"] > 0].sum()
    )


def test_golden_steps(model, batch):
    """Four AdamW steps from a fixed seed: any change of the numbers shows here.

    The epsilon is large: where a gradient is next to nothing, Adam would otherwise blow
    the rounding of one compiler or another up to a whole step.
    """
    rate = optimizers.schedule(
        name="cosine", peak=0.03, num_steps=4, warmup_fraction=0.25,
        decay_fraction=0.0, final_fraction=0.1,
    )  # fmt: skip
    mask = optimizers.decay_mask(
        model.abstract, (("norm|bias|embedding", False), (".*", True))
    )
    tx = optimizers.make(
        rate, mask, name="adamw", weight_decay=0.1, beta1=0.9, beta2=0.95,
        epsilon=1e-2, mu_dtype="float32", nu_dtype="float32", clip_norm=1.0,
    )  # fmt: skip
    state = steps.create(model, tx, ema_decay=0.0)(jax.random.key(7))
    step = jax.jit(_step(model, tx, z_loss=1e-3))
    losses = []
    for _ in range(4):
        state, metrics = step(state, batch)
        losses.append(float(metrics["train/loss"]))
    np.testing.assert_allclose(losses, GOLDEN_LOSSES, rtol=2e-5)
