"""Rows gathered from run folders and written as one table."""

import json
import re
import sys

import pytest

from fm_jax.errors import UserError
from fm_jax.tables import rows, schema
from tests.tables import runfolders
from tests.tables.runfolders import row


def _refused(said, call, *args):
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        call(*args)
    assert "\n" not in str(caught.value)


def test_the_last_row_of_a_step_holds(tmp_path):
    runfolders.run(
        tmp_path / "a",
        [row("a", 20, loss=9.0), row("a", 30), row("a", 20, loss=4.0)],
    )
    found = rows.collect(tmp_path)
    assert [(r["step"], r["loss"]) for r in found.rows] == [(30, 3.5), (20, 4.0)]
    assert found.rows_read == 3


def test_a_torn_last_line_is_left_out(tmp_path):
    runfolders.run(
        tmp_path / "a", [row("a", 20), row("a", 40)], end='\n{"format": 1, "'
    )
    assert [r["step"] for r in rows.collect(tmp_path).rows] == [20, 40]


def test_rows_know_what_their_sweep_planned(tmp_path):
    runfolders.sweep(tmp_path)
    found = rows.collect(tmp_path)
    plans = {
        r["name"]: (r["parent_id"], r["budget_flops"], r["replicate"])
        for r in found.rows
    }
    assert plans["a"] == ("trunk", 1e15, 0)
    assert plans["c-again"] == (None, 4e15, 1)
    assert list(found.rows[0]) == list(schema.WRITTEN)
    assert (found.failed, found.begun, found.unstarted) == (["stopped"], 1, 1)


def test_a_run_that_is_done_and_has_no_rows_is_not_waited_for(tmp_path):
    runfolders.run(tmp_path / "tuned", [], DONE="20")
    runfolders.run(tmp_path / "tuning", [])
    assert rows.collect(tmp_path).begun == 1


@pytest.mark.parametrize("below", ["", "runs", "runs/b"])
def test_plans_are_found_from_any_folder_of_the_sweep(tmp_path, below):
    runfolders.sweep(tmp_path / "sweep")
    found = rows.collect(tmp_path / "sweep" / below).rows
    assert [r["budget_flops"] for r in found if r["name"] == "b"] == [2e15]


def test_a_planned_parent_is_that_of_the_same_sweep(tmp_path):
    for sweep in ("one", "two"):
        runfolders.plan(
            tmp_path / sweep, ("trunk", "", None, 0), ("a", "trunk", 1e15, 0)
        )
        runs = tmp_path / sweep / "runs"
        runfolders.run(runs / "trunk", [row(f"{sweep}-1", 40)])
        runfolders.run(runs / "a", [row(f"{sweep}-2", 40)])
    found = {r["run_id"]: r["parent_id"] for r in rows.collect(tmp_path).rows}
    assert found == {"one-1": None, "one-2": "one-1", "two-1": None, "two-2": "two-1"}


def test_a_run_that_failed_by_diverging_is_diverged_without_a_row_that_says_so(
    tmp_path,
):
    runfolders.run(tmp_path / "a", [row("a", 20)], FAILED="DivergedError: nan")
    found = rows.collect(tmp_path)
    assert (found.rows[-1]["status"], found.failed) == ("diverged", [])


def test_a_run_that_failed_after_a_result_is_listed_as_failed(tmp_path):
    runfolders.run(tmp_path / "a", [row("a", 40)], FAILED="OSError: the disk is full")
    found = rows.collect(tmp_path)
    assert (found.rows[-1]["status"], found.failed) == ("final", ["a"])


def test_a_run_id_in_two_folders_is_refused(tmp_path):
    for name in ("a", "copy"):
        runfolders.run(tmp_path / name, [row("a", 40)])
    _refused("a run_id must be of one folder; got 'a' in", rows.collect, tmp_path)


def test_a_newer_format_is_refused(tmp_path):
    runfolders.run(tmp_path / "a", [row("a", 40) | {"format": 2}])
    _refused("must have format 1 of the run table; got 2.", rows.collect, tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"los": 3.0}, "got a row with los."),
        ({"run_id": None}, "without run_id."),
        ({"step": [1]}, "without step."),
    ],
)
def test_other_columns_are_refused(tmp_path, change, said):
    runfolders.run(tmp_path / "a", [row("a", 40) | change])
    _refused(said, rows.collect, tmp_path)


def test_a_broken_line_within_is_refused_with_its_number(tmp_path):
    runfolders.run(tmp_path / "a", [row("a", 20)], end='\n{"form\n{}\n')
    _refused("must be JSON in each line; got", rows.collect, tmp_path)
    _refused("in line 2.", rows.collect, tmp_path)
    (tmp_path / "a" / "table.jsonl").write_text("3\n")
    _refused("an object in each line; got '3' in line 1.", rows.collect, tmp_path)


def test_a_sweep_file_that_is_none_is_refused(tmp_path):
    runfolders.sweep(tmp_path)
    (tmp_path / "sweep.jsonl").write_text(json.dumps({"name": "a"}) + "\n")
    _refused("must be written by a sweep; got a line 1 without", rows.collect, tmp_path)


def test_tables_are_written_whole_with_the_columns_types_and_nulls(tmp_path):
    import pyarrow
    from pyarrow import parquet

    made = [row("a", 40, unique_tokens=2**53 + 1), row("b", 40, loss=None)]
    rows.write(tmp_path, made)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["table.csv", "table.parquet"]
    table = parquet.read_table(tmp_path / "table.parquet")
    assert table.column_names == list(schema.WRITTEN)
    assert table.schema.field("loss").type == pyarrow.float64()
    assert table.schema.field("step").type == pyarrow.int64()
    assert table.schema.field("is_final").type == pyarrow.bool_()
    assert table.column("loss").to_pylist() == [3.5, None]
    assert table.column("unique_tokens").to_pylist() == [2**53 + 1, None]
    lines = (tmp_path / "table.csv").read_text().splitlines()
    assert lines[0] == ",".join(schema.WRITTEN)
    assert '"wsd, ""long"""' in lines[1]
    assert "None" not in lines[2]


def test_a_row_with_another_column_is_not_written(tmp_path):
    with pytest.raises(ValueError, match=re.escape("got ['los']")):
        rows.write(tmp_path, [{"los": 3.0}])
    assert not list(tmp_path.iterdir())


def test_a_value_of_another_type_is_refused(tmp_path):
    _refused("must have rows of the run table's types", rows.write, tmp_path,
             [{"loss": "three"}])  # fmt: skip


def test_a_folder_that_is_not_there_is_told(tmp_path):
    _refused("table.csv must be writable", rows.write, tmp_path / "no", [row("a", 40)])


def test_without_pyarrow_the_csv_is_written_and_the_lack_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    _refused("pip install pyarrow", rows.write, tmp_path, [row("a", 40)])
    assert [p.name for p in tmp_path.iterdir()] == ["table.csv"]
