"""Parameters by pieces: what Orbax restores, and what it saved."""

import jax
import ml_dtypes
import numpy as np
import pytest

from fm_jax.checkpoints import Checkpoints
from fm_jax.errors import UserError
from fm_jax.hf import pieces

SHAPES = {
    "blocks/mlp/up/kernel": (3, 5, 7),
    "blocks/mlp/experts/up/kernel": (2, 3, 4, 5),
    "embedding": (37, 12),
    "final_norm/scale": (9,),
}
LEAD = {
    "blocks/mlp/up/kernel": 1,
    "blocks/mlp/experts/up/kernel": 2,
    "embedding": 0,
    "final_norm/scale": 0,
}


def values():
    rng = np.random.default_rng(0)
    found = {n: rng.standard_normal(s, np.float32) for n, s in SHAPES.items()}
    return found | {"final_norm/scale": np.zeros(9, np.float32)}


def tree(leaves, change=lambda x: x):
    """Return leaves by path as nested dicts."""
    found = {}
    for path, leaf in leaves.items():
        *above, last = path.split("/")
        inside = found
        for key in above:
            inside = inside.setdefault(key, {})
        inside[last] = change(leaf)
    return found


def abstract(leaf):
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, np.float32, sharding=place)


@pytest.fixture
def small_chunks(monkeypatch):
    """Cut all arrays into several chunks."""
    monkeypatch.setattr(pieces, "CHUNK_BYTES", 300)


def test_orbax_restores_what_was_written_by_pieces_of_any_strides(
    tmp_path, small_chunks
):
    writer = pieces.Writer(tmp_path / "checkpoints", 4, SHAPES, LEAD)
    for name, whole in values().items():
        for index in np.ndindex(whole.shape[: LEAD[name]]):
            writer.write(name, index, np.asfortranarray(whole[index]))
    writer.close()
    saved = Checkpoints(tmp_path / "checkpoints")
    assert saved.steps() == [4]
    found = saved.restore(4, {"params": tree(values(), abstract)})["params"]
    jax.tree.map(np.testing.assert_array_equal, found, tree(values()))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_what_orbax_saved_is_read_by_pieces_and_rounded(tmp_path, small_chunks, dtype):
    saved = Checkpoints(tmp_path / "checkpoints", writes=True)
    saved.save(7, {"ema": tree(values(), jax.numpy.asarray)}, None)
    saved.close()
    beside = tmp_path / "beside"
    beside.mkdir()
    reader = pieces.Reader(tmp_path / "checkpoints", 7, "ema", beside=beside)
    for name, whole in values().items():
        assert reader.shape(name) == SHAPES[name]
        for index in np.ndindex(whole.shape[: LEAD[name]]):
            piece = reader.read(name, index, np.dtype(dtype))
            assert piece.dtype == dtype
            np.testing.assert_array_equal(piece, whole[index].astype(dtype))
    assert any(beside.iterdir())  # larger chunks than a layer pass through a file
    reader.close()
    assert not any(beside.iterdir())


def test_what_was_written_by_pieces_is_read_without_a_copy(tmp_path):
    writer = pieces.Writer(tmp_path / "checkpoints", 0, SHAPES, LEAD)
    for name, whole in values().items():
        for index in np.ndindex(whole.shape[: LEAD[name]]):
            writer.write(name, index, whole[index])
    writer.close()
    beside = tmp_path / "beside"
    beside.mkdir()
    reader = pieces.Reader(tmp_path / "checkpoints", 0, "params", beside=beside)
    name = "blocks/mlp/experts/up/kernel"
    np.testing.assert_array_equal(
        reader.read(name, (1, 2), np.dtype(np.float32)), values()[name][1, 2]
    )
    assert not any(beside.iterdir())


def test_a_number_that_does_not_fit_a_dtype_is_refused(tmp_path):
    saved = Checkpoints(tmp_path / "checkpoints", writes=True)
    large = np.array([1.0, np.inf, -70_000.0], np.float32)
    saved.save(0, {"params": {"a": large}}, None)
    saved.close()
    reader = pieces.Reader(tmp_path / "checkpoints", 0, "params", beside=tmp_path)
    with pytest.raises(UserError, match="a must fit float16; got values up to 70000"):
        reader.read("a", (), np.dtype(np.float16))
    np.testing.assert_array_equal(reader.read("a", (), np.dtype(np.float32)), large)


def test_a_part_or_a_parameter_that_is_not_there_is_told(tmp_path):
    saved = Checkpoints(tmp_path / "checkpoints", writes=True)
    saved.save(0, {"params": {"a": np.ones(3, np.float32)}}, None)
    saved.close()
    with pytest.raises(UserError, match=r"must have a checkpoint; got no .*0/ema"):
        pieces.Reader(tmp_path / "checkpoints", 0, "ema", beside=tmp_path)
    reader = pieces.Reader(tmp_path / "checkpoints", 0, "params", beside=tmp_path)
    with pytest.raises(UserError, match="the model's parameters; got no b/kernel in"):
        reader.shape("b/kernel")


def test_what_is_held_in_memory_is_read_as_from_the_disk(tmp_path):
    rng = np.random.default_rng(0)
    leaf = rng.standard_normal((2, 3, 5), np.float32)
    writer = pieces.Writer(tmp_path / "c", 0, {"a/b": leaf.shape}, {"a/b": 1})
    for layer in range(2):
        writer.write("a/b", (layer,), leaf[layer])
    writer.close()
    (tmp_path / "beside").mkdir()
    disk = pieces.Reader(tmp_path / "c", 0, "params", beside=tmp_path / "beside")
    held = pieces.Held({"a/b": leaf})
    assert held.shape("a/b") == disk.shape("a/b")
    for index, dtype in (((), np.float32), ((1,), np.float16)):
        found = held.read("a/b", index, np.dtype(dtype))
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, disk.read("a/b", index, np.dtype(dtype)))
    large = pieces.Held({"a": np.full((2, 3), 1e6, np.float32)})
    with pytest.raises(UserError, match=r"a must fit float16; got values up to 1e\+06"):
        large.read("a", (0,), np.dtype(np.float16))
