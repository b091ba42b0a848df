"""Tables as they are read: kinds of files, cells, and what cannot be read."""

import json
import math
import re
import sys

import pytest

from fm_jax.errors import UserError
from fm_jax.tables import cells

TABLE = "params,tokens,loss\n1e6,2e7,3.5\n2e6,4e7,3.25\n"


def _csv(tmp_path, content):
    file = tmp_path / "runs.csv"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def _refused(said, file):
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        cells.read(file)
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_other_line_ends_and_quotes_are_read(tmp_path):
    text = '\ufeffparams, "loss",note\r\n"1e6",3.5,"a ""b"",\r\nc"\r\n\r\n 2e6 ,,d\r\n'
    found = cells.read(_csv(tmp_path, text.replace(', "', ',"')))
    assert found.names == ["params", "loss", "note"]
    assert found.floats("params").tolist() == [1e6, 2e6]
    assert found.floats("loss")[0] == 3.5
    assert math.isnan(found.floats("loss")[1])
    assert found.texts("note") == ['a "b",\r\nc', "d"]
    assert found.places == ["line 3", "line 5"]


def test_huge_integers_are_numbers_or_told_apart_as_infinite(tmp_path):
    file = tmp_path / "runs.jsonl"
    file.write_text(f'{{"a": {10**30}}}\n{{"a": {10**400}}}\n{{"a": "x"}}\n')
    found = cells.read(file)
    assert found.floats("a")[:2].tolist() == [1e30, math.inf]
    assert found.strange("a").tolist() == [False, False, True]
    text = f"a\n{10**30}\n{10**400}\n"
    assert cells.read(_csv(tmp_path, text)).floats("a").tolist() == [1e30, math.inf]


def test_lists_and_truths_are_no_surprise(tmp_path):
    file = tmp_path / "runs.jsonl"
    file.write_text('{"a": [1], "b": true}\n{"a": [2], "b": null}\n')
    found = cells.read(file)
    assert found.strange("a").all()
    assert found.texts("b") == ["true", ""]


def test_the_last_line_of_jsonl_needs_no_newline(tmp_path):
    file = tmp_path / "runs.jsonl"
    file.write_text('{"a": 1}\n{"b": 2}')
    found = cells.read(file)
    assert found.columns == {"a": [1, None], "b": [None, 2]}


def test_parquet_gives_the_cells_of_csv(tmp_path):
    import pyarrow
    from pyarrow import parquet

    given = {"params": [10**6, 2 * 10**6], "loss": [3.5, None], "group": ["x", None]}
    parquet.write_table(pyarrow.table(given), tmp_path / "runs.PARQUET")
    found = cells.read(tmp_path / "runs.PARQUET")
    other = cells.read(_csv(tmp_path, "params,loss,group\n1000000,3.5,x\n2000000,,\n"))
    for name in given:
        assert found.floats(name).tobytes() == other.floats(name).tobytes()
        assert found.texts("group") == other.texts("group")
    assert found.places == ["row 1", "row 2"]


def test_a_folder_without_runs_is_told(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    _refused("must hold runs; got none with table.jsonl below it.", tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "must have a line of names and rows; got nothing."),
        ("\n\n", "must have a line of names and rows; got nothing."),
        ("params,tokens,loss\n", "must have rows; got none."),
        ("params,loss,params\n1,2,3\n", "must name each column once; got params twice"),
        ("params;loss\n1;2\n", "must have commas between its cells; got ';'."),
        ("a,b\n1,2\n3\n", "must have the 2 cells of its first line in each; got 1 in "
         "line 3."),
        ('a,b\n1,"2\n', "must be a table in CSV; got unexpected end of data in line 2"),
        (b"a,b\n1,\xe9\n", "must be UTF-8; got byte 0xe9 in line 2."),
    ],
)  # fmt: skip
def test_what_is_no_table_is_refused(tmp_path, content, said):
    _refused(said, _csv(tmp_path, content))


def test_other_files_are_refused(tmp_path):
    (tmp_path / "runs.xlsx").write_bytes(b"")
    _refused("must be .csv, .jsonl, .parquet or a folder of runs; got",
             tmp_path / "runs.xlsx")  # fmt: skip
    _refused("no, which is not there.", tmp_path / "no")
    _refused("must be readable; got No such file", tmp_path / "no.csv")
    (tmp_path / "runs.parquet").write_text(TABLE)
    _refused("must be a Parquet file; got", tmp_path / "runs.parquet")
    (tmp_path / "runs.jsonl").write_text(json.dumps([1]) + "\n")
    _refused("must have an object in each line; got '[1]'", tmp_path / "runs.jsonl")


def test_parquet_without_pyarrow_is_told(tmp_path, monkeypatch):
    (tmp_path / "runs.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    _refused("pip install pyarrow", tmp_path / "runs.parquet")


def test_a_missing_column_is_told_with_what_may_be_meant(tmp_path):
    found = cells.read(_csv(tmp_path, 'N,tokens,Val_Loss,"a\nb"\n1,2,3,4\n'))
    with pytest.raises(UserError) as caught:
        found.need("params", "tokens", "loss")
    assert str(caught.value).endswith(
        "must have the columns params, tokens, loss; got N, tokens, Val_Loss, "
        "'a\\nb'. Say which is meant: --map=params=N,loss=Val_Loss"
    )
