"""Tests of digests: the same on any mesh, and other for any bit that changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from fm_jax import digests, meshes

DTYPES = ["float32", "bfloat16", "int32", "uint8"]


def _bits(dtype, shape=(5, 3), seed=0):
    """Return an array of any bits."""
    size = jnp.dtype(dtype).itemsize
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, 256, (*shape, size), np.uint8)
    return drawn.view(jnp.dtype(dtype))[..., 0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_of_every_element_counts(dtype):
    array = _bits(dtype)
    expected = digests.of({"x": array})["x"]
    raw = array.view(np.uint8).ravel()
    for at in range(raw.size):
        for bit in range(8):
            raw[at] ^= 1 << bit
            assert digests.of({"x": array})["x"] != expected
            raw[at] ^= 1 << bit
    assert digests.of({"x": array})["x"] == expected


@pytest.mark.parametrize("shape", [(24,), (4, 6), (2, 3, 4)])
def test_the_place_of_an_element_counts(shape):
    array = _bits("float32", shape)
    expected = digests.of(array)
    for other in (np.roll(array, 1), np.flip(array), np.roll(array, 1, axis=0)):
        assert digests.of(other) != expected
    assert digests.of(np.zeros(shape, np.float32)) == {"": 0}


@pytest.mark.parametrize("dtype", [*DTYPES, "bool"])
def test_it_does_not_depend_on_how_an_array_is_cut(dtype):
    array = np.arange(96).reshape(8, 12).astype(jnp.dtype(dtype))
    expected = digests.of({"x": array, "step": np.int32(7)})
    for sizes in ((8, 1, 1), (1, 4, 2), (2, 2, 2)):
        given = dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))
        mesh = meshes.make(meshes.sizes("ddp", given, 8))
        tree = {
            "x": jax.device_put(
                array, NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
            ),
            "step": jax.device_put(np.int32(7), NamedSharding(mesh, PartitionSpec())),
        }
        assert digests.of(tree) == expected


def test_what_changed_is_named_and_what_was_not_told_is_not():
    before = {"a": 1, "b": 2, "gone": 3}
    assert digests.changed(before, {"a": 1, "b": 5, "new": 4}) == ["b"]
