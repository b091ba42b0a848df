"""Tests of the decoder as a whole, against the reference in NumPy."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fm_jax import meshes, sharding
from fm_jax.models import decoder, zoo
from fm_jax.models.attend import BLOCK, Labels
from fm_jax.models.config import (
    BIASES,
    CHOICES,
    REMAT_NAMES,
    ROPE_SCALING,
    ModelConfig,
)
from fm_jax.models.decoder import Decoder
from tests.conftest import ARCHITECTURES
from tests.models import reference

ATOL = 2e-5  # of float32 logits that are O(1), against float64


def _packed_rows(vocab_size, *documents):
    """Return tokens, positions and segment ids of rows of the given lengths.

    Each row is a tuple of document lengths; a negative length is padding.
    """
    rng = np.random.default_rng(11)
    positions, segments = [], []
    for row in documents:
        positions.append(np.concatenate([np.arange(abs(n)) * (n > 0) for n in row]))
        ids = [np.full(abs(n), i * (n > 0)) for i, n in enumerate(row, start=1)]
        segments.append(np.concatenate(ids))
    positions_BT = np.array(positions, np.int32)
    tokens_BT = rng.integers(0, vocab_size, positions_BT.shape, np.int32)
    return tokens_BT, positions_BT, np.array(segments, np.int32)


def _logits(model, params, *rows):
    """Return the model's logits of whole rows, compiled."""

    def forward(params, *rows):
        return model.logits(params, model.hidden(params, *rows)[0])

    return jax.jit(forward)(params, *rows)


def test_logits_equal_the_reference(architecture, random_params):
    model = zoo.build(architecture)
    params = random_params(model.abstract)
    rows = _packed_rows(architecture.vocab_size, (11,), (4, 5, -2))
    expected_BTV = reference.logits(architecture, params, *rows)
    logits_BTV = _logits(model, params, *rows)
    real_BT = rows[2] > 0
    assert logits_BTV.dtype == jnp.float32
    assert 0.5 < np.std(expected_BTV[real_BT]) < 5
    np.testing.assert_allclose(
        logits_BTV[real_BT], expected_BTV[real_BT], rtol=0, atol=ATOL
    )
    assert np.isfinite(logits_BTV).all()


# Sizes, what a layer starts from, and how a program is to be compiled.
OF_NO_ARCHITECTURE = {
    *("vocab_size", "max_length", "num_layers", "embed_dim", "mlp_dim"),
    *("norm_epsilon", "rope_theta", "embed_init_std", "init_scale"),
    *("dtype", "residual_dtype", "remat", "remat_names", "expert_capacity"),
}


def test_the_architectures_hold_every_choice(architectures):
    for field in CHOICES.keys() - OF_NO_ARCHITECTURE:
        values = {getattr(config, field) for config in architectures}
        assert values == set(CHOICES[field]), field
    names = {field.name for field in dataclasses.fields(ModelConfig)}
    for field in names - CHOICES.keys() - OF_NO_ARCHITECTURE:
        values = {getattr(config, field) for config in architectures}
        assert len(values) > 1, field
        assert {bool(value) for value in values} >= {True}, field
    kinds = {c.rope_scaling[0][0] for c in architectures if c.rope_scaling}
    assert kinds == set(ROPE_SCALING)
    for name in BIASES:
        assert {config.has_bias(name) for config in architectures} == {False, True}


def test_layers_start_different_and_branches_start_small(model_config):
    config = model_config(embed_dim=96, num_layers=8, init_scale=1.5)
    params = jax.jit(zoo.build(config).init)(jax.random.key(3))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    np.testing.assert_allclose(np.std(params["embedding"]), 0.5, rtol=0.1)
    query_LDNH = params["blocks"]["attention"]["query"]["kernel"]
    assert len({float(layer[0, 0, 0]) for layer in query_LDNH}) == 8
    np.testing.assert_allclose(np.std(query_LDNH), 1.5 / 96**0.5, rtol=0.1)
    out_LNHD = params["blocks"]["attention"]["out"]["kernel"]
    np.testing.assert_allclose(np.std(out_LNHD), 1.5 / 24**0.5 / 4, rtol=0.1)
    down_LFD = params["blocks"]["mlp"]["down"]["kernel"]
    np.testing.assert_allclose(np.std(down_LFD), 1.5 / 20**0.5 / 4, rtol=0.1)


@pytest.fixture(scope="module")
def influence(model_config, random_params):
    """Return `influence(window, *documents)`: does column s act on logits of row t?

    Every token of the row is another one, and the head is untied, so that a row of the
    embedding table acts on the logits through one position alone. An entry of the
    [T, T] result says whether any part of the gradient differs from zero.
    """
    tokens_BT = np.random.default_rng(2).permutation(37)[None, :11]
    probe_V = np.random.default_rng(3).standard_normal(37)

    @functools.cache
    def slopes(window):
        model = zoo.build(model_config(window=window, tied_embeddings=False))
        params = random_params(model.abstract)

        def probed_T(x_TD, positions_BT, segments_BT):
            table_VD = jnp.asarray(params["embedding"]).at[tokens_BT[0]].set(x_TD)
            x_BTD, _ = model.hidden(
                params | {"embedding": table_VD}, tokens_BT, positions_BT, segments_BT
            )
            return model.logits(params, x_BTD)[0] @ probe_V

        rows_TD = params["embedding"][tokens_BT[0]]
        return functools.partial(jax.jit(jax.jacrev(probed_T)), rows_TD)

    def acts_TS(window, *documents):
        _, positions_BT, segments_BT = _packed_rows(37, documents)
        slopes_TSD = slopes(window)(positions_BT, segments_BT)
        return np.any(np.asarray(slopes_TSD) != 0, axis=-1)

    return acts_TS


def test_future_tokens_do_not_change_logits(influence):
    np.testing.assert_array_equal(influence(0, 11), np.tri(11, dtype=bool))


def test_documents_in_one_row_do_not_see_each_other(influence):
    expected_TS = np.zeros((9, 11), bool)
    expected_TS[:4, :4] = np.tri(4)
    expected_TS[4:, 4:9] = np.tri(5)
    np.testing.assert_array_equal(influence(0, 4, 5, -2)[:9], expected_TS)


def test_windows_reach_back_layer_by_layer(influence):
    back_TS = np.arange(11)[:, None] - np.arange(11)
    reach = 3 * (3 - 1)  # layers, each to its window's first key
    np.testing.assert_array_equal(influence(3, 11), (back_TS >= 0) & (back_TS <= reach))


@pytest.mark.parametrize(
    "overrides",
    [
        {"window": 3, "window_pattern": "LG", "qk_norm": True},
        {"positions": "learned", "norm": "layernorm", "use_bias": True},
    ],
)
def test_packed_documents_equal_the_same_alone(overrides, model_config, random_params):
    config = model_config(**overrides)
    model = zoo.build(config)
    tokens_BT, positions_BT, segments_BT = _packed_rows(
        config.vocab_size, (4, 7), (4, -7), (7, -4)
    )
    tokens_BT[1, :4], tokens_BT[2, :7] = tokens_BT[0, :4], tokens_BT[0, 4:]
    packed_TV, first_TV, second_TV = _logits(
        model, random_params(model.abstract), tokens_BT, positions_BT, segments_BT
    )
    np.testing.assert_allclose(packed_TV[:4], first_TV[:4], rtol=0, atol=1e-5)
    np.testing.assert_allclose(packed_TV[4:], second_TV[:7], rtol=0, atol=1e-5)


@pytest.mark.parametrize("capacity", [0.0, 0.75])
@pytest.mark.parametrize("shared_mlp_dim", [0, 7])
def test_padding_takes_no_expert_from_other_tokens(
    capacity, shared_mlp_dim, model_config, random_params
):
    config = model_config(
        num_experts=3,
        num_experts_per_token=2,
        expert_capacity=capacity,
        shared_mlp_dim=shared_mlp_dim,
    )
    model = zoo.build(config)
    params = random_params(model.abstract)
    tokens_BT, *labels = _packed_rows(config.vocab_size, (4, -2, 5), (3, 5, -3), (-11,))
    is_real_BT = labels[1] > 0
    others_BT = np.where(is_real_BT, tokens_BT, 36 - tokens_BT)
    forward = jax.jit(model.hidden)
    x_BTD, numbers = forward(params, tokens_BT, *labels)
    others_BTD, same_numbers = forward(params, others_BT, *labels)
    np.testing.assert_array_equal(x_BTD[is_real_BT], others_BTD[is_real_BT])
    assert np.isfinite(x_BTD).all() and np.isfinite(others_BTD).all()
    jax.tree.map(np.testing.assert_array_equal, numbers, same_numbers)
    np.testing.assert_array_equal(numbers["tokens"], np.full(3, is_real_BT.sum()))
    assert np.all(numbers["dropped"] > 0) == (capacity > 0)


PROBE_TV = np.random.default_rng(5).standard_normal((11, 37))
PROBED_ROWS = _packed_rows(37, (4, 7))


def _probed_gradient(config):
    """Return the function from parameters to the gradient of a probe of the logits."""
    model = zoo.build(config)

    def probed(params):
        x_BTD, _ = model.hidden(params, *PROBED_ROWS)
        return jnp.sum(model.logits(params, x_BTD)[0] * PROBE_TV)

    return jax.grad(probed)


@pytest.fixture(scope="module")
def gradients(model_config, random_params):
    """Return the config, parameters and gradients that remat must not change."""
    config = model_config(
        qk_norm=True,
        logits_softcap=3.0,
        attention_softcap=2.0,
        attention_sinks=True,
    )
    params = random_params(zoo.build(config).abstract)
    return config, params, jax.jit(_probed_gradient(config))(params)


@pytest.mark.parametrize(
    "architecture_name", ["bloom", "gemma3", "gptj", "gpt_oss", "olmo2"]
)
def test_gradients_equal_finite_differences_of_the_reference(
    architecture_name, model_config, random_params
):
    config = model_config(**ARCHITECTURES[architecture_name])
    params = random_params(zoo.build(config).abstract)
    found = jax.jit(_probed_gradient(config))(params)
    way = jax.tree.map(np.float64, random_params(params, seed=9))
    step = 1e-5

    def probed(name, size):
        moved = jax.tree.map(lambda x, d: x + size * d, params[name], way[name])
        moved_TV = reference.logits(config, params | {name: moved}, *PROBED_ROWS)[0]
        return np.sum(moved_TV * PROBE_TV)

    for name in params:  # each part of the model by itself
        expected = (probed(name, step) - probed(name, -step)) / (2 * step)
        terms = jax.tree.map(lambda g, d: np.ravel(g * d), found[name], way[name])
        terms = np.concatenate(jax.tree.leaves(terms))  # which may cancel
        error = abs(np.sum(terms) - expected)
        assert error < 1e-5 * np.linalg.norm(terms), name


@pytest.mark.parametrize(
    "remat, names",
    [
        ("full", ()),
        ("dots", ()),
        *[("names", (name,)) for name in REMAT_NAMES],
        ("names", REMAT_NAMES),
        ("names", ()),
        ("offload", ("mixed", "attention_out")),
        ("offload", REMAT_NAMES),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value)[:24],
)
def test_remat_does_not_change_gradients(remat, names, gradients):
    config, params, expected = gradients
    config = dataclasses.replace(config, remat=remat, remat_names=names)
    found = jax.jit(_probed_gradient(config))(params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        found,
        expected,
    )


@pytest.fixture(scope="module")
def products(model_config, equations):
    """Return `products(length, remat, *names)`: how many a gradient's program has."""

    def count(length, remat, *names):
        model = zoo.build(model_config(remat=remat, remat_names=names))
        rows = _packed_rows(37, (4, length - 4))

        def summed(params):
            return jnp.sum(model.logits(params, model.hidden(params, *rows)[0]))

        jaxpr = jax.make_jaxpr(jax.grad(summed))(model.abstract)
        return sum(e.primitive.name == "dot_general" for e in equations(jaxpr))

    return count


def test_remat_recomputes_what_its_policy_does_not_keep(products):
    kept_all = products(11, "none")
    # Nine products in a block, of which the last one's result is only added.
    assert products(11, "full") - kept_all == products(11, "names") - kept_all == 8
    # Scores and weighted sum have batch dims.
    assert products(11, "dots") - kept_all == 2
    # With all names nothing more: scores are made anew without remat, too.
    for remat in ("names", "offload"):
        assert products(11, remat, *REMAT_NAMES) == kept_all


CHUNKED = 2 * BLOCK  # a length at which attention goes chunk by chunk under remat


@pytest.mark.parametrize("length", [11, CHUNKED])
def test_each_name_spares_a_product_and_together_they_spare_all_of_theirs(
    length, products
):
    # The mix spares the weighted sum and the scores before it.
    expected = dict.fromkeys(REMAT_NAMES, 1) | {"mixed": 2}
    full = products(length, "full")
    spared = {name: full - products(length, "names", name) for name in REMAT_NAMES}
    assert spared == expected
    for remat in ("names", "offload"):
        spared_by_all = full - products(length, remat, *REMAT_NAMES)
        assert spared_by_all == sum(expected.values())


def test_what_is_offloaded_goes_to_the_host_and_comes_back(model_config, equations):
    config = model_config(remat="offload", remat_names=("query", "attention_out"))
    jaxpr = jax.make_jaxpr(_probed_gradient(config))(zoo.build(config).abstract)
    moves = [
        (place.name, variable.aval.shape)
        for equation in equations(jaxpr)
        if equation.primitive.name == "device_put"
        for place, variable in zip(
            equation.params["devices"], equation.invars, strict=True
        )
    ]
    query, added = (1, 11, 4, 6), (1, 11, 12)
    there, back = [("Host", query), ("Host", added)], [("Device", query)]
    assert moves == [*there, *back, ("Device", added)]


def test_scan_over_layers_equals_a_loop(model_config, random_params):
    config = model_config(window=3, window_pattern="LG", rope_local_theta=20.0)
    model = zoo.build(config)
    params = random_params(model.abstract)
    rows = _packed_rows(config.vocab_size, (11,), (11,))
    tokens_BT, labels = rows[0], Labels(*map(jnp.asarray, rows[1:]))
    graph = nnx.graphdef(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))

    @jax.jit
    def loop(params):
        model = nnx.merge(graph, params)
        block_graph, stacked = nnx.split(model.blocks)
        x_BTD = model.embedding[...][tokens_BT]
        angles, local = model.angles(labels.positions)
        for layer in range(config.num_layers):
            one = jax.tree.map(lambda leaf, i=layer: leaf[i], stacked)
            is_local = layer % 2 == 0
            x_BTD, _, _ = nnx.merge(block_graph, one)(
                x_BTD,
                labels=labels,
                angles=local if is_local else angles,
                window=jnp.int32(3) if is_local else None,
            )
        return model.logits(model.final_norm(x_BTD))

    scanned_BTV = _logits(model, params, *rows)
    np.testing.assert_allclose(scanned_BTV, loop(params), rtol=0, atol=1e-5)


@pytest.mark.parametrize("residual_dtype", ["float32", "bfloat16"])
def test_bfloat16_stays_near_float32(residual_dtype, model_config, random_params):
    config = model_config(dtype="bfloat16", residual_dtype=residual_dtype)
    model = zoo.build(config)
    params = random_params(model.abstract, seed=1)
    rows = _packed_rows(config.vocab_size, (11,), (4, 7))
    exact_BTV = reference.logits(config, params, *rows)

    def error(logits_BTV):
        return np.sqrt(np.mean((logits_BTV - exact_BTV) ** 2)) / np.std(exact_BTV)

    # The yardstick: exact arithmetic on weights that were rounded once.
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    one_rounding = error(reference.logits(config, rounded, *rows))
    assert one_rounding < 0.01
    logits_BTV = _logits(model, params, *rows)
    assert one_rounding / 2 < error(logits_BTV) < 2 * one_rounding

    x_BTD, _ = jax.eval_shape(model.hidden, params, *rows)
    assert x_BTD.dtype == jnp.dtype(residual_dtype)
    assert logits_BTV.dtype == jnp.float32


def test_logits_do_not_depend_on_the_mesh(model_config, random_params):
    config = model_config(vocab_size=38, qk_norm=True)
    model = zoo.build(config)
    params = random_params(model.abstract)
    rows = _packed_rows(config.vocab_size, (11,), (4, 7), (9, -2), (3, 3, 5))
    expected_BTV = reference.logits(config, params, *rows)
    axis_sizes = meshes.sizes("hsdp", {"data": 2, "fsdp": 2, "tensor": 2}, 8)
    layout = sharding.layout(meshes.make(axis_sizes))
    places = sharding.tree_shardings(model.axes, model.abstract, layout)
    names = ("tokens", "positions", "segment_ids")
    with layout.active():
        batch = sharding.put_batch(dict(zip(names, rows, strict=True)), 4, layout)
        logits_BTV = _logits(model, jax.device_put(params, places), *batch.values())
    real_BT = rows[2] > 0
    np.testing.assert_allclose(
        np.asarray(logits_BTV)[real_BT], expected_BTV[real_BT], rtol=0, atol=ATOL
    )


def test_several_layers_make_a_turn_where_they_are_narrow(
    monkeypatch, model_config, random_params, equations
):
    def turns(**fields):
        model = zoo.build(model_config(**fields))
        rows = _packed_rows(37, (11,))
        jaxpr = jax.make_jaxpr(lambda params: model.hidden(params, *rows))(
            model.abstract
        )
        scans = [e.params for e in equations(jaxpr) if e.primitive.name == "scan"]
        return [p["unroll"] for p in scans if p["length"] == 3]

    assert turns() == [1]  # so short a row has little to copy
    config = model_config()
    params = random_params(zoo.build(config).abstract)
    one_by_one = _probed_gradient(config)(params)
    monkeypatch.setattr(decoder, "UNROLLED_FROM", 0)
    monkeypatch.setattr(decoder, "UNROLLED", 2)
    assert turns() == [2]
    assert turns(remat="full") == [1]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        _probed_gradient(config)(params),
        one_by_one,
    )
    monkeypatch.setattr(decoder, "WIDE", 12)
    assert turns() == [1]


def test_a_layer_keeps_its_products_for_the_backward_pass_and_nothing_made_of_them(
    model_config,
):
    model = zoo.build(model_config())
    rows = _packed_rows(37, (2, 9))

    def pull(params):
        return jax.vjp(lambda params: model.hidden(params, *rows)[0], params)[1]

    kept = collections.Counter(
        leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(pull, model.abstract))
    )
    assert kept[3, 1, 11, 20] == 2  # gate and up, not what the activation makes of them
    assert kept[3, 1, 11, 12] == 2  # the stream before both norms, not after
