"""Tests of arrays that are written bit by bit."""

import hashlib

import numpy as np
import pytest

from fm_jax.data.arrays import Array


@pytest.mark.parametrize(
    ("dtype", "shape"), [("<i8", (7,)), ("<u8", (7, 2)), ("|b1", (7,)), ("<i4", (0,))]
)
def test_the_file_is_the_one_that_numpy_saves(dtype, shape, tmp_path):
    values = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    with Array(tmp_path / "mine.npy", dtype, shape) as array:
        for start in range(0, len(values), 3):
            array.write(values[start : start + 3])
    raw = (tmp_path / "mine.npy").read_bytes()
    np.save(tmp_path / "theirs.npy", values)
    assert raw == (tmp_path / "theirs.npy").read_bytes()
    assert array.digest == hashlib.blake2b(raw, digest_size=16).hexdigest()


def test_columns_of_a_structure_are_written_as_they_are(tmp_path):
    rows = np.zeros(3, [("a", "<i4"), ("b", "<i8")])
    rows["b"] = [5, 6, 7]
    with Array(tmp_path / "b.npy", "<i8", (3,)) as array:
        array.write(rows["b"])
    assert np.load(tmp_path / "b.npy").tolist() == [5, 6, 7]


def test_a_disk_that_is_full_is_an_error_once_and_the_first_one_comes_out():
    big, small = np.zeros(1 << 17, "<i8"), np.zeros(1, "<i8")
    with pytest.raises(OSError, match="No space left"):  # noqa: SIM117
        with Array("/dev/full", "<i8", (1 << 17,)) as array:
            array.write(big)
    with pytest.raises(OSError, match="No space left"):  # noqa: SIM117
        with Array("/dev/full", "<i8", (1,)) as array:
            array.write(small)
    with pytest.raises(KeyError):  # noqa: SIM117
        with Array("/dev/full", "<i8", (1,)) as array:
            array.write(small)
            raise KeyError
