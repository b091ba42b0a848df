"""Tests of the counts against the real tree, the real program and published numbers."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from fm_jax import trees
from fm_jax.models import counts, zoo


def _sizes(config):
    """Return the number of values of each parameter of the real model, by path."""
    leaves = trees.leaves_by_path(zoo.build(config).abstract)
    return {name: int(np.prod(leaf.shape)) for name, leaf in leaves.items()}


def _check_against_tree(config):
    sizes = _sizes(config)
    tables = ("embedding", "position_embedding", "head")
    found = counts.params(config)
    assert found.total == sum(sizes.values())
    assert found.embedding == sum(sizes.get(name, 0) for name in tables[:2])
    assert found.head == sizes.get("head", 0)
    assert found.non_embedding == sum(
        size for name, size in sizes.items() if name not in tables
    )
    kernels = sum(size for name, size in sizes.items() if name.endswith("kernel"))
    assert found.matmul == kernels + config.vocab_size * config.embed_dim


def test_params_equal_the_real_tree(architecture):
    _check_against_tree(architecture)


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_params_equal_the_real_tree_in_every_combination(norm, model_config):
    for use_bias, qk_norm, gated, (parallel, place) in itertools.product(
        (False, True),
        (False, True),
        (False, True),
        ((False, "pre"), (False, "sandwich"), (True, "pre")),
    ):
        _check_against_tree(
            model_config(
                norm=norm,
                use_bias=use_bias,
                qk_norm=qk_norm,
                activation="geglu" if gated else "relu2",
                parallel_block=parallel,
                norm_position=place,
            )
        )


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


def test_flops_equal_a_count_of_the_products(architecture):
    length, flops = 11, 0
    dim, heads = architecture.embed_dim, architecture.num_heads
    head_dim = architecture.head_dim
    for layer in range(architecture.num_layers):
        for t in range(length):
            # Each product as (rows, inner, columns).
            products = [(1, dim, heads * head_dim)]
            products += [(1, dim, architecture.num_kv_heads * head_dim)] * 2
            products += [(1, heads * head_dim, dim)]
            ways_in = 2 if architecture.activation in ("swiglu", "geglu") else 1
            products += [(1, dim, architecture.mlp_dim)] * ways_in
            products += [(1, architecture.mlp_dim, dim)]
            window = architecture.windows()[layer]
            keys = sum(not window or t - s < window for s in range(t + 1))
            products += [(1, head_dim, keys), (1, keys, head_dim)] * heads
            flops += sum(2 * np.prod(product) for product in products)
    flops += length * 2 * dim * architecture.vocab_size
    expected = 3 * flops / length  # backward makes two products of each
    assert counts.flops_per_token(architecture, length) == pytest.approx(expected)


def test_flops_equal_the_products_of_the_traced_training_step(architecture):
    """Attention is traced over all keys, seen or not; the rest is as counted."""
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
    extra = 3 * 4 * heads * unseen * architecture.num_layers
    expected = counts.flops_per_token(everyone, length) + extra
    assert flops(jaxpr) / length == pytest.approx(expected)
