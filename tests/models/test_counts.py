"""Tests of the counts against the real tree, the real program and published numbers."""

import dataclasses
import fractions
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax import trees
from fm_jax.models import counts, grouped, zoo
from fm_jax.models.config import BIASES

SPARSE = {"num_experts": 5, "num_experts_per_token": 2, "shared_mlp_dim": 9}


def _sizes(config):
    """Return the number of values of each parameter of the real model, by path."""
    leaves = trees.leaves_by_path(zoo.build(config).abstract)
    return {name: int(np.prod(leaf.shape)) for name, leaf in leaves.items()}


def _check_against_tree(config):
    sizes = _sizes(config)
    balance = sizes.pop("blocks/mlp/balance", 0)
    tables = ("embedding", "position_embedding", "head")
    found = counts.params(config)
    assert found.total == sum(sizes.values())
    assert found.balance == balance
    assert found.embedding == sum(sizes.get(name, 0) for name in tables[:2])
    assert found.head == sizes.get("head", 0)
    assert found.non_embedding == sum(
        size for name, size in sizes.items() if name not in tables
    )
    used = {name: size * _share(config, name) for name, size in sizes.items()}
    assert found.active == sum(used.values())
    kernels = sum(size for name, size in used.items() if name.endswith("kernel"))
    assert found.matmul == kernels + config.vocab_size * config.embed_dim


def _share(config, name):
    """Return how much of a parameter one token uses."""
    if not name.startswith("blocks/mlp/experts/"):
        return 1
    return fractions.Fraction(config.num_experts_per_token, config.num_experts)


def test_params_equal_the_real_tree(architecture):
    _check_against_tree(architecture)


@pytest.mark.parametrize("norm", ["rmsnorm", "rmsnorm_1p", "layernorm"])
def test_params_equal_the_real_tree_in_every_combination(norm, model_config):
    for use_bias, qk_norm, gated, (parallel, norms, place) in itertools.product(
        (False, True),
        (False, True),
        (False, True),
        (
            (False, 1, "pre"),
            (False, 1, "post"),
            (False, 1, "sandwich"),
            (True, 1, "pre"),
            (True, 2, "pre"),
        ),
    ):
        _check_against_tree(
            model_config(
                norm=norm,
                use_bias=use_bias,
                qk_norm=qk_norm,
                qk_norm_over="heads" if parallel else "head",
                activation="geglu" if gated else "relu2",
                parallel_block=parallel,
                parallel_norms=norms,
                norm_position=place,
            )
        )


@pytest.mark.parametrize("experts", [{}, SPARSE])
@pytest.mark.parametrize("name", BIASES)
def test_params_equal_the_real_tree_with_one_kind_of_bias(name, experts, model_config):
    changed = {"biases": (name,), "norm": "layernorm", "qk_norm": True}
    _check_against_tree(model_config(**changed, **experts))


@pytest.mark.parametrize("shared_mlp_dim", [0, 9])
@pytest.mark.parametrize("activation", ["swiglu_clamped", "relu"])
@pytest.mark.parametrize("biases", [(), ("mlp", "router")])
def test_params_equal_the_real_tree_of_experts(
    biases, activation, shared_mlp_dim, model_config
):
    changed = {"biases": biases, "activation": activation}
    _check_against_tree(
        model_config(**changed, **SPARSE | {"shared_mlp_dim": shared_mlp_dim})
    )


@pytest.mark.parametrize(
    "changed",
    [
        {"attention_sinks": True},
        {"embed_norm": True, "norm": "layernorm", "use_bias": True},
        {"positions": "learned", "position_offset": 3},
        {"positions": "alibi", "position_offset": 3},
        {"tied_embeddings": True, "biases": ("head",)},
    ],
)
def test_params_equal_the_real_tree_of_what_stands_alone(changed, model_config):
    _check_against_tree(model_config(**changed))


@pytest.fixture
def gpt2(model_config):
    """Return the smallest GPT-2."""
    return model_config(
        vocab_size=50257,
        max_length=1024,
        num_layers=12,
        embed_dim=768,
        num_heads=12,
        num_kv_heads=12,
        head_dim=64,
        mlp_dim=3072,
        norm="layernorm",
        positions="learned",
        activation="gelu",
        tied_embeddings=True,
        use_bias=True,
    )


def test_gpt2_has_its_published_number_of_parameters(gpt2):
    assert counts.params(gpt2).total == 124_439_808
    assert sum(_sizes(gpt2).values()) == 124_439_808


def test_six_n_counts_every_parameter(gpt2):
    assert counts.flops_per_token_6n(gpt2) == 6 * 124_439_808


def test_six_n_of_experts_counts_those_that_a_token_takes(model_config):
    config = model_config(**SPARSE, biases=("mlp",))
    one = config.embed_dim * config.mlp_dim * 3 + 2 * config.mlp_dim + config.embed_dim
    unused = 3 * config.num_layers * one  # of 5 a token takes 2
    assert counts.flops_per_token_6n(config) == 6 * (
        counts.params(config).total - unused
    )


@pytest.mark.parametrize("length", [1, 2, 5, 11])
@pytest.mark.parametrize("window", [0, 1, 3, 5, 11, 99])
def test_mean_keys_equals_a_count_of_the_mask(length, window):
    seen = [
        (t, s)
        for t in range(length)
        for s in range(t + 1)
        if not window or t - s < window
    ]
    assert counts.mean_keys(length, window) == pytest.approx(len(seen) / length)


def _forward_flops(config, length):
    """Return the products of a row's forward pass, counted one by one."""
    flops = 0
    dim, heads, head_dim = config.embed_dim, config.num_heads, config.head_dim
    is_gated = config.activation in ("swiglu", "swiglu_clamped", "geglu")

    def mlp(width):
        return [(1, dim, width)] * (2 if is_gated else 1) + [(1, width, dim)]

    for layer in range(config.num_layers):
        for t in range(length):
            # Each product as (rows, inner, columns).
            products = [(1, dim, heads * head_dim)]
            products += [(1, dim, config.num_kv_heads * head_dim)] * 2
            products += [(1, heads * head_dim, dim)]
            if config.num_experts:
                products += [(1, dim, config.num_experts)]
                products += mlp(config.mlp_dim) * config.num_experts_per_token
                products += mlp(config.shared_mlp_dim)
            else:
                products += mlp(config.mlp_dim)
            window = config.windows()[layer]
            keys = sum(not window or t - s < window for s in range(t + 1))
            products += [(1, head_dim, keys), (1, keys, head_dim)] * heads
            flops += sum(2 * np.prod(product) for product in products)
    return flops + length * 2 * dim * config.vocab_size


def test_flops_equal_a_count_of_the_products(architecture):
    length = 11
    # Backward makes two products of each.
    expected = 3 * _forward_flops(architecture, length) / length
    assert counts.flops_per_token(architecture, length) == pytest.approx(expected)


@pytest.mark.parametrize("shared_mlp_dim", [0, 9])
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_flops_of_experts_are_those_of_the_experts_taken(
    activation, shared_mlp_dim, model_config
):
    changed = SPARSE | {"activation": activation, "shared_mlp_dim": shared_mlp_dim}
    config, length = model_config(**changed, window=3), 7
    expected = 3 * _forward_flops(config, length) / length
    assert counts.flops_per_token(config, length) == pytest.approx(expected)


def _row_by_row(a_MK, b_GKN, sizes_G, dtype, cut=None):
    """Return the grouped product as one product a row, which a trace can count."""
    rows = np.arange(len(a_MK))
    group_M = jnp.searchsorted(jnp.cumsum(sizes_G), rows, side="right")
    return jnp.einsum("mk,mkn->mn", a_MK, b_GKN[group_M])


def test_flops_equal_the_products_of_the_traced_training_step(
    architecture, monkeypatch
):
    """Attention is traced over all keys, seen or not; the rest is as counted.

    The backward pass makes scores anew, which no model FLOPs count. ALiBi's queries and
    keys have two dims more, which are not counted. Experts work in blocks whose number
    depends on the tokens: here row by row.
    """
    monkeypatch.setattr(grouped, "product", _row_by_row)
    model, length = zoo.build(architecture), 5
    row = np.ones((1, length), np.int32)

    def total(params, row):
        return model.logits(params, model.hidden(params, row, row, row)[0]).sum()

    def flops(jaxpr, repeats=1):
        found = 0
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                (inner, _), _ = equation.params["dimension_numbers"]
                shape = equation.invars[0].aval.shape
                out = equation.outvars[0].aval.shape
                inner = np.prod([shape[axis] for axis in inner])
                found += repeats * 2 * inner * np.prod(out)
            scanned = equation.params.get("length", 1)
            for value in equation.params.values():
                if hasattr(value, "eqns"):
                    found += flops(value, repeats * scanned)
        return found

    jaxpr = jax.make_jaxpr(jax.grad(total))(model.abstract, row)
    everyone = dataclasses.replace(architecture, window=0)
    heads = architecture.num_heads * architecture.head_dim
    unseen = length - counts.mean_keys(length, 0)
    extra = (3 * 4 * heads * unseen + 2 * heads * length) * architecture.num_layers
    if architecture.positions == "alibi":
        extra += 4 * 4 * architecture.num_heads * length * architecture.num_layers
    expected = counts.flops_per_token(everyone, length) + extra
    assert flops(jaxpr) / length == pytest.approx(expected)
