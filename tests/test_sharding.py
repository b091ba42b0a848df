"""Tests of the mesh and of the table from logical axes to it, on eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from fm_jax import sharding, trees
from fm_jax.errors import UserError
from fm_jax.models import zoo


@pytest.fixture(scope="module")
def mesh():
    """Return the mesh that cuts in two along every axis."""
    return sharding.make_mesh(data=2, fsdp=2, tensor=2)


@pytest.mark.parametrize(
    "sizes, expected",
    [
        ((2, 2, 2), (2, 2, 2)),
        ((-1, 1, 1), (8, 1, 1)),
        ((2, -1, 1), (2, 4, 1)),
        ((4, 2, -1), (4, 2, 1)),
    ],
)
def test_a_mesh_holds_all_devices(sizes, expected):
    data, fsdp, tensor = sizes
    mesh = sharding.make_mesh(data=data, fsdp=fsdp, tensor=tensor)
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert mesh.devices.shape == expected
    assert set(mesh.devices.flat) == set(jax.devices())
    assert mesh.axis_types == (AxisType.Auto,) * 3


@pytest.mark.parametrize(
    "sizes", [(-1, -1, 1), (0, 1, 1), (-1, 3, 1), (-2, -2, 2), (-1, -2, -2)]
)
def test_mesh_sizes_that_cannot_be_are_refused(sizes):
    data, fsdp, tensor = sizes
    with pytest.raises(UserError) as error:
        sharding.make_mesh(data=data, fsdp=fsdp, tensor=tensor)
    assert str(error.value) == (
        "mesh must have sizes >= 1, at most one -1, that divide the 8 devices; got "
        f"data={data} * fsdp={fsdp} * tensor={tensor}. "
        "Set --config.mesh.data=-1 and the others to 1."
    )


@pytest.mark.parametrize("sizes", [(2, 2, 1), (4, 2, 2)])
def test_meshes_of_fewer_or_more_devices_are_refused(sizes):
    data, fsdp, tensor = sizes
    with pytest.raises(UserError) as error:
        sharding.make_mesh(data=data, fsdp=fsdp, tensor=tensor)
    assert str(error.value) == (
        "mesh must multiply to the 8 devices; got "
        f"data={data} * fsdp={fsdp} * tensor={tensor}. "
        "Set one of the sizes to -1 to take what is left."
    )


@pytest.mark.parametrize(
    "axes, expected",
    [
        (("embed", "mlp"), ("fsdp", "tensor")),
        (("layers", "heads", "head_dim", "embed"), (None, "tensor", None, "fsdp")),
        (("batch", "length", "embed"), (("data", "fsdp"), None, None)),
        (("batch", "length", "vocab"), (("data", "fsdp"), None, "tensor")),
        (("heads", "mlp", None), ("tensor", None, None)),
        ((), ()),
    ],
)
def test_a_mesh_axis_goes_to_the_first_dim_that_asks(axes, expected, mesh):
    shape = (4,) * len(axes)
    assert sharding.spec(axes, shape, mesh) == PartitionSpec(*expected)


def test_mesh_axes_of_size_one_are_left_out():
    mesh = sharding.make_mesh(data=4, fsdp=1, tensor=2)
    found = sharding.spec(("batch", "embed", "vocab"), (4, 3, 6), mesh)
    assert found == PartitionSpec("data", None, "tensor")


@pytest.mark.parametrize(
    "name, shown", [("", "array"), ("blocks/mlp/up/kernel", "blocks/mlp/up/kernel")]
)
def test_a_dim_that_does_not_divide_is_refused_with_both_numbers(name, shown, mesh):
    with pytest.raises(UserError) as error:
        sharding.spec(("embed", "mlp"), (12, 21), mesh, name)
    assert str(error.value) == (
        f"{shown} dim 'mlp' must divide by the mesh axes tensor; got 21 over 2. "
        "Change the size or set --config.mesh.tensor=1."
    )


def test_a_dim_over_two_mesh_axes_must_divide_by_their_product(mesh):
    with pytest.raises(UserError) as error:
        sharding.spec(("batch",), (6,), mesh)
    assert str(error.value) == (
        "array dim 'batch' must divide by the mesh axes data*fsdp; got 6 over 4. "
        "Change the size or set --config.mesh.data=1."
    )


def test_a_logical_axis_outside_the_table_is_refused(mesh):
    with pytest.raises(KeyError, match="colour"):
        sharding.spec(("colour",), (4,), mesh)


def test_every_logical_axis_of_a_model_is_in_the_table(architecture):
    axes = jax.tree.leaves(zoo.build(architecture).axes)
    assert set(axes) <= sharding.RULES.keys()


def test_each_parameter_gets_the_sharding_of_its_axes(mesh, model_config):
    model = zoo.build(model_config(vocab_size=38, use_bias=True))
    places = trees.leaves_by_path(
        sharding.tree_shardings(model.axes, model.abstract, mesh)
    )
    expected = {
        "embedding": ("tensor", "fsdp"),
        "head": ("tensor", "fsdp"),
        "final_norm/scale": ("fsdp",),
        "blocks/attention/query/kernel": (None, "fsdp", "tensor", None),
        "blocks/attention/query/bias": (None, "tensor", None),
        "blocks/attention/out/kernel": (None, "tensor", None, "fsdp"),
        "blocks/attention/out/bias": (None, "fsdp"),
        "blocks/mlp/gate/kernel": (None, "fsdp", "tensor"),
        "blocks/mlp/down/kernel": (None, "tensor", "fsdp"),
        "blocks/mlp/down/bias": (None, "fsdp"),
        "blocks/mlp_norm/scale": (None, "fsdp"),
    }
    assert places.keys() == trees.leaves_by_path(model.abstract).keys()
    for name, entries in expected.items():
        assert places[name] == NamedSharding(mesh, PartitionSpec(*entries)), name


def test_an_indivisible_parameter_is_refused_by_name(mesh, model_config):
    model = zoo.build(model_config(vocab_size=37))
    with pytest.raises(UserError) as error:
        sharding.tree_shardings(model.axes, model.abstract, mesh)
    assert str(error.value) == (
        "embedding dim 'vocab' must divide by the mesh axes tensor; got 37 over 2. "
        "Change the size or set --config.mesh.tensor=1."
    )


def test_adamw_moments_lie_where_their_parameters_lie(mesh, model_config):
    model = zoo.build(model_config(vocab_size=38))
    places = sharding.tree_shardings(model.axes, model.abstract, mesh)
    whole = sharding.replicated(mesh)
    chain = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    state = jax.eval_shape(chain.init, model.abstract)
    found = trees.leaves_by_path(
        sharding.like_params(state, model.abstract, places, whole)
    )
    by_name = trees.leaves_by_path(places)
    moments = {name for name in found if "/mu/" in name or "/nu/" in name}
    assert len(moments) == 2 * len(by_name)
    for name in moments:
        assert found[name] == by_name[name.split("u/", 1)[1]], name
    rest = found.keys() - moments
    assert any(name.endswith("/count") for name in rest)
    assert all(found[name] == whole for name in rest)


def test_a_state_mirrors_the_longest_path_of_its_own_shape():
    shape = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    row = jax.ShapeDtypeStruct((2,), jnp.float32)
    params = {"a": {"w": shape}, "w": shape}
    places = {"a": {"w": "inner"}, "w": "outer"}
    state = ({"a": {"w": shape}, "w": shape}, {"a": {"w": row}}, {"b": {"w": shape}})
    assert sharding.like_params(state, params, places, "default") == (
        {"a": {"w": "inner"}, "w": "outer"},
        {"a": {"w": "default"}},
        {"b": {"w": "outer"}},
    )


def test_a_replicated_array_is_whole_on_every_device(mesh):
    x = jax.device_put(np.arange(6.0), sharding.replicated(mesh))
    assert len(x.addressable_shards) == 8
    for shard in x.addressable_shards:
        np.testing.assert_array_equal(shard.data, np.arange(6.0))


def test_batches_are_cut_by_rows_over_data_and_fsdp(mesh):
    tokens = np.arange(40).reshape(8, 5)
    batch = {"tokens": tokens, "loss_weights": tokens / 2}
    placed = sharding.put_batch(batch, sharding.batch_sharding(mesh))
    assert placed.keys() == batch.keys()
    for name, rows in batch.items():
        np.testing.assert_array_equal(placed[name], rows.astype(placed[name].dtype))
    starts = set()
    for shard in placed["tokens"].addressable_shards:
        assert shard.data.shape == (2, 5)
        starts.add(int(shard.data[0, 0]))
    assert starts == {0, 10, 20, 30}


def test_batches_that_do_not_divide_are_refused_with_the_nearest(mesh):
    sharding.check_batch(8, mesh, "train.batch_size")
    with pytest.raises(UserError) as error:
        sharding.check_batch(10, mesh, "train.batch_size")
    assert str(error.value) == (
        "train.batch_size must divide by data*fsdp of the mesh; got 10 over 4. "
        "Nearest: 8 or 12."
    )


def test_constrain_does_nothing_without_a_mesh():
    x_BTD = jnp.ones((3, 5, 7))
    assert sharding.constrain(x_BTD, "batch", "length", "embed") is x_BTD


def test_constrain_does_nothing_on_one_device():
    x_BTD = jnp.ones((3, 5, 7))
    one = jax.make_mesh(
        (1, 1, 1), sharding.AXES, (AxisType.Auto,) * 3, devices=jax.devices()[:1]
    )
    with jax.set_mesh(one):
        assert sharding.constrain(x_BTD, "batch", "length", "embed") is x_BTD


def test_constrain_pins_activations_to_the_mesh(mesh):
    x_BTF = np.arange(4 * 5 * 6.0, dtype=np.float32).reshape(4, 5, 6)

    @jax.jit
    def pinned(x_BTF):
        return sharding.constrain(2 * x_BTF, "batch", "length", "mlp")

    with jax.set_mesh(mesh):
        y_BTF = pinned(x_BTF)
    expected = PartitionSpec(("data", "fsdp"), None, "tensor")
    assert y_BTF.sharding.is_equivalent_to(NamedSharding(mesh, expected), 3)
    np.testing.assert_array_equal(y_BTF, 2 * x_BTF)


def test_constrain_leaves_a_dim_that_does_not_divide_whole(mesh):
    x_BTF = np.arange(3 * 5 * 6.0, dtype=np.float32).reshape(3, 5, 6)

    @jax.jit
    def pinned(x_BTF):
        return sharding.constrain(2 * x_BTF, "batch", "length", "mlp")

    with jax.set_mesh(mesh):
        y_BTF = pinned(x_BTF)
    expected = PartitionSpec(None, None, "tensor")
    assert y_BTF.sharding.is_equivalent_to(NamedSharding(mesh, expected), 3)
    np.testing.assert_array_equal(y_BTF, 2 * x_BTF)
