"""Tests of models as functions: decoding token by token, against whole rows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax import meshes, sharding
from fm_jax.compiled import estimates, program
from fm_jax.models import cache as caches
from fm_jax.models import zoo
from tests.conftest import ARCHITECTURES
from tests.models import reference

ATOL = 2e-5  # of float32 logits that are O(1), against float64
LENGTH = 11
PROMPTS = (5, 1, 4)  # tokens of each row that are there at once
TOKENS_BT = np.random.default_rng(7).integers(0, 37, (3, LENGTH), np.int32)


@functools.partial(jax.jit, static_argnames=("model", "capacity"))
def _prefill(model, params, tokens_BT, lengths_B, capacity):
    unstacked = model.unstack(params)
    x_BD, cache = model.prefill(unstacked, tokens_BT, lengths_B, capacity)
    return model.logits(unstacked, x_BD[:, None])[:, 0], cache


@functools.partial(jax.jit, static_argnames=("model",))
def _decode(model, params, tokens_B, cache):
    unstacked = model.unstack(params)
    x_BD, cache = model.decode(unstacked, tokens_B, cache)
    return model.logits(unstacked, x_BD[:, None])[:, 0], cache


def _prompts(tokens_BT, lengths):
    """Return prompts padded at their ends, with ids that must not matter there."""
    padded_BT = np.array(tokens_BT[:, : max(lengths) + 1])
    for row, length in enumerate(lengths):
        padded_BT[row, length:] = 36 - padded_BT[row, length:]
    return padded_BT, np.array(lengths, np.int32)


def _decoded(model, params, capacity, tokens_BT=TOKENS_BT, lengths=PROMPTS, steps=6):
    """Return logits [steps + 1, B, V] of the prompts' ends and each token after."""
    logits_BV, cache = _prefill(model, params, *_prompts(tokens_BT, lengths), capacity)
    rows, found = np.arange(len(lengths)), [logits_BV]
    for step in range(steps):
        next_B = tokens_BT[rows, np.array(lengths) + step]
        logits_BV, cache = _decode(model, params, next_B, cache)
        found.append(logits_BV)
    np.testing.assert_array_equal(cache.lengths_B, np.array(lengths) + steps)
    return np.stack(found)


def _whole(config, params, tokens_BT=TOKENS_BT, lengths=PROMPTS, steps=6):
    """Return the same from whole rows in float64."""
    positions_BT = np.broadcast_to(np.arange(tokens_BT.shape[1]), tokens_BT.shape)
    ones_BT = np.ones_like(tokens_BT)
    logits_BTV = reference.logits(config, params, tokens_BT, positions_BT, ones_BT)
    rows = np.arange(len(lengths))
    at = np.array(lengths) - 1
    return np.stack([logits_BTV[rows, at + step] for step in range(steps + 1)])


def test_decoding_equals_whole_rows(architecture, random_params):
    model = zoo.build(architecture)
    params = random_params(model.abstract)
    found = _decoded(model, params, capacity=LENGTH)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, _whole(architecture, params), rtol=0, atol=ATOL)


@pytest.mark.parametrize(
    "window, capacity, slots",
    [(1, 11, 1), (2, 11, 2), (3, 19, 3), (12, 11, 11), (40, 16, 16), (0, 16, 16)],
)
def test_a_ring_of_slots_may_be_of_any_size(
    window, capacity, slots, model_config, random_params
):
    config = model_config(window=window, num_layers=2)
    model = zoo.build(config)
    params = random_params(model.abstract)
    assert caches.num_slots(config, capacity) == [slots, slots]
    # Of prompts one is longer than some rings, and each row goes round them again.
    found = _decoded(model, params, capacity, lengths=(5, 1, 0), steps=6)
    expected = _whole(config, params, lengths=(5, 1, 0), steps=6)
    np.testing.assert_allclose(found[:, :2], expected[:, :2], rtol=0, atol=ATOL)
    # An empty row's logits mean nothing before its first token.
    np.testing.assert_allclose(found[1:, 2], expected[1:, 2], rtol=0, atol=ATOL)


@pytest.mark.parametrize("residual_dtype", ["float32", "bfloat16"])
def test_a_bfloat16_cache_is_as_near_as_whole_rows(
    residual_dtype, model_config, random_params
):
    config = model_config(dtype="bfloat16", residual_dtype=residual_dtype, window=4)
    model = zoo.build(config)
    params = random_params(model.abstract, seed=1)
    cache = model.empty_cache(3, LENGTH)
    assert {x.dtype for x in jax.tree.leaves(cache.layers)} == {jnp.dtype("bfloat16")}
    positions_BT = np.broadcast_to(np.arange(LENGTH), TOKENS_BT.shape)

    @jax.jit
    def forward(params):
        rows = TOKENS_BT, positions_BT, np.ones_like(TOKENS_BT)
        return model.logits(params, model.hidden(params, *rows)[0])

    rows, at = np.arange(3), np.array(PROMPTS) - 1
    whole_BTV = np.asarray(forward(params))
    whole = np.stack([whole_BTV[rows, at + step] for step in range(7)])
    exact = _whole(config, params)

    def error(logits):
        return np.sqrt(np.mean((logits - exact) ** 2)) / np.std(exact)

    found = _decoded(model, params, LENGTH)
    assert 0.5 * error(whole) < error(found) < 1.5 * error(whole) < 0.03


def test_longrope_chooses_by_what_a_cache_has_room_for(model_config, random_params):
    original = 10
    scaling = (
        ("longrope", (2.0,)),
        ("original_length", (float(original),)),
        ("short", (1.0, 1.5, 2.0)),
        ("long", (2.0, 3.0, 9.0)),
        ("magnitude", (0.0,)),
    )
    config = model_config(rope_scaling=scaling)
    model = zoo.build(config)
    params = random_params(model.abstract)
    tokens_BT, steps = TOKENS_BT[:, :original], 3

    def stretched(name):
        given = dict(scaling) | {"long": dict(scaling)[name]}
        given |= {"short": dict(scaling)[name]}
        fixed = dataclasses.replace(config, rope_scaling=tuple(given.items()))
        return _whole(fixed, params, tokens_BT, steps=steps)

    for capacity, name in ((original, "short"), (original + 1, "long")):
        found = _decoded(model, params, capacity, tokens_BT, steps=steps)
        np.testing.assert_allclose(found, stretched(name), rtol=0, atol=ATOL)
    assert np.abs(stretched("short") - stretched("long")).max() > 0.1


def test_no_expert_is_too_full_for_a_token_that_is_decoded(model_config, random_params):
    config = model_config(num_experts=3, num_experts_per_token=2, expert_capacity=0.5)
    model = zoo.build(config)
    params = random_params(model.abstract)
    found = _decoded(model, params, LENGTH)
    np.testing.assert_allclose(found, _whole(config, params), rtol=0, atol=ATOL)


# ---- rows of a cache


MIXED = {"window": 3, "window_pattern": "LG", "qk_norm": True}


def test_rows_that_are_inserted_go_on_as_they_would_alone(model_config, random_params):
    config = model_config(**MIXED)
    model = zoo.build(config)
    params = random_params(model.abstract)
    expected = _whole(config, params)
    # All five rows have been used, and by other texts.
    used = _prompts(36 - np.concatenate([TOKENS_BT, TOKENS_BT[:2]]), (6, 7, 5, 1, 9))
    _, cache = _prefill(model, params, *used, LENGTH)
    insert = jax.jit(caches.insert)
    # Row 2 at 4, and rows 0 and 1 at 1: in two calls, of one program each.
    for rows, at in ((slice(2, 3), 4), (slice(0, 2), 1)):
        prompts = _prompts(TOKENS_BT[rows], PROMPTS[rows])
        _, few = _prefill(model, params, *prompts, LENGTH)
        cache = insert(cache, few, jnp.int32(at))
    places = np.array([1, 2, 4])
    np.testing.assert_array_equal(cache.lengths_B, [6, 5, 1, 1, 4])
    for step in range(5):
        tokens_B = np.full(5, 3, np.int32)
        tokens_B[places] = TOKENS_BT[np.arange(3), np.array(PROMPTS) + step]
        logits_BV, cache = _decode(model, params, tokens_B, cache)
        np.testing.assert_allclose(
            logits_BV[places], expected[step + 1], rtol=0, atol=ATOL
        )


def test_rows_do_not_depend_on_each_other(model_config, random_params):
    model = zoo.build(model_config(**MIXED))
    params = random_params(model.abstract)
    others_BT = TOKENS_BT.copy()
    others_BT[[0, 2]] = 36 - others_BT[[0, 2]]
    first = _decoded(model, params, LENGTH)
    second = _decoded(model, params, LENGTH, others_BT, lengths=(2, 1, 5))
    np.testing.assert_array_equal(first[:, 1], second[:, 1])
    assert not np.any(first[:, 0] == second[:, 0])


def test_an_empty_cache_takes_rows_from_their_first_token(model_config, random_params):
    config = model_config(**MIXED)
    model = zoo.build(config)
    params, cache = random_params(model.abstract), model.empty_cache(3, LENGTH)
    found = []
    for step in range(LENGTH):
        logits_BV, cache = _decode(model, params, TOKENS_BT[:, step], cache)
        found.append(logits_BV)
    expected = _whole(config, params, lengths=(1, 1, 1), steps=LENGTH - 1)
    np.testing.assert_allclose(np.stack(found), expected, rtol=0, atol=ATOL)


# ---- over a mesh


def _layout(**sizes):
    return sharding.layout(meshes.make(meshes.sizes("ddp", {"data": 1} | sizes, 8)))


MESHES = {
    "data": {"data": 8},
    "mix": {"data": 2, "fsdp": 2, "tensor": 2},
    "tensor": {"data": 4, "tensor": 2},
}


@pytest.fixture(scope="module")
def on_mesh(model_config, random_params):
    """Return `on_mesh(mesh)`: a layout, a model and its params as they lie there."""

    def placed(mesh):
        config = model_config(
            vocab_size=40, embed_dim=16, attention_sinks=True, **MIXED
        )
        model, layout = zoo.build(config), _layout(**MESHES[mesh])
        places = sharding.tree_shardings(model.axes, model.abstract, layout)
        params = random_params(model.abstract)
        return layout, model, params, jax.device_put(params, places)

    return placed


@pytest.mark.parametrize("mesh", ["data", "mix"])
def test_decoding_does_not_depend_on_the_mesh(mesh, on_mesh):
    layout, model, params, placed = on_mesh(mesh)
    tokens_BT = np.random.default_rng(3).integers(0, 40, (8, LENGTH), np.int32)
    lengths = (5, 1, 4, 2, 2, 3, 1, 5)
    expected = _whole(model.config, params, tokens_BT, lengths)
    with layout.active():
        found = _decoded(model, placed, LENGTH, tokens_BT, lengths)
    np.testing.assert_allclose(found, expected, rtol=0, atol=ATOL)


def test_a_mesh_that_does_not_divide_the_rows_decodes_them_all_the_same(on_mesh):
    layout, model, params, placed = on_mesh("mix")
    expected = _whole(model.config, params)
    with layout.active():
        found = _decoded(model, placed, LENGTH)
    np.testing.assert_allclose(found, expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize("do", ["prefill", "decode"])
@pytest.mark.parametrize("mesh", ["data", "tensor"])
def test_devices_talk_of_no_row_but_their_own_and_of_no_key(mesh, do, on_mesh):
    layout, model, _, placed = on_mesh(mesh)
    width = 5 if do == "prefill" else 1
    with layout.active():
        tokens_BT = np.zeros((8, width), np.int32)
        tokens_BT = jax.device_put(tokens_BT, layout.sharding("data"))
        lengths_B = jax.device_put(np.ones(8, np.int32), layout.sharding("data"))
        if do == "prefill":
            lowered = _prefill.lower(model, placed, tokens_BT, lengths_B, 64)
        else:
            cache = jax.jit(lambda: model.empty_cache(8, 64))()
            lowered = _decode.lower(model, placed, tokens_BT[:, 0], cache)
        text = lowered.compile().as_text()
    said = [t for t in estimates.traffic(program.read(text), layout.mesh) if t.axes]
    if mesh == "data":
        assert not said
        return
    assert {(t.kind, t.axes) for t in said} == {("all-reduce", ("tensor",))}
    # What tokens are looked up as, and each of three layers' attention and MLP.
    assert sum(t.count for t in said) == 7
    rows_BTD = 8 // 4 * width * 16 * 4  # bytes of a device's rows
    assert sum(t.bytes for t in said) == 7 * rows_BTD


# ---- what else a model says


def test_layers_are_unstacked_in_their_order(model_config, random_params):
    model = zoo.build(model_config())
    params = random_params(model.abstract)
    unstacked = model.unstack(params)
    assert params.keys() == unstacked.keys()
    assert len(unstacked["blocks"]) == 3
    for number, layer in enumerate(unstacked["blocks"]):
        jax.tree.map(
            lambda one, stack, n=number: np.testing.assert_array_equal(one, stack[n]),
            layer,
            params["blocks"],
        )


@pytest.mark.parametrize("biases", [(), ("head",)])
def test_logits_are_the_head_and_its_bias(biases, model_config, random_params):
    model = zoo.build(model_config(biases=biases))
    params = random_params(model.abstract)
    x_BTD = np.random.default_rng(1).standard_normal((2, 5, 12)).astype(np.float32)
    expected = x_BTD @ np.asarray(model.head(params)).T
    bias_V = model.head_bias(params)
    assert (bias_V is None) == (not biases)
    if biases:
        assert bias_V.shape == (37,)
        expected = expected + bias_V
    for form in (params, model.unstack(params)):
        found = model.logits(form, x_BTD)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_axes_and_shapes_are_those_of_the_params(architecture):
    model = zoo.build(architecture)
    params = jax.eval_shape(model.init, jax.random.key(0))
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params)
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), model.abstract)
    is_axes = lambda leaf: isinstance(leaf, tuple)  # noqa: E731
    jax.tree.map(
        lambda axes, leaf: np.testing.assert_equal(len(axes), leaf.ndim),
        model.axes,
        params,
        is_leaf=is_axes,
    )


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_stacks_of_layers_one_after_the_other_are_one_stack(
    name, model_config, random_params
):
    fields = ARCHITECTURES[name] | {"num_layers": 4}
    model = zoo.build(model_config(**fields))
    params = random_params(model.abstract)
    blocks = params["blocks"]
    cuts = ((0, 1), (1, 3), (3, 4))
    stacks = [jax.tree.map(lambda x, of=of: x[slice(*of)], blocks) for of in cuts]
    tokens_BT = jnp.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    positions_BT = jnp.broadcast_to(jnp.arange(5), (2, 5))

    @jax.jit
    def hidden(params):
        return model.hidden(params, tokens_BT, positions_BT, jnp.ones((2, 5), int))

    found = hidden(params | {"blocks": tuple(stacks)})
    jax.tree.map(np.testing.assert_array_equal, found, hidden(params))
