"""Tests of looking up rows of a table, on one device and on meshes of eight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax import meshes, sharding
from fm_jax.compiled import estimates, program
from fm_jax.models import layers

B, T, D, V = 16, 12, 24, 40
FLOAT32 = jnp.dtype("float32")
MESHES = {
    "ddp": {"preset": "ddp"},
    "fsdp": {"preset": "fsdp"},
    "hsdp": {"preset": "hsdp"},
    "tensor": {"preset": "tensor"},
    "fsdp_tensor": {"preset": "fsdp_tensor"},
    "context": {"preset": "context"},
    "mix": {"preset": "ddp", "data": 2, "context": 2, "tensor": 2},
}
WITHOUT_TENSOR = ("ddp", "fsdp", "hsdp", "context")


def _layout(name):
    given = dict(MESHES[name])
    return sharding.layout(meshes.make(meshes.sizes(given.pop("preset"), given, 8)))


def _inputs(rows=B):
    """Return a table, indices that repeat and leave rows out, and a cotangent."""
    rng = np.random.default_rng(5)
    table_VD = rng.standard_normal((V, D)).astype(np.float32)
    indices_BT = rng.integers(0, V, (rows, T)) // 3 * 3
    indices_BT[0] = 6
    d_x_BTD = rng.standard_normal((rows, T, D)).astype(np.float32)
    return table_VD, indices_BT.astype(np.int32), d_x_BTD


def _by_hand(table_VD, indices_BT, d_x_BTD):
    """Return the rows, and the gradient token by token in float64."""
    d_table_VD = np.zeros(table_VD.shape)
    for b, t in np.ndindex(*indices_BT.shape):
        d_table_VD[indices_BT[b, t]] += d_x_BTD[b, t]
    return table_VD[indices_BT], d_table_VD


@functools.partial(jax.jit, static_argnames=("axis", "dtype"))
def _both(table_VD, indices_BT, d_x_BTD, axis="vocab", dtype=FLOAT32):
    """Return what `lookup` gives, and its gradient of `d_x_BTD`."""

    def look(table_VD):
        x_BTD = layers.lookup(table_VD, indices_BT, axis, dtype)
        return sharding.constrain(x_BTD, "batch", "length", None)

    x_BTD, pull = jax.vjp(look, table_VD)
    return x_BTD, pull(d_x_BTD.astype(x_BTD.dtype))[0]


def _on(layout, table_VD, indices_BT, d_x_BTD, axis):
    """Return the arguments where a model has them on a mesh: rows may be pieces."""

    def put(x, *axes):
        place = sharding.spec(axes, x.shape, layout)
        return jax.device_put(x, layout.sharding(*place))

    return (
        put(table_VD, axis, "embed"),
        put(indices_BT, "batch", "length"),
        put(d_x_BTD, "batch", "length", None),
    )


def test_rows_and_their_gradient_are_those_by_hand():
    inputs = _inputs()
    assert 0 < len(np.unique(inputs[1])) < V / 2
    x_BTD, d_table_VD = _both(*inputs)
    expected, d_expected = _by_hand(*inputs)
    np.testing.assert_array_equal(x_BTD, expected)
    np.testing.assert_allclose(d_table_VD, d_expected, rtol=0, atol=1e-5)
    assert not np.any(np.asarray(d_table_VD)[1::3])  # rows that nobody looked up


def test_the_gradient_is_that_of_plain_indexing():
    table_VD, indices_BT, d_x_BTD = _inputs()
    _, pull = jax.vjp(lambda table_VD: table_VD[indices_BT], table_VD)
    _, found = _both(table_VD, indices_BT, d_x_BTD)
    np.testing.assert_allclose(found, pull(d_x_BTD)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("axis", ["vocab", "positions"])
@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_changes_neither_rows_nor_gradient(name, axis):
    layout, inputs = _layout(name), _inputs()
    with layout.active():
        arguments = _on(layout, *inputs, axis)
        x_BTD, d_table_VD = _both(*arguments, axis=axis)
    expected, d_expected = _by_hand(*inputs)
    np.testing.assert_array_equal(x_BTD, expected)
    np.testing.assert_allclose(d_table_VD, d_expected, rtol=0, atol=1e-5)
    # The gradient comes back cut as the table is, so that nothing need move it.
    assert d_table_VD.sharding.is_equivalent_to(arguments[0].sharding, 2)


@pytest.mark.parametrize("name", ["fsdp", "mix"])
def test_rows_that_the_mesh_does_not_divide_are_looked_up_all_the_same(name):
    inputs = _inputs(rows=3)
    with _layout(name).active():
        x_BTD, d_table_VD = _both(*inputs)
    expected, d_expected = _by_hand(*inputs)
    np.testing.assert_array_equal(x_BTD, expected)
    np.testing.assert_allclose(d_table_VD, d_expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [None, "fsdp"])
def test_low_precision_gradients_add_up_in_the_dtype_of_the_table(name):
    # Steps of 1 get lost beyond 256 in bfloat16.
    table_VD, _, _ = _inputs()
    indices_BT = np.full((8, 200), 7, np.int32)
    d_x_BTD = np.ones((8, 200, D), np.float32)
    with _layout(name).active() if name else jax.default_device(jax.devices()[0]):
        x_BTD, d_table_VD = _both(
            table_VD, indices_BT, d_x_BTD, dtype=jnp.dtype("bfloat16")
        )
    assert (x_BTD.dtype, d_table_VD.dtype) == (jnp.bfloat16, jnp.float32)
    rounded_VD = table_VD.astype(jnp.bfloat16)
    np.testing.assert_array_equal(x_BTD, rounded_VD[indices_BT])
    np.testing.assert_array_equal(d_table_VD[7], 1600.0)


def _said(name):
    """Return the collectives of the rows and the gradient by kind and mesh axes."""
    layout = _layout(name)
    with layout.active():
        arguments = _on(layout, *_inputs(), "vocab")
        compiled = _both.lower(*arguments).compile()
    found = estimates.traffic(program.read(compiled.as_text()), layout.mesh)
    return [t for t in found if t.axes]


@pytest.mark.parametrize("name", WITHOUT_TENSOR)
def test_devices_exchange_the_table_and_its_gradient_and_no_activation(name):
    table_bytes = 4 * V * D
    # An activation would be larger, even a device's part of it.
    assert 4 * B * T * D / 8 < table_bytes < 4 * B * T * D / 2
    said = _said(name)
    fetched = [t for t in said if t.kind == "all-gather"]
    assert sum(t.bytes for t in fetched) == (0 if name == "ddp" else table_bytes)
    assert all(t.axes == ("fsdp",) for t in fetched)
    assert {t.kind for t in said} <= {"all-gather", "reduce-scatter", "all-reduce"}
    for kind in ("reduce-scatter", "all-reduce"):
        assert sum(t.bytes for t in said if t.kind == kind) <= table_bytes
    assert sum(t.count for t in said) <= 3


@pytest.mark.parametrize("name", ["tensor", "fsdp_tensor", "mix"])
def test_where_the_vocabulary_is_cut_rows_are_added_up_once_and_never_gathered(name):
    said = _said(name)
    tensor = [t for t in said if "tensor" in t.axes]
    size = _layout(name).size("tensor")
    assert [(t.kind, t.axes, t.count) for t in tensor] == [
        ("all-reduce", ("tensor",), 1)
    ]
    assert tensor[0].bytes == 4 * B * T * D * size // 8  # a device's own rows
    others = [t for t in said if "tensor" not in t.axes]
    assert sum(t.bytes for t in others) <= 2 * 4 * V * D // size
