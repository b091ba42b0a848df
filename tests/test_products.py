"""Tests of the one matrix product and its backward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.products import matmul

SHAPES = [((5, 7), (7, 3)), ((2, 4, 5, 7), (2, 4, 7, 3))]


def _operands(shapes, dtypes=("float32", "float32")):
    """Return two operands and a probe of their product."""
    rng = np.random.default_rng(0)
    a, b = (
        jnp.asarray(rng.standard_normal(shape), dtype)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    )
    probe = rng.standard_normal((*shapes[0][:-1], shapes[1][-1]))
    return a, b, probe.astype(np.float32)


def _probed(probe, dtype):
    def total(a, b):
        return jnp.sum(matmul(a, b, jnp.dtype(dtype)) * probe)

    return total


@pytest.mark.parametrize("shapes", SHAPES)
def test_float32_products_equal_jax_numpy(shapes):
    a, b, probe = _operands(shapes)
    found = matmul(a, b, jnp.dtype("float32"))
    np.testing.assert_allclose(found, jnp.matmul(a, b), rtol=0, atol=1e-6)

    def plain(a, b):
        return jnp.sum(jnp.matmul(a, b) * probe)

    slopes = jax.grad(_probed(probe, "float32"), argnums=(0, 1))(a, b)
    expected = jax.grad(plain, argnums=(0, 1))(a, b)
    for slope, other in zip(slopes, expected, strict=True):
        np.testing.assert_allclose(slope, other, rtol=0, atol=1e-6)


def _rounded(x):
    return np.asarray(jnp.asarray(x).astype(jnp.bfloat16), np.float64)


@pytest.mark.parametrize("shapes", SHAPES)
def test_bfloat16_products_round_operands_and_keep_float32_sums(shapes):
    a, b, probe = _operands(shapes)
    found = matmul(a, b, jnp.dtype("bfloat16"))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, _rounded(a) @ _rounded(b), rtol=0, atol=1e-5)

    d_a, d_b = jax.grad(_probed(probe, "bfloat16"), argnums=(0, 1))(a, b)
    d_out = _rounded(probe)
    expected_a = d_out @ np.swapaxes(_rounded(b), -1, -2)
    expected_b = np.swapaxes(_rounded(a), -1, -2) @ d_out
    np.testing.assert_allclose(d_a, expected_a, rtol=0, atol=1e-5)
    np.testing.assert_allclose(d_b, expected_b, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "dtypes", [("float32", "bfloat16"), ("bfloat16", "float32"), ("float32", "float32")]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_have_the_dtypes_of_their_operands(dtypes, dtype):
    a, b, probe = _operands(SHAPES[0], dtypes)
    slopes = jax.eval_shape(jax.grad(_probed(probe, dtype), argnums=(0, 1)), a, b)
    assert tuple(slope.dtype.name for slope in slopes) == dtypes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shapes", SHAPES)
def test_all_three_products_take_the_dtype_and_give_float32(shapes, dtype, equations):
    a, b, probe = _operands(shapes)
    traced = jax.make_jaxpr(jax.grad(_probed(probe, dtype), argnums=(0, 1)))(a, b)
    products = [e for e in equations(traced) if e.primitive.name == "dot_general"]
    assert len(products) == 3
    for product in products:
        assert [v.aval.dtype.name for v in product.invars] == [dtype, dtype]
        assert [v.aval.dtype.name for v in product.outvars] == ["float32"]


def test_remat_policies_can_keep_the_product(equations):
    a, b, probe = _operands(SHAPES[0])

    def bent(a, b):
        return jnp.sum(jnp.sin(matmul(a, b, jnp.dtype("float32"))) * probe)

    def products(policy):
        remade = jax.checkpoint(bent, policy=policy)
        traced = jax.make_jaxpr(jax.grad(remade, argnums=(0, 1)))(a, b)
        return sum(e.primitive.name == "dot_general" for e in equations(traced))

    assert products(None) == 4
    assert products(jax.checkpoint_policies.dots_saveable) == 3
