"""Tests of the mesh: sizes by preset, what is refused, slices as blocks."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from fm_jax import meshes
from fm_jax.errors import UserError


@dataclasses.dataclass(frozen=True, order=True)
class Device:
    """What a mesh asks of a device; simulated ones know no slices."""

    id: int
    process_index: int = 0
    slice_index: int | None = None
    platform: str = "cpu"
    device_kind: str = "cpu"


def _mistake(function, *arguments, **options):
    with pytest.raises(UserError) as error:
        function(*arguments, **options)
    return str(error.value)


def _larger(axis_sizes):
    return {axis: size for axis, size in axis_sizes.items() if size != 1}


# ---- sizes


@pytest.mark.parametrize(
    "preset, expected",
    [
        ("ddp", {"data": 8}),
        ("fsdp", {"fsdp": 8}),
        ("hsdp", {"data": 2, "fsdp": 4}),
        ("tensor", {"tensor": 8}),
        ("fsdp_tensor", {"fsdp": 4, "tensor": 2}),
        ("context", {"fsdp": 4, "context": 2}),
    ],
)
def test_a_preset_takes_all_eight_devices(preset, expected):
    found = meshes.sizes(preset, dict.fromkeys(meshes.AXES, 0), 8)
    assert (
        tuple(found) == meshes.AXES == ("data", "fsdp", "expert", "context", "tensor")
    )
    assert _larger(found) == expected


@pytest.mark.parametrize("preset", ["ddp", "fsdp", "tensor"])
def test_a_preset_of_one_axis_is_for_any_number_of_devices(preset):
    for count in (1, 2, 3, 6, 7, 100):
        found = meshes.sizes(preset, {}, count)
        assert sorted(found.values()) == [1, 1, 1, 1, count]


@pytest.mark.parametrize(
    "preset, given, expected",
    [
        ("ddp", {"tensor": 2}, {"data": 4, "tensor": 2}),
        ("ddp", {"data": 2, "fsdp": 4}, {"data": 2, "fsdp": 4}),
        ("fsdp", {"fsdp": 8}, {"fsdp": 8}),
        ("hsdp", {"data": 4}, {"data": 4, "fsdp": 2}),
        ("hsdp", {"data": 1}, {"fsdp": 8}),
        ("tensor", {"context": 4}, {"tensor": 2, "context": 4}),
        ("context", {"context": 8, "tensor": 1}, {"context": 8}),
        ("fsdp", {"expert": 4}, {"fsdp": 2, "expert": 4}),
    ],
)
def test_a_given_size_stands_in_place_of_the_presets(preset, given, expected):
    assert _larger(meshes.sizes(preset, given, 8)) == expected


@pytest.mark.parametrize(
    "preset, given, expected",
    [
        ("ddp", {"fsdp": -1}, {"fsdp": 8}),
        ("hsdp", {"tensor": -1}, {"data": 2, "tensor": 4}),
        ("fsdp_tensor", {"data": -1}, {"data": 4, "tensor": 2}),
        ("fsdp_tensor", {"fsdp": 2, "data": -1}, {"data": 2, "fsdp": 2, "tensor": 2}),
        ("ddp", {"data": -1}, {"data": 8}),
    ],
)
def test_a_given_rest_takes_the_place_of_the_presets(preset, given, expected):
    assert _larger(meshes.sizes(preset, given, 8)) == expected


def test_sizes_leave_the_presets_and_the_given_alone():
    given, before = {"data": -1}, {n: dict(s) for n, s in meshes.PRESETS.items()}
    meshes.sizes("fsdp", given, 8)
    assert given == {"data": -1}
    assert before == meshes.PRESETS


def test_an_unknown_preset_is_refused_with_the_nearest():
    assert _mistake(meshes.sizes, "fsdp_tensors", {}, 8) == (
        "mesh.preset must be one of the known names; got 'fsdp_tensors'. Did you mean "
        "'fsdp_tensor'? Known: fsdp_tensor, tensor, fsdp, context, ddp, hsdp"
    )


@pytest.mark.parametrize(
    "given, shown",
    [
        ({"data": -1, "fsdp": -1}, "data=-1 * fsdp=-1"),
        ({"data": -2}, "data=-2"),
        ({"data": -1, "tensor": -4}, "data=-1 * tensor=-4"),
    ],
)
def test_sizes_that_cannot_be_are_refused(given, shown):
    assert _mistake(meshes.sizes, "ddp", given, 8) == (
        f"mesh must have sizes >= 1 and at most one -1; got {shown}. "
        "Set --config.mesh.data=-1 and the others to 1."
    )


@pytest.mark.parametrize(
    "count, given, shown, near",
    [
        (8, {"data": 3}, "data=3", "data=8"),
        (8, {"data": 16}, "data=16", "data=8"),
        (8, {"data": 1}, "all 1", "data=8"),
        (
            8,
            {"data": 2, "tensor": 2},
            "data=2 * tensor=2",
            "data=2 * tensor=4 or data=4 * tensor=2",
        ),
        (
            12,
            {"data": 1, "fsdp": 5, "tensor": 3},
            "fsdp=5 * tensor=3",
            "fsdp=4 * tensor=3 or fsdp=6 * tensor=2",
        ),
    ],
)
def test_sizes_of_fewer_or_more_devices_are_refused_with_the_nearest(
    count, given, shown, near
):
    assert _mistake(meshes.sizes, "ddp", given, count) == (
        f"mesh must multiply to the {count} devices; got {shown}. "
        f"Nearest that work: {near}."
    )


@pytest.mark.parametrize(
    "count, preset, given, shown, near",
    [
        (8, "ddp", {"tensor": 3}, "data=-1 * tensor=3", ["tensor=4", "tensor=2"]),
        (8, "ddp", {"tensor": 16}, "data=-1 * tensor=16", ["tensor=8", "tensor=4"]),
        (7, "context", {}, "fsdp=-1 * context=2", ["context=1", "context=7"]),
        (
            12,
            "hsdp",
            {"tensor": 5},
            "data=2 * fsdp=-1 * tensor=5",
            ["data=2 * tensor=6", "data=2 * tensor=3"],
        ),
    ],
)
def test_sizes_that_do_not_divide_are_refused_with_the_nearest_that_do(
    count, preset, given, shown, near
):
    assert _mistake(meshes.sizes, preset, given, count) == (
        f"mesh must divide the {count} devices; got {shown}. "
        f"Nearest that work: {' or '.join(near)}."
    )
    for way in near:
        named = dict(part.split("=") for part in way.split(" * "))
        found = meshes.sizes(
            preset, given | {a: int(n) for a, n in named.items()}, count
        )
        assert found.items() >= {(axis, int(size)) for axis, size in named.items()}


# ---- make


@pytest.mark.parametrize("preset", meshes.PRESETS)
def test_a_mesh_holds_each_device_once(preset):
    axis_sizes = meshes.sizes(preset, {}, 8)
    mesh = meshes.make(axis_sizes)
    assert dict(mesh.shape) == axis_sizes
    assert mesh.axis_names == meshes.AXES
    assert mesh.axis_types == (AxisType.Auto,) * 5
    assert mesh.devices.size == 8
    assert set(mesh.devices.flat) == set(jax.devices())


def test_a_mesh_may_be_of_some_of_the_devices():
    some = jax.devices()[2:6]
    mesh = meshes.make(meshes.sizes("fsdp_tensor", {}, 4), devices=some)
    assert set(mesh.devices.flat) == set(some)
    assert mesh.devices.shape == (1, 2, 1, 1, 2)


def test_neighbours_on_the_last_axis_are_neighbours_in_the_machine():
    mesh = meshes.make(meshes.sizes("ddp", {"fsdp": 2, "tensor": 2}, 8))
    ids = np.vectorize(lambda device: device.id)(mesh.devices)
    np.testing.assert_array_equal(ids.reshape(2, 2, 2), np.arange(8).reshape(2, 2, 2))


def _blocks(monkeypatch, devices, axis_sizes, dcn):
    """Return the ids of a mesh of simple devices, [data, fsdp, tensor]."""
    monkeypatch.setattr(meshes, "Mesh", lambda array, axes, axis_types: array)
    array = meshes.make(axis_sizes, dcn=dcn, devices=devices)
    ids = np.vectorize(lambda device: device.id)(array)
    return ids.reshape([axis_sizes[axis] for axis in ("data", "fsdp", "tensor")])


def test_each_slice_is_a_block_of_its_own(monkeypatch):
    # Slices come interleaved, as a cluster may list them.
    devices = [Device(n, process_index=n % 4, slice_index=n % 4) for n in range(24)]
    axis_sizes = meshes.sizes("hsdp", {"data": 4, "fsdp": 2, "tensor": 3}, 24)
    found = _blocks(monkeypatch, devices, axis_sizes, {"data": 2, "fsdp": 2})
    assert sorted(found.flat) == list(range(24))
    for outer_data in range(2):
        for outer_fsdp in range(2):
            block = found[2 * outer_data : 2 * outer_data + 2, outer_fsdp]
            assert set((block % 4).flat) == {2 * outer_data + outer_fsdp}


def test_without_slices_the_processes_are_the_blocks(monkeypatch):
    devices = [Device(7 - n, process_index=n // 2) for n in range(8)]
    axis_sizes = meshes.sizes("hsdp", {"data": 4}, 8)
    found = _blocks(monkeypatch, devices, axis_sizes, {"data": 4})
    processes = (7 - found[:, :, 0]) // 2
    np.testing.assert_array_equal(processes, [[0, 0], [1, 1], [2, 2], [3, 3]])


def test_one_slice_needs_no_word_of_it(monkeypatch):
    devices = [Device(n, slice_index=0) for n in range(8)]
    axis_sizes = meshes.sizes("fsdp", {}, 8)
    for dcn in (None, {}, {"data": 1, "fsdp": 1}):
        found = _blocks(monkeypatch, devices, axis_sizes, dcn)
        np.testing.assert_array_equal(found[0, :, 0], np.arange(8))


@pytest.mark.parametrize("dcn, product", [({}, 1), ({"data": 2, "fsdp": 2}, 4)])
def test_another_number_of_slices_is_refused(dcn, product):
    devices = [Device(n, slice_index=n // 4) for n in range(8)]
    axis_sizes = meshes.sizes("hsdp", {}, 8)
    assert _mistake(meshes.make, axis_sizes, dcn=dcn, devices=devices) == (
        "mesh.dcn_data * mesh.dcn_fsdp must be the number of slices; got "
        f"{product} for 2 slices. Set the one of an axis that they divide."
    )


def test_a_part_between_slices_that_does_not_divide_its_axis_is_refused():
    axis_sizes = meshes.sizes("hsdp", {}, 8)
    assert _mistake(meshes.make, axis_sizes, dcn={"fsdp": 3}) == (
        "mesh.fsdp must divide by mesh.dcn_fsdp; got 4 and 3."
    )
