"""Tests of weights in eight bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax import trees
from fm_jax.generation import quantise
from fm_jax.generation.request import Request
from fm_jax.models import zoo


@pytest.mark.parametrize("summed", [(0,), (0, 1), (1,)])
def test_a_weight_is_off_by_half_a_step_of_its_own_output_at_most(summed):
    weight = np.random.default_rng(1).standard_normal((5, 7, 4)).astype(np.float32)
    weight *= np.array([1.0, 1e-3, 50.0, 0.0], np.float32)
    held = quantise.quantised(jnp.asarray(weight), summed)
    assert held.whole.dtype == jnp.int8
    found = np.asarray(quantise.restored(held))
    most = np.abs(weight).max(axis=summed, keepdims=True)
    assert np.all(np.abs(found - weight) <= most / 254 * (1 + 1e-5))
    largest = np.abs(np.asarray(held.whole)).max(axis=summed)
    np.testing.assert_array_equal(largest, np.where(most.squeeze(summed) > 0, 127, 0))


def test_weights_of_products_are_held_in_eight_bits_and_others_as_they_are(
    architecture, random_params
):
    built = zoo.build(architecture)
    params = random_params(built.abstract)
    held = quantise.prepared(built, params, int8=True)
    is_eight = lambda x: isinstance(x, quantise.Eight)  # noqa: E731
    kinds = trees.leaves_by_path(held, is_leaf=is_eight)
    for path, leaf in kinds.items():
        is_product = (
            path.endswith("kernel") and "router" not in path
        ) or path == "head"
        assert is_eight(leaf) == is_product, path
    whole = jax.tree.leaves(quantise.restored(held))
    exact = jax.tree.leaves(built.unstack(params))
    for ours, theirs in zip(whole, exact, strict=True):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, atol=np.abs(theirs).max() / 254)


def test_a_scale_belongs_to_one_output(model):
    built, params = model
    held = quantise.prepared(built, params, int8=True)
    attention = held["blocks"][0]["attention"]
    assert attention["query"]["kernel"].scale.shape == (1, 4, 6)
    assert attention["out"]["kernel"].scale.shape == (1, 1, 12)
    assert held["blocks"][0]["mlp"]["down"]["kernel"].scale.shape == (1, 12)
    assert held["head"].scale.shape == (37, 1)


def test_text_in_eight_bits_is_that_of_the_rounded_weights(model, greedy, write):
    built, params = model
    held = quantise.restored(quantise.prepared(built, params, int8=True))
    blocks = jax.tree.map(lambda *layers: np.stack(layers), *held["blocks"])
    rounded = built, held | {"blocks": blocks}
    prompts = [(3, 1, 4), (9,), (30, 2)]
    found, _ = write(model, [Request(p, 9) for p in prompts], int8=True)
    assert found == [greedy(rounded, prompt, 9) for prompt in prompts]


def test_eight_bits_take_about_a_quarter_of_the_bytes(model_config):
    built = zoo.build(model_config(embed_dim=64, mlp_dim=256, vocab_size=8))
    params = jax.jit(built.init)(jax.random.key(0))
    sizes = [
        quantise.num_bytes(quantise.prepared(built, params, int8=int8))
        for int8 in (False, True)
    ]
    assert 0.25 < sizes[1] / sizes[0] < 0.3


def test_weights_are_cast_once_to_what_products_take(model_config):
    built = zoo.build(model_config(dtype="bfloat16"))
    params = jax.jit(built.init)(jax.random.key(0))
    held = quantise.prepared(built, params, int8=False)
    assert held["blocks"][0]["mlp"]["up"]["kernel"].dtype == jnp.bfloat16
    assert held["head"].dtype == jnp.bfloat16
    assert held["embedding"].dtype == held["final_norm"]["scale"].dtype == jnp.float32


@pytest.mark.parametrize(
    "is_tied, residual_dtype, expected",
    [
        (False, "bfloat16", "bfloat16"),
        (True, "bfloat16", "bfloat16"),
        (True, "float32", "float32"),
        (False, "float32", "float32"),
    ],
)
def test_embeddings_are_held_in_the_dtype_of_all_their_uses(
    is_tied, residual_dtype, expected, model_config, random_params
):
    fields = {"positions": "learned", "tied_embeddings": is_tied}
    dtypes = {"dtype": "bfloat16", "residual_dtype": residual_dtype}
    built = zoo.build(model_config(**fields, **dtypes))
    params = random_params(built.abstract)
    held = quantise.prepared(built, params, int8=False)
    assert held["embedding"].dtype == jnp.dtype(expected)
    assert held["position_embedding"].dtype == jnp.dtype(residual_dtype)
    rows = (jnp.array([[3, 1, 4, 1]]), jnp.array([4]), 5)

    @jax.jit
    def logits(params):
        x_BD, _ = built.prefill(params, *rows[:2], 5)
        return built.logits(params, x_BD[:, None])

    np.testing.assert_array_equal(logits(held), logits(built.unstack(params)))
