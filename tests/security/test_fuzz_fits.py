"""Fits, laws and tables of strangers, made wrong."""

import json

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from fm_jax.scaling import files, lawfile, predict
from fm_jax.sweeps import labpage
from fm_jax.tables import table
from tests.security import mutants

THETA = {"E": 1.8, "A": 480.0, "B": 2100.0, "alpha": 0.35, "beta": 0.37}
RECORD = {
    "format": files.FORMAT,
    "options": {"law": "chinchilla", "fixed": {}},
    "inputs": {"count": "total", "path": "runs.csv", "sha256": "0" * 64, "rows": 36},
    "range": {
        "params": [1e7, 1e10],
        "tokens": [1e9, 1e12],
        "flops": [1e18, 1e22],
        "flops_6nd": [1e18, 1e22],
        "flops_ratio": 1.0,
    },
    "approach3": {"law": "chinchilla", "residual_sd": 0.01} | THETA,
    "approach2": {"a": 0.5, "b": 0.5, "coefficient": 0.1, "coefficient_tokens": 1.6},
    "by_count": {},
    "warnings": ["few decades"],
}
DRAWS = {
    "approach3": np.array(list(THETA.values())) * np.linspace(0.99, 1.01, 20)[:, None],
    "approach2": np.tile([np.log(0.1), 0.5, np.log(1.6), 0.5], (20, 1)),
}


@pytest.fixture
def fitted(tmp_path):
    files.write(RECORD, DRAWS, tmp_path)
    return tmp_path


def _predict(folder):
    record, draws, law = files.load(folder)
    predict.lines(predict.predict(record, draws, law, flops=1e21))


def test_a_fit_that_is_right_predicts(fitted):
    _predict(fitted)


@mutants.cases(500)
@given(raw=mutants.of_json(RECORD))
def test_a_fit_that_lies_is_one_line(tmp_path_factory, raw):
    folder = tmp_path_factory.getbasetemp() / "fit"
    if not folder.exists():
        files.write(RECORD, DRAWS, folder)
    (folder / files.FILE).write_bytes(raw)
    mutants.refused(_predict, folder)


@mutants.cases(400)
@given(data=st.data())
def test_draws_that_lie_are_one_line(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "draws"
    files.write(RECORD, DRAWS, folder)
    raw = (folder / files.DRAWS).read_bytes()
    (folder / files.DRAWS).write_bytes(data.draw(mutants.of_bytes(raw)))
    mutants.refused(_predict, folder)


@pytest.mark.parametrize("odd", [np.zeros((3, 2)), np.array(["a"]), np.zeros(0)])
def test_draws_of_another_shape_are_one_line(fitted, odd):
    files.write(RECORD, DRAWS | {"approach3": odd}, fitted)
    assert mutants.refused(_predict, fitted)


def test_draws_that_are_pickles_are_refused(fitted):
    objects = np.array([{"a": 1}], object)
    np.savez(fitted / files.DRAWS, approach3=objects)
    assert "--fit must have its draws" in mutants.refused(_predict, fitted)


def test_a_fit_does_not_say_which_python_is_run(fitted, monkeypatch):
    """Fault 49, security: a fit, a run or a dataset that brings code.

    Promise: nothing that a file names is run; Python must be named by the user.
    """
    monkeypatch.chdir(fitted)
    (fitted / "law.py").write_text("open('ran', 'w').close()\n")
    for named in ("law.py", "./law.py(E=1)", str(fitted / "law.py")):
        record = RECORD | {"options": {"law": named, "fixed": {}}}
        files.write(record, DRAWS, fitted)
        said = mutants.refused(files.load, fitted)
        assert "--law must be given just where a fit is of a law's file" in said
        assert not (fitted / "ran").exists()
    mutants.refused(files.load, fitted, law=str(fitted / "law.py"))
    assert (fitted / "ran").exists()  # the user has named it


LAW = {"NAMES": ["E", "A"], "COLUMNS": ["params"], "SCALES": {"A": "log"},
       "START": [[1.0, 2.0]]}  # fmt: skip
LOSS = "\ndef loss(theta, *columns):\n    return theta[0] + theta[1] / columns[0]\n"


def _law(folder, text):
    (folder / "law.py").write_bytes(text)
    lawfile.read(folder / "law.py")


def test_a_law_that_is_right_is_taken(tmp_path):
    names = "".join(f"{name} = {value!r}\n" for name, value in LAW.items())
    _law(tmp_path, (names + LOSS).encode())


@mutants.cases(400)
@given(law=st.one_of(mutants.of_value(LAW), st.binary(max_size=60)))
def test_a_law_that_is_wrong_is_one_line(tmp_path_factory, law):
    if isinstance(law, dict):
        names = (f"{name} = {value!r}\n" for name, value in law.items())
        odd = "nan, inf = float('nan'), float('inf')\n"
        law = (odd + "".join(names) + LOSS).encode("utf-8", "replace")
    elif not isinstance(law, bytes):
        law = repr(law).encode("utf-8", "replace")
    mutants.refused(_law, tmp_path_factory.getbasetemp(), law)


COLUMNS = {
    "params": [1e6, 2e6, 4e6],
    "tokens": [1e8, 2e8, 4e8],
    "loss": [4.0, 3.5, 3.2],
    "group": ["1e18", "1e18", "a"],
    "is_final": [True, True, False],
}
CSV = "\n".join(",".join(map(str, row)) for row in zip(*COLUMNS.values(), strict=True))
CSV = (",".join(COLUMNS) + "\n" + CSV + "\n").encode()


@mutants.cases(500)
@given(raw=mutants.of_bytes(CSV))
def test_a_table_of_commas_that_lies_is_one_line(tmp_path_factory, raw):
    file = tmp_path_factory.getbasetemp() / "table.csv"
    file.write_bytes(raw)
    mutants.refused(table.read, file)


@mutants.cases(500)
@given(columns=mutants.of_value(COLUMNS))
def test_a_table_of_lines_that_lies_is_one_line(tmp_path_factory, columns):
    file = tmp_path_factory.getbasetemp() / "table.jsonl"
    columns = columns if isinstance(columns, dict) else {"a": columns}
    lists = {k: v if isinstance(v, list) else [v] for k, v in columns.items()}
    size = max(map(len, lists.values()), default=0)
    rows = [{k: v[i] for k, v in lists.items() if i < len(v)} for i in range(size)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    mutants.refused(table.read, file)


@mutants.cases(400)
@given(data=st.data())
def test_a_table_of_parquet_that_lies_is_one_line(tmp_path_factory, data):
    file = tmp_path_factory.getbasetemp() / "table.parquet"
    parquet.write_table(pa.table(COLUMNS), file)
    file.write_bytes(data.draw(mutants.of_bytes(file.read_bytes())))
    mutants.refused(table.read, file)


def test_a_config_that_is_written_of_a_fit_has_none_of_its_code():
    hostile = '"""\nimport os; os.abort()\n"""\\'
    for text in (hostile, hostile[::-1], "'''" + hostile, "\\", '"', "x\n" * 9):
        field = labpage._field("Source", f"{text} (sha256")
        module = compile(f'"""Title.\n\n{field}\n"""\n', "page", "exec")
        assert module.co_names == ("__doc__",)
