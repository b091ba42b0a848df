"""Tests of heads of classifiers, against products in NumPy and the model's own."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax import meshes, objectives, sharding
from fm_jax.errors import UserError
from fm_jax.finetune import heads
from fm_jax.models import zoo
from tests.models import reference

NUM_CLASSES = 3
TOKENS_BT = np.random.default_rng(5).integers(0, 37, (2, 7), np.int32)
POSITIONS_BT = np.broadcast_to(np.arange(7, dtype=np.int32), (2, 7))
ROWS = (TOKENS_BT, POSITIONS_BT, np.ones_like(TOKENS_BT))
IDS = (30, 4, 11)


@functools.partial(jax.jit, static_argnums=0)
def _forward(model, params):
    x_BTD = model.hidden(params, *ROWS)[0]
    return x_BTD, model.logits(params, x_BTD)


def _loss(model):
    """Return f(params, batch) -> (summed loss, sums), as training has it."""

    def loss(params, batch):
        rows = (batch[name] for name in ("tokens", "positions", "segment_ids"))
        return objectives.cross_entropy(
            model.hidden(params, *rows)[0],
            model.head(params),
            batch["targets"],
            batch["loss_weights"],
            softcap=model.config.logits_softcap,
            z_loss=0.0,
            chunk=0,
            dtype=jnp.dtype(model.config.dtype),
            bias_V=model.head_bias(params),
        )

    return loss


def _close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


def test_a_classifier_has_the_models_features_and_its_own_head(
    architecture, random_params
):
    bare = zoo.build(architecture)
    model = heads.with_classifier(bare, NUM_CLASSES)
    params = random_params(model.abstract)
    x_BTD, logits_BTC = _forward(model, params)
    _close(x_BTD, jax.jit(bare.hidden)(heads.without(params), *ROWS)[0])
    head = params["classifier"]
    expected = np.asarray(x_BTD) @ head["kernel"].T + head["bias"]
    assert logits_BTC.dtype == np.float32
    _close(logits_BTC, expected)
    np.testing.assert_array_equal(model.head(params), head["kernel"])
    np.testing.assert_array_equal(model.head_bias(params), head["bias"])


def test_label_words_have_the_logits_of_their_tokens(architecture, random_params):
    bare = zoo.build(architecture)
    model = heads.with_label_words(bare, IDS)
    params = random_params(bare.abstract)
    assert model.abstract is bare.abstract
    _, logits_BTC = _forward(model, params)
    every_BTV = reference.logits(architecture, params, *ROWS)
    _close(logits_BTC, every_BTV[..., list(IDS)])


@pytest.mark.parametrize("wrap", ["classifier", "words"])
def test_the_loss_is_that_of_the_logits(wrap, model_config, random_params):
    config = model_config(logits_softcap=1.5, biases=("head",), num_layers=1)
    bare = zoo.build(config)
    if wrap == "words":
        model = heads.with_label_words(bare, IDS)
    else:
        model = heads.with_classifier(bare, NUM_CLASSES)
    params = random_params(model.abstract)
    at_BT = np.zeros((2, 7), np.float32)
    at_BT[0, 4] = at_BT[1, 6] = 1
    targets_BT = np.where(at_BT, [[2], [1]], 0).astype(np.int32)
    names = ("tokens", "positions", "segment_ids")
    batch = dict(zip(names, ROWS, strict=True)) | {
        "targets": targets_BT,
        "loss_weights": at_BT,
    }
    sums = jax.jit(_loss(model))(params, batch)[1]
    logits_BTC = np.asarray(_forward(model, params)[1], np.float64)
    logits_NC = np.stack([logits_BTC[0, 4], logits_BTC[1, 6]])
    log_probs_NC = logits_NC - np.log(np.exp(logits_NC).sum(-1, keepdims=True))
    _close(sums["nll"], -log_probs_NC[0, 2] - log_probs_NC[1, 1])
    assert sums["weight"] == 2
    assert sums["correct"] == np.sum(logits_NC.argmax(-1) == [2, 1])


def test_a_classifiers_first_weights_are_small_and_of_the_shapes_said(model_config):
    config = model_config(embed_init_std=0.02, embed_dim=60)
    model = heads.with_classifier(zoo.build(config), 50)
    params = model.init(jax.random.key(3))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    assert shapes == model.abstract
    head = params["classifier"]
    assert not np.any(head["bias"])
    assert np.std(head["kernel"]) == pytest.approx(0.02, rel=0.05)  # 3000 draws


def test_the_last_token_of_a_padded_prompt_has_the_logits_of_its_row(
    architecture, random_params
):
    model = heads.with_classifier(zoo.build(architecture), NUM_CLASSES)
    params = random_params(model.abstract)
    lengths = np.array([4, 7], np.int32)

    @jax.jit
    def last(params):
        unstacked = model.unstack(params)
        x_BD, _ = model.prefill(unstacked, TOKENS_BT, lengths, 7)
        return model.logits(unstacked, x_BD[:, None])[:, 0]

    bare = heads.without(params)
    tied = {"head": params["classifier"]["kernel"]}
    tied |= {"head_bias": params["classifier"]["bias"]}
    fields = {"tied_embeddings": False, "biases": (*architecture.biases, "head")}
    fields |= {"logits_softcap": 0.0}
    config = dataclasses.replace(architecture, **fields)
    logits_BTC = reference.logits(config, bare | tied, *ROWS)
    _close(last(params), logits_BTC[[0, 1], lengths - 1])


@pytest.mark.parametrize("num_classes", [3, 4])
def test_a_mesh_changes_no_gradient_of_a_classifier(
    num_classes, model_config, random_params
):
    # Classes that do not divide over the devices that words are cut over, and that do.
    config = model_config(num_layers=1, vocab_size=38)
    model = heads.with_classifier(zoo.build(config), num_classes)
    params = random_params(model.abstract)
    rng = np.random.default_rng(0)
    batch = {
        "tokens": rng.integers(0, 38, (8, 7), np.int32),
        "targets": rng.integers(0, num_classes, (8, 7), np.int32),
        "loss_weights": (rng.random((8, 7)) < 0.3).astype(np.float32),
        "positions": np.tile(np.arange(7, dtype=np.int32), (8, 1)),
        "segment_ids": np.ones((8, 7), np.int32),
    }
    grad_of = jax.value_and_grad(_loss(model), has_aux=True)
    (_, sums), grads = jax.jit(grad_of)(params, batch)
    mesh = meshes.make(meshes.sizes("ddp", {"fsdp": 2, "tensor": 2, "data": 2}, 8))
    layout = sharding.layout(mesh)
    places = sharding.tree_shardings(model.axes, model.abstract, layout)
    with layout.active():
        cut = jax.device_put(params, places)
        rows = sharding.put_batch(batch, 8, layout)
        (_, sums_cut), grads_cut = jax.jit(grad_of)(cut, rows)
    np.testing.assert_allclose(sums_cut["nll"], sums["nll"], rtol=1e-6)
    for found, expected in zip(
        jax.tree.leaves(grads_cut), jax.tree.leaves(grads), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


def test_what_is_no_classifier_is_refused(model_config):
    model = zoo.build(model_config())
    with pytest.raises(UserError, match=r"at least 2 classes; got 1\. Give data"):
        heads.with_classifier(model, 1)
    with pytest.raises(UserError, match=r"different tokens; got the ids \[4, 4\]"):
        heads.with_label_words(model, [4, 4])
    with pytest.raises(UserError, match=r"from 0 to 36; got \[4, 37\]\. Use the model"):
        heads.with_label_words(model, [4, 37])


def test_a_classifier_writes_no_text(model_config):
    bare = zoo.build(model_config())
    for model in (heads.with_classifier(bare, 3), heads.with_label_words(bare, IDS)):
        with pytest.raises(UserError, match="head of tokens to write text"):
            model.empty_cache(2, 11)
        with pytest.raises(UserError, match="Use fm classify"):
            model.decode({}, TOKENS_BT[:, 0], None)
