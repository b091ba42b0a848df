"""Tests of the files of a fit: whole or absent, read back the same, refused by name."""

import json

import numpy as np
import pytest

from fm_jax.errors import UserError
from fm_jax.scaling import files

RECORD = {
    "format": files.FORMAT,
    "options": {"law": "chinchilla", "fixed": {"E": 1.7}},
    "inputs": {"path": "runs.csv", "sha256": "0" * 64, "rows": 9, "count": "total"},
    "range": {
        "params": [1e6, 1e8],
        "tokens": [1e8, 1e10],
        "flops_6nd": [1e15, 1e18],
        "flops_ratio": 1.0,
    },
    "approach3": {"A": 1.0, "B": 2.0, "alpha": 0.3, "beta": 0.4, "residual_sd": 0.01},
    "warnings": [],
}
DRAWS = {"approach3": np.arange(8.0).reshape(2, 4)}


def test_what_is_written_is_read_back(tmp_path):
    files.write(RECORD, DRAWS, tmp_path / "new" / "folder")
    record, draws, law = files.load(tmp_path / "new" / "folder")
    assert record == files.load(tmp_path / "new" / "folder" / files.FILE)[0] == RECORD
    np.testing.assert_array_equal(draws["approach3"], DRAWS["approach3"])
    assert law.held == {"E": 1.7}
    assert files.theta(record["approach3"], law).tolist() == [1.0, 2.0, 0.3, 0.4]


def test_what_is_no_number_becomes_null():
    found = files.plain({"a": np.float64("nan"), "b": [np.int64(3), (np.inf, True)]})
    assert json.dumps(found) == '{"a": null, "b": [3, [null, true]]}'
    assert files.plain(np.array([[1.5, np.nan]])) == [[1.5, None]]


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out must be a folder to write in"):
        files.prepare(tmp_path / "file")


def test_a_folder_that_is_no_fit_is_refused(tmp_path):
    def load(folder):
        with pytest.raises(UserError) as error:
            files.load(folder)
        return str(error.value)

    assert load(tmp_path).startswith("--fit must be a folder with fit.json")
    files.write(RECORD, DRAWS, tmp_path)
    (tmp_path / files.DRAWS).write_bytes(b"")
    assert load(tmp_path).startswith("--fit must have its draws")
    (tmp_path / files.FILE).write_text('{"format": 99}')
    assert "must be a fit of format 1" in load(tmp_path)
