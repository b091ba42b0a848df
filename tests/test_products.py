"""Tests of the one matrix product and its backward pass."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax import meshes, products, sharding
from fm_jax.products import Adapted, Eight, matmul

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


LARGE = [
    ((130, 136), (136, 144)),
    ((130, 144), (144, 24)),
    ((2, 3, 130, 136), (2, 3, 136, 24)),
]


@pytest.mark.parametrize("shapes", LARGE)
def test_large_products_of_bfloat16_go_by_rows_and_equal_those_of_rounded_operands(
    shapes,
):
    a, b, probe = _operands(shapes)
    slopes = jax.jit(jax.grad(_probed(probe, "bfloat16"), argnums=(0, 1)))
    with _layout(1).active():
        compiled = slopes.lower(a, b).compile()
    d_out = _rounded(probe)
    expected = (
        d_out @ np.swapaxes(_rounded(b), -1, -2),
        np.swapaxes(_rounded(a), -1, -2) @ d_out,
    )
    for slope, other in zip(compiled(a, b), expected, strict=True):
        np.testing.assert_allclose(slope, other, atol=1e-6 * np.abs(other).max())
    text = compiled.as_text()
    summed = re.findall(
        r" dot\(.*lhs_contracting_dims=\{(\d)\}.*rhs_contracting_dims=\{(\d)\}", text
    )
    last = len(shapes[0]) - 1
    assert summed == [(str(last), str(last - 1))] * 2


def test_large_products_of_bfloat16_fetch_nothing_where_rows_are_cut():
    a, b, probe = _operands(((512, 136), (136, 144)))
    layout = _layout(4)
    rows, whole = layout.sharding("data", None), layout.sharding()
    with layout.active():
        slopes = jax.jit(jax.grad(_probed(probe, "bfloat16"), argnums=(0, 1)))
        given = jax.device_put(a, rows), jax.device_put(b, whole)
        text = slopes.lower(*given).compile().as_text()
    assert "all-gather" not in text
    assert "all-reduce" in text


def _layout(num_devices):
    """Return a layout that cuts the batch over some simulated devices."""
    sizes = meshes.sizes("ddp", {}, num_devices)
    return sharding.layout(meshes.make(sizes, devices=jax.devices()[:num_devices]))


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


def _adapted(base, rate=0.0, rng=None):
    """Return a kernel [3, 4, 6] over the first two dims, with an update of rank 2."""
    draw = np.random.default_rng(1).standard_normal
    a, b = jnp.asarray(draw((3, 4, 2))), jnp.asarray(draw((2, 6)))
    return Adapted(base, a, b, rng, scale=0.7, dropout=rate)


def _held():
    """Return a kernel as an array, in eight bits and what it is then."""
    rng = np.random.default_rng(2)
    whole = rng.integers(-127, 128, (3, 4, 6)).astype(np.int8)
    scale = rng.uniform(0.01, 0.02, (1, 1, 6)).astype(np.float32)
    return Eight(jnp.asarray(whole), jnp.asarray(scale)), jnp.asarray(whole * scale)


@pytest.mark.parametrize("is_eight", [False, True])
def test_a_kernel_with_an_update_is_their_sum_and_only_the_update_has_gradients(
    is_eight,
):
    eight, array = _held()
    kernel = _adapted(eight if is_eight else array)
    x_MK = jnp.asarray(np.random.default_rng(3).standard_normal((5, 12)), jnp.float32)
    probe_MN = np.random.default_rng(4).standard_normal((5, 6))
    float32 = jnp.dtype("float32")

    def beside(x_MK, a, b):
        held = Adapted(kernel.base, a, b, None, scale=0.7, dropout=0.0)
        return jnp.sum(products.linear(x_MK, held, float32) * probe_MN)

    def merged(x_MK, a, b):
        whole = array + 0.7 * jnp.einsum("ijr,rn->ijn", a, b)
        return jnp.sum(x_MK @ whole.reshape(12, 6) * probe_MN)

    given = (x_MK, kernel.a, kernel.b)
    found, expected = (
        jax.value_and_grad(f, argnums=(0, 1, 2))(*given) for f in (beside, merged)
    )
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5),
        found,
        expected,
    )
    of_base = jax.grad(
        lambda held: jnp.sum(products.linear(x_MK, held, float32)), allow_int=True
    )(eight if is_eight else kernel)
    still = of_base.scale if is_eight else of_base.base
    assert not np.any(still)


def test_an_update_leaves_out_a_part_of_what_it_reads_and_scales_up_the_rest():
    rate, rng = 0.25, jax.random.key(0)
    kernel = _adapted(jnp.zeros((3, 4, 6)), rate, rng)
    x_MK = jnp.ones((400, 12))
    eye = Adapted(
        jnp.zeros((3, 4, 12)),
        jnp.eye(12).reshape(3, 4, 12),
        jnp.eye(12),
        rng,
        scale=1.0,
        dropout=rate,
    )
    read_MK = np.asarray(products.linear(x_MK, eye, jnp.dtype("float32")))
    assert set(np.unique(read_MK)) == {0, np.float32(1 / 0.75)}
    assert np.mean(read_MK == 0) == pytest.approx(rate, abs=0.02)
    found_MN = products.linear(x_MK, kernel, jnp.dtype("float32"))
    a_KR = np.asarray(kernel.a).reshape(12, 2)
    expected_MN = 0.7 * read_MK @ a_KR @ np.asarray(kernel.b)
    np.testing.assert_allclose(found_MN, expected_MN, rtol=1e-4, atol=1e-5)


def test_a_weight_in_eight_bits_is_made_whole_and_an_array_is_left():
    eight, array = _held()
    np.testing.assert_array_equal(products.whole(eight), array)
    assert products.whole(array) is array
