"""Tests of the table from logical axes to the mesh, on eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from fm_jax import meshes, sharding, trees
from fm_jax.errors import UserError
from fm_jax.models import zoo


def _layout(preset="ddp", rules=(), **given):
    return sharding.layout(meshes.make(meshes.sizes(preset, given, 8)), rules)


@pytest.fixture(scope="module")
def layout():
    """Return the layout on the mesh that cuts in two along data, fsdp and tensor."""
    return _layout(data=2, fsdp=2, tensor=2)


@pytest.fixture(scope="module")
def in_pieces():
    """Return the layout that cuts rows over data, and each in two over context."""
    return _layout(data=2, context=2, tensor=2)


def _mistake(function, *arguments):
    with pytest.raises(UserError) as error:
        function(*arguments)
    return str(error.value)


# ---- the table and its overrides


@pytest.mark.parametrize(
    "axes, shape, expected",
    [
        (("embed", "mlp"), (4, 6), ("fsdp", "tensor")),
        (
            ("layers", "heads", "head_dim", "embed"),
            (3, 4, 5, 6),
            (None, "tensor", None, "fsdp"),
        ),
        (("batch", "length", None), (8, 5, 7), (("data", "fsdp"), None, None)),
        (("batch", "length", "vocab"), (4, 5, 6), (("data", "fsdp"), None, "tensor")),
        (("kv_heads", None), (2, 2), ("tensor", None)),
        (("expert", "positions"), (3, 5), (None, None)),
        ((), (), ()),
    ],
)
def test_each_dim_is_cut_over_the_mesh_axes_of_its_name(axes, shape, expected, layout):
    assert sharding.spec(axes, shape, layout) == PartitionSpec(*expected)


def test_mesh_axes_of_size_one_are_left_out():
    found = sharding.spec(
        ("batch", "embed", "vocab"), (4, 3, 6), _layout(data=4, tensor=2)
    )
    assert found == PartitionSpec("data", None, "tensor")


def test_rows_are_cut_over_the_context_too(in_pieces):
    found = sharding.spec(("batch", "length"), (4, 5), in_pieces)
    assert found == PartitionSpec(("data", "context"), None)


def test_an_override_stands_in_place_of_the_tables_rule():
    held = _layout(
        rules=(("embed", ("fsdp", "data")), ("vocab", ())), data=2, fsdp=2, tensor=2
    )
    found = sharding.spec(("vocab", "embed"), (3, 8), held)
    assert found == PartitionSpec(None, ("fsdp", "data"))
    assert held.rules["mlp"] == sharding.RULES["mlp"]
    assert sharding.RULES["embed"] == ("fsdp",)


def test_an_override_of_an_unknown_logical_axis_is_refused():
    text = _mistake(_layout, "ddp", (("embd", ("fsdp",)),))
    assert text.startswith(
        "mesh.rules axis must be one of the known names; got 'embd'. "
        "Did you mean 'embed'? Known: embed, "
    )


@pytest.mark.parametrize("fixed", ["rows", "batch", "length", "head_dim"])
def test_an_override_of_what_the_program_relies_on_is_refused(fixed):
    text = _mistake(_layout, "ddp", ((fixed, ("fsdp",)),))
    assert text.startswith(
        f"mesh.rules axis must be one of the known names; got {fixed!r}. "
    )
    known = text.split("Known: ")[1].split(", ")
    assert sorted(known) == sorted(sharding.RULES.keys() - set(sharding.FIXED))
    assert fixed not in known


def test_experts_cut_over_rows_and_over_something_else_are_refused():
    with pytest.raises(UserError) as error:
        _layout(rules=(("expert", ("expert", "tensor")),), data=2, expert=2, tensor=2)
    assert str(error.value) == (
        "mesh.rules must cut expert over axes that all cut rows, or that all do not; "
        "got ('expert', 'tensor'). Use expert alone."
    )


@pytest.mark.parametrize("axis", ["heads", "kv_heads"])
def test_heads_cut_unlike_their_keys_are_refused_where_context_is_cut(axis):
    other, rules = "kv_heads" if axis == "heads" else "heads", ((axis, ()),)
    shown = {axis: (), other: ("tensor",)}
    sizes = {"fsdp": 2, "context": 2, "tensor": 2}
    with pytest.raises(UserError) as error:
        _layout(rules=rules, data=1, **sizes)
    assert str(error.value) == (
        "mesh.rules must give heads and kv_heads the same mesh axes where context is "
        f"cut; got {shown['heads']} and {shown['kv_heads']}."
    )
    both = (*rules, (other, ()))
    assert _layout(rules=both, data=1, **sizes).rules["heads"] == ()
    assert _layout(rules=rules, data=2, fsdp=2, tensor=2).rules[axis] == ()


def test_heads_are_not_cut_over_what_cuts_rows():
    rules = (("heads", ("fsdp",)), ("kv_heads", ("fsdp",)))
    with pytest.raises(UserError) as error:
        _layout(rules=rules, data=1, fsdp=4, tensor=2)
    assert str(error.value) == (
        "mesh.rules must not cut heads over 'fsdp', which cuts rows; got ('fsdp',). "
        "Set --config.mesh.fsdp=1 or use tensor."
    )


def test_an_override_to_an_unknown_mesh_axis_is_refused():
    assert _mistake(_layout, "ddp", (("embed", ("fsdp", "tensr")),)) == (
        "mesh.rules mesh axis of 'embed' must be one of the known names; got 'tensr'. "
        "Did you mean 'tensor'? Known: tensor, context, data, expert, fsdp"
    )


def test_two_dims_over_one_mesh_axis_are_refused():
    held = _layout(rules=(("embed", ("tensor",)),), data=4, tensor=2)
    assert _mistake(sharding.spec, ("embed", "mlp"), (4, 6), held, "mlp/up/kernel") == (
        "a mesh axis must cut one dim of an array; got 'tensor' for dims 'embed' and "
        "'mlp' of mlp/up/kernel. Change mesh.rules or set --config.mesh.tensor=1."
    )


def test_two_dims_over_a_mesh_axis_of_size_one_are_no_mistake():
    held = _layout(rules=(("embed", ("tensor",)),), data=8)
    found = sharding.spec(("embed", "mlp"), (5, 7), held)
    assert found == PartitionSpec(None, None)


@pytest.mark.parametrize(
    "dim, near", [(21, "3 or 7"), (18, "3 or 6"), (10, "2 or 5"), (7, "1 or 7")]
)
def test_a_dim_that_does_not_divide_is_refused_with_the_nearest(dim, near):
    held = _layout(data=2, tensor=4)
    name = "blocks/mlp/up/kernel"
    text = _mistake(sharding.spec, ("embed", "mlp"), (12, dim), held, name)
    assert text == (
        f"{name} dim 'mlp' must divide by the mesh axes tensor; got {dim} over 4. "
        f"Nearest that divide: {near}. "
        "Change the size or set --config.mesh.tensor=1."
    )


def test_a_dim_over_two_mesh_axes_must_divide_by_their_product(layout):
    assert _mistake(sharding.spec, ("batch",), (6,), layout) == (
        "array dim 'batch' must divide by the mesh axes data*fsdp; got 6 over 4. "
        "Nearest that divide: 3 or 6. Change the size or set --config.mesh.fsdp=1."
    )


def test_a_logical_axis_outside_the_table_is_refused(layout):
    with pytest.raises(KeyError, match="colour"):
        sharding.spec(("colour",), (4,), layout)


# ---- parameters and what mirrors them


def test_every_logical_axis_of_a_model_is_in_the_table(architecture):
    axes = jax.tree.leaves(zoo.build(architecture).axes)
    assert set(axes) <= sharding.RULES.keys()


def test_each_parameter_gets_the_sharding_of_its_axes(layout, model_config):
    model = zoo.build(model_config(vocab_size=38, use_bias=True))
    places = trees.leaves_by_path(
        sharding.tree_shardings(model.axes, model.abstract, layout)
    )
    expected = {
        "embedding": ("tensor", "fsdp"),
        "head": ("tensor", "fsdp"),
        "final_norm/scale": (None,),
        "blocks/attention/query/kernel": (None, "fsdp", "tensor", None),
        "blocks/attention/query/bias": (None, "tensor", None),
        "blocks/attention/out/kernel": (None, "tensor", None, "fsdp"),
        "blocks/attention/out/bias": (None, None),
        "blocks/mlp/gate/kernel": (None, "fsdp", "tensor"),
        "blocks/mlp/down/kernel": (None, "tensor", "fsdp"),
        "blocks/mlp/down/bias": (None, None),
        "blocks/mlp_norm/scale": (None, None),
    }
    assert places.keys() == trees.leaves_by_path(model.abstract).keys()
    for name, entries in expected.items():
        assert places[name] == layout.sharding(*entries), name


def test_an_indivisible_parameter_is_refused_by_name(layout, model_config):
    model = zoo.build(model_config(vocab_size=37))
    text = _mistake(sharding.tree_shardings, model.axes, model.abstract, layout)
    assert text == (
        "embedding dim 'vocab' must divide by the mesh axes tensor; got 37 over 2. "
        "Nearest that divide: 1 or 37. Change the size or set --config.mesh.tensor=1."
    )


def test_adamw_moments_lie_where_their_parameters_lie(layout, model_config):
    model = zoo.build(model_config(vocab_size=38))
    places = sharding.tree_shardings(model.axes, model.abstract, layout)
    whole = layout.sharding()
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


def test_a_sharding_of_nothing_is_whole_on_every_device(layout):
    x = jax.device_put(np.arange(6.0), layout.sharding())
    assert len(x.addressable_shards) == 8
    for shard in x.addressable_shards:
        np.testing.assert_array_equal(shard.data, np.arange(6.0))


# ---- batches


def _batch(rows, length):
    """Return a batch in which no two tokens are equal."""
    tokens_BT = np.arange(rows * length, dtype=np.int32).reshape(rows, length)
    return {
        "tokens": tokens_BT,
        "loss_weights": (tokens_BT / 2).astype(np.float32),
        "components": np.arange(rows, dtype=np.int32) + 1000,  # one of a whole row
    }


MESHES = {preset: {} for preset in meshes.PRESETS} | {
    "all_of_rows": {"data": 2, "fsdp": 2, "expert": 2},
    "mix": {"data": 2, "context": 2, "tensor": 2},
}


@pytest.fixture(scope="module", params=MESHES)
def any_layout(request):
    """Return the layout of each preset in turn, and of mixes."""
    preset = request.param if request.param in meshes.PRESETS else "ddp"
    return _layout(preset, **MESHES[request.param])


def test_rows_go_to_the_mesh_and_back_whatever_it_is(any_layout):
    batch = _batch(16, 5)
    held = sharding.local_rows(16, any_layout)
    np.testing.assert_array_equal(held, np.arange(16))  # one process holds all
    placed = sharding.put_batch(batch, 16, any_layout)
    assert placed.keys() == batch.keys()
    groups = any_layout.size("data", "fsdp", "expert")
    for name, rows in batch.items():
        assert placed[name].sharding == sharding.batch_sharding(any_layout)
        assert placed[name].dtype == rows.dtype
        np.testing.assert_array_equal(placed[name], rows)
        shards = placed[name].addressable_shards
        shapes = {shard.data.shape for shard in shards}
        assert shapes == {(16 // groups, *rows.shape[1:])}
        for shard in shards:
            np.testing.assert_array_equal(shard.data, rows[shard.index])


def test_a_process_puts_its_own_rows_on_its_own_devices(monkeypatch):
    held, batch = _layout(fsdp=4, tensor=2), _batch(12, 5)
    # Devices 4 and 5 share one group of rows, 0 and 1 another: as if of one process.
    whole = sharding.batch_sharding(held).devices_indices_map((12,))
    mine = {device: at for device, at in whole.items() if device.id in (0, 1, 4, 5)}
    monkeypatch.setattr(
        NamedSharding, "addressable_devices_indices_map", lambda self, shape: mine
    )
    monkeypatch.setattr(
        jax,
        "make_array_from_callback",
        lambda shape, place, piece: [piece(at) for at in mine.values()],
    )
    rows = sharding.local_rows(12, held)
    np.testing.assert_array_equal(rows, [0, 1, 2, 6, 7, 8])
    read = {name: x[rows] for name, x in batch.items()}
    placed = sharding.put_batch(read, 12, held)
    for name, x in batch.items():
        for part, at in zip(placed[name], mine.values(), strict=True):
            np.testing.assert_array_equal(part, x[at])


def test_batches_that_do_not_divide_are_refused_with_the_nearest(layout):
    sharding.check_batch(8, 5, layout, "train.batch_size")
    assert _mistake(sharding.check_batch, 10, 5, layout, "train.batch_size") == (
        "train.batch_size must divide by data*fsdp*expert of the mesh; got 10 over 4. "
        "Nearest: 8 or 12."
    )
    assert _mistake(sharding.check_batch, 3, 5, layout, "eval.batch_size") == (
        "eval.batch_size must divide by data*fsdp*expert of the mesh; got 3 over 4. "
        "Nearest: 4."
    )


def test_rows_that_the_context_does_not_cut_evenly_are_refused(in_pieces):
    sharding.check_batch(2, 12, in_pieces, "train.batch_size")
    assert _mistake(sharding.check_batch, 2, 10, in_pieces, "train.batch_size") == (
        "data.max_length must divide by 2*context of the mesh; got 10 over 4. "
        "Nearest: 12."
    )


# ---- rows in pieces


def _cut(batch, held):
    """Return the pieces of a batch, and on which device each array's part lies."""
    rows = len(batch["tokens"])
    with held.active():
        return jax.jit(sharding.cut_rows)(sharding.put_batch(batch, rows, held))


@pytest.fixture(
    scope="module",
    params=[(1, 2, 4), (2, 2, 2), (4, 2, 1), (2, 4, 1), (1, 8, 1)],
    ids=lambda sizes: "data{}_context{}_tensor{}".format(*sizes),
)
def pieces(request):
    """Return a batch of rows, its pieces and the sizes of data and context."""
    data, context, tensor = request.param
    held = _layout(data=data, context=context, tensor=tensor)
    batch = _batch(3 * data, 6 * context)
    return batch, _cut(batch, held), data, context


def test_a_piece_is_a_low_and_a_high_chunk_of_a_row(pieces):
    batch, cut, data, context = pieces
    for name in ("tokens", "loss_weights"):
        rows_BT, expected = batch[name], []
        for group in range(data):
            for c in range(context):
                for row in rows_BT[3 * group : 3 * group + 3]:
                    chunks = np.split(row, 2 * context)
                    expected.append([*chunks[c], *chunks[2 * context - 1 - c]])
        np.testing.assert_array_equal(cut[name], expected)


def test_a_piece_has_what_its_row_has_but_once(pieces):
    batch, cut, _, context = pieces
    row_of_piece = np.asarray(cut["tokens"])[:, 0] // batch["tokens"].shape[1]
    np.testing.assert_array_equal(cut["components"], row_of_piece + 1000)
    assert np.all(np.bincount(row_of_piece) == context)


def test_each_token_is_in_one_piece(pieces):
    batch, cut, _, context = pieces
    tokens = np.sort(np.asarray(cut["tokens"]), axis=None)
    np.testing.assert_array_equal(tokens, np.arange(batch["tokens"].size))
    rows, length = batch["tokens"].shape
    assert cut["tokens"].shape == (rows * context, length // context)


def test_a_device_keeps_pieces_of_the_rows_that_it_had(pieces):
    batch, cut, _, _ = pieces
    length = batch["tokens"].shape[1]
    for shard in cut["tokens"].addressable_shards:
        position = np.argwhere(cut["tokens"].sharding.mesh.devices == shard.device)[0]
        rows = np.unique(np.asarray(shard.data) // length)
        first = 3 * position[0]  # of the data axis
        np.testing.assert_array_equal(rows, [first, first + 1, first + 2])


def test_every_piece_sees_as_many_keys_as_the_next(pieces):
    batch, cut, _, context = pieces
    rows, length = batch["tokens"].shape
    places_Bt = np.asarray(cut["tokens"]) % length
    # Chunks see earlier ones, and half of themselves.
    chunks_BC = places_Bt.reshape(rows * context, 2, -1)[:, :, 0] // 3
    seen_B = (2 * chunks_BC + 1).sum(axis=1)
    assert set(seen_B.tolist()) == {4 * context}
    # By tokens: each sees itself and those before.
    assert len(set((places_Bt + 1).sum(axis=1).tolist())) == 1


@pytest.mark.parametrize("rows, parts", [(12, 4), (10, 1), (3, 1)])
def test_rows_count_as_cut_where_they_divide(rows, parts, layout, in_pieces):
    assert sharding.num_parts(rows) == 1
    for held in (layout, in_pieces):
        with held.active():
            assert sharding.num_parts(rows) == parts


def test_the_sums_of_pieces_are_those_of_their_rows(pieces):
    batch, cut, data, context = pieces
    held = _layout(data=data, context=context, tensor=8 // data // context)

    def sums(cut):
        x_BT2 = jnp.stack([cut["tokens"], cut["loss_weights"]], axis=-1)
        return sharding.sum_pieces(jnp.sum(x_BT2, axis=1))

    with held.active():
        found_B2 = jax.jit(sums)(cut)
    expected = [batch[name].sum(axis=1) for name in ("tokens", "loss_weights")]
    np.testing.assert_allclose(found_B2, np.stack(expected, axis=1), rtol=1e-6)
    assert found_B2.sharding.is_equivalent_to(sharding.batch_sharding(held), 2)


def test_rows_stay_whole_without_a_context(layout):
    batch = {name: jnp.asarray(x) for name, x in _batch(4, 6).items()}
    assert sharding.cut_rows(batch) is batch
    assert sharding.sum_pieces(batch["tokens"]) is batch["tokens"]
    assert sharding.num_pieces() == 1
    with layout.active():
        assert sharding.cut_rows(batch) is batch
        assert sharding.num_pieces() == 1


def test_a_layout_is_active_within_its_block_alone(layout, in_pieces):
    with in_pieces.active():
        assert sharding.num_pieces() == 2
        with layout.active():
            assert sharding.num_pieces() == 1
        assert sharding.num_pieces() == 2
    with pytest.raises(RuntimeError), in_pieces.active():
        raise RuntimeError
    assert sharding.num_pieces() == 1


# ---- inside compiled programs


def test_constrain_does_nothing_outside_a_layout():
    x_BTD = jnp.ones((3, 5, 7))
    assert sharding.constrain(x_BTD, "batch", "length", "embed") is x_BTD


def test_constrain_does_nothing_on_one_device():
    x_BTD = jnp.ones((3, 5, 7))
    one = meshes.make(meshes.sizes("ddp", {}, 1), devices=jax.devices()[:1])
    with sharding.layout(one).active():
        assert sharding.constrain(x_BTD, "batch", "length", "embed") is x_BTD


@pytest.mark.parametrize("rows, entry", [(4, ("data", "fsdp")), (3, None)])
def test_constrain_pins_the_dims_that_divide(rows, entry, layout):
    shape = (rows, 5, 6)
    x_BTF = np.arange(30.0 * rows, dtype=np.float32).reshape(shape)

    @jax.jit
    def pinned(x_BTF):
        return sharding.constrain(2 * x_BTF, "batch", "length", "mlp")

    with layout.active():
        y_BTF = pinned(x_BTF)
    assert y_BTF.sharding.is_equivalent_to(layout.sharding(entry, None, "tensor"), 3)
    np.testing.assert_array_equal(y_BTF, 2 * x_BTF)


def test_each_device_is_given_its_own_part(in_pieces):
    x_BF = np.arange(4 * 6.0, dtype=np.float32).reshape(4, 6)
    bound = np.float32(0.5)

    def part(x_bf, bound):
        assert x_bf.shape == (1, 3)  # batch over data and context, mlp over tensor
        others = jax.lax.ppermute(x_bf, "context", [(0, 1), (1, 0)])
        return others + bound

    with in_pieces.active():
        do = sharding.per_device(part, (("batch", "mlp"), ()), ("batch", "mlp"))
        found = jax.jit(do)(x_BF, bound)
    np.testing.assert_array_equal(found, x_BF[[1, 0, 3, 2]] + bound)
