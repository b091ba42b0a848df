"""Tests of features at the places with weight, against whole hidden states."""

import jax
import numpy as np
import pytest

from fm_jax import meshes, sharding
from fm_jax.finetune import features, heads
from fm_jax.models import zoo

LENGTH = 8


def batches_of(num_places, components=None, length=LENGTH):
    """Return a batch for each list of numbers of weighted places of its rows."""
    rng = np.random.default_rng(1)
    found = []
    for number, counts in enumerate(num_places):
        shape = (len(counts), length)
        weights_BT = np.zeros(shape, np.float32)
        for row, count in enumerate(counts):
            weights_BT[row, rng.choice(length, count, replace=False)] = 1
        batch = {
            "tokens": rng.integers(0, 37, shape, np.int32),
            "targets": rng.integers(0, 3, shape, np.int32),
            "loss_weights": weights_BT,
            "positions": np.tile(np.arange(length, dtype=np.int32), (shape[0], 1)),
            "segment_ids": np.ones(shape, np.int32),
            "target_bytes": np.zeros(shape, np.int32),
        }
        if components:
            batch["components"] = np.array(components[number], np.int32)
        found.append(batch)
    return found


def _expected(model, params, batches):
    """Return features and targets one place at a time."""
    hidden, x, y = jax.jit(model.hidden), [], []
    for batch in batches:
        rows = (batch[name] for name in ("tokens", "positions", "segment_ids"))
        x_BTD = np.asarray(hidden(params, *rows)[0])
        for row, place in np.argwhere(batch["loss_weights"]):
            x.append(x_BTD[row, place])
            y.append(batch["targets"][row, place])
    return np.array(x), np.array(y)


@pytest.fixture(scope="module")
def model(model_config):
    bare = zoo.build(model_config(num_layers=1))
    return heads.with_classifier(bare, 3)


def test_features_are_the_hidden_states_where_weight_is(model, random_params):
    params = random_params(model.abstract)
    # Rows of none, of one and of all places, in an order that makes it compile anew.
    batches = batches_of([(1, 0, 1), (3, 8, 0), (0, 0, 0), (2, 1, 1)])
    x, y = features.of(model, params, batches)
    expected_x, expected_y = _expected(model, params, batches)
    assert x.dtype == np.float32
    assert y.dtype == np.int32
    assert x.shape == (17, 12)
    np.testing.assert_allclose(x, expected_x, rtol=0, atol=2e-6)
    np.testing.assert_array_equal(y, expected_y)


def test_bfloat16_features_are_float32_on_the_host(model_config, random_params):
    model = zoo.build(
        model_config(num_layers=1, dtype="bfloat16", residual_dtype="bfloat16")
    )
    batches = batches_of([(1, 1)])
    x, _ = features.of(model, random_params(model.abstract), batches)
    assert x.dtype == np.float32


@pytest.mark.parametrize(
    "axes", [{"data": 8}, {"fsdp": 2, "tensor": 2, "data": 2}, {"context": 4}]
)
def test_a_mesh_changes_no_feature(axes, model, random_params):
    params = random_params(model.abstract)
    batches = batches_of([(1,) * 8, (0, 1, 3, 2, 0, 0, 0, 1)])
    sizes = {"data": -1, "fsdp": 1, "tensor": 1} | axes
    layout = sharding.layout(meshes.make(meshes.sizes("ddp", sizes, 8)))
    abstract = dict(model.abstract)
    axes = model.axes
    if layout.mesh.shape["tensor"] > 1:  # 37 words do not divide
        axes = jax.tree.map(
            lambda names: tuple(None if n == "vocab" else n for n in names),
            axes,
            is_leaf=lambda x: isinstance(x, tuple),
        )
    places = sharding.tree_shardings(axes, abstract, layout)
    with layout.active():
        cut = jax.device_put(params, places)
        rows = [sharding.put_batch(batch, 8, layout) for batch in batches]
        x, y = features.of(model, cut, rows)
    expected_x, expected_y = _expected(model, params, batches)
    order, expected_order = (
        np.lexsort(np.round(values, 3).T) for values in (x, expected_x)
    )
    if layout.mesh.shape["context"] == 1:
        np.testing.assert_array_equal(order, expected_order)
    np.testing.assert_allclose(x[order], expected_x[expected_order], rtol=0, atol=5e-6)
    np.testing.assert_array_equal(y[order], expected_y[expected_order])


def test_examples_know_their_component(model, random_params):
    batches = batches_of([(1, 2, 0), (1, 0, 1)], components=[(1, 0, 1), (0, 1, 1)])
    found = list(features.by_batch(model, random_params(model.abstract), batches))
    np.testing.assert_array_equal(found[0].components, [1, 0, 0])
    np.testing.assert_array_equal(found[1].components, [0, 1])


def test_batches_of_no_example_are_no_features(model, random_params):
    with pytest.raises(ValueError, match="places with weight; got none"):
        features.of(model, random_params(model.abstract), batches_of([(0, 0)]))
