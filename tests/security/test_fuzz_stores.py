"""Token stores of strangers: their headers, arrays and shards, made wrong."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fm_jax.data import arrays, headers, store, verify
from tests.data import written
from tests.security import mutants

TEXTS = ["abc", "", "é\U0001f642", "defg"]


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Return a folder of a sound store, and its header without its seal."""
    folder = written.write(tmp_path_factory.mktemp("kept") / "store", TEXTS, cuts=(2,))
    header = json.loads((folder / "header.json").read_text())
    del header["digest"]
    return folder, header


def _use(folder):
    """Open a store and read all of it."""
    found = store.open_store(folder)
    assert len(found.read(0, len(found))) == len(found)
    for document in range(found.header["num_documents"]):
        found.origin(document)


def test_a_store_that_is_sound_is_read(kept):
    _use(kept[0])
    assert verify.verify(kept[0]) == []


@mutants.cases(700)
@given(data=st.data())
def test_a_header_that_lies_under_a_right_seal_is_one_line(kept, data):
    folder, header = kept
    before = (folder / "header.json").read_bytes()
    told = data.draw(mutants.of_value(header))
    try:
        if isinstance(told, dict):
            written.write_header(folder, told)
        else:
            (folder / "header.json").write_text(json.dumps(told))
        assert bool(mutants.refused(_use, folder)) <= bool(json.dumps(told))
        assert mutants.refused(verify.verify, folder) == ""  # it tells, never raises
    finally:
        (folder / "header.json").write_bytes(before)


@mutants.cases(400)
@given(data=st.data())
def test_a_header_of_any_bytes_is_one_line(kept, data):
    folder, _ = kept
    before = (folder / "header.json").read_bytes()
    raw = data.draw(mutants.of_bytes(before))
    try:
        (folder / "header.json").write_bytes(raw)
        assert bool(mutants.refused(store.open_store, folder)) == (raw != before)
        assert bool(verify.verify(folder)) == (raw != before)
    finally:
        (folder / "header.json").write_bytes(before)


@mutants.cases(500)
@given(data=st.data())
def test_a_file_that_was_changed_is_named(kept, data):
    folder, _ = kept
    name = data.draw(st.sampled_from([*headers.FILES, "tokens-00000.bin"]))
    before = (folder / name).read_bytes()
    raw = data.draw(mutants.of_bytes(before))
    try:
        (folder / name).write_bytes(raw)
        mutants.refused(_use, folder)
        problems = verify.verify(folder)
        assert bool(problems) == (raw != before)
        assert all(problem.startswith(name) for problem in problems)
    finally:
        (folder / name).write_bytes(before)


@mutants.cases(400)
@given(data=st.data())
def test_a_file_that_was_changed_and_sealed_again_is_one_line(
    tmp_path_factory, kept, data
):
    folder = tmp_path_factory.getbasetemp() / "sealed"
    shutil.rmtree(folder, ignore_errors=True)
    name = data.draw(st.sampled_from(list(headers.FILES)))
    raw = data.draw(mutants.of_bytes((kept[0] / name).read_bytes()))
    written.write(folder, TEXTS, cuts=(2,), **{name: raw})
    mutants.refused(_use, folder)
    assert all("\n" not in problem for problem in verify.verify(folder))


@mutants.cases(400)
@given(data=st.data())
def test_an_array_of_any_bytes_is_read_or_no_array(tmp_path_factory, data):
    file = tmp_path_factory.getbasetemp() / "any.npy"
    np.save(file, np.arange(6, dtype="<i4").reshape(2, 3))
    file.write_bytes(data.draw(mutants.of_bytes(file.read_bytes())))
    mutants.refused(arrays.mapped, file, errors=(ValueError, OSError))


def test_an_array_of_objects_which_is_a_pickle_is_refused(tmp_path):
    file = tmp_path / "objects.npy"
    np.save(file, np.array([{"a": 1}], object), allow_pickle=True)
    said = mutants.refused(arrays.mapped, file, errors=ValueError)
    assert said.startswith("no array of NumPy")
