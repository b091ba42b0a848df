"""Run folders and sweeps of strangers: what they say of themselves, made wrong."""

import json
import pathlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fm_jax import config as configs
from fm_jax import configfile, status
from fm_jax.finetune.answers import Answers
from fm_jax.runs import Run
from fm_jax.sweeps import progress, records, sweep, workdir
from fm_jax.tables import cells, rows
from tests import folders
from tests.security import mutants
from tests.tables import runfolders

SWEEPS = pathlib.Path(__file__).parents[2] / "configs" / "sweeps"
ROWS = [
    {"step": 1, "train/loss": 5.5, "perf/mfu": 0.5},
    {"step": 2, "train/loss": 5.25, "eval/loss": None},
    {"step": 2, "text": "def "},
    {"step": 3, "final/loss": 5.0},
]


def _record():
    """Return config.json of a run, as training writes it."""
    raw = configfile.load_base()
    raw["train"]["steps"] = 3
    raw["data"]["tokenizer"] = "bytes"
    began = {"path": "/runs/a", "run_id": "a-12345678", "step": 2, "tokens": 7.0}
    told = {
        "config": raw,
        "fingerprint": "0123456789abcdef",
        "changed_from_base": {"train.steps": [0, 3]},
        "resolved": {
            "run_id": "b-12345678",
            "init": began | {"with_optimizer": False},
            "steps": 3,
            "model": dict(configs.check(raw).raw["model"]),
            "tokens_per_step": 64,
        },
        "data": {
            "tokenizer": "f" * 16,
            "end_id": 256,
            "train_store": "a",
            "eval_store": "b",
            "labels": ["good", "bad"],
            "label_ids": [3, 4],
            "begin_ids": [1],
        },
        "history": [{"time": "now", "command": ["fm", "train"]}],
    }
    return json.loads(json.dumps(told))


RECORD = _record()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


def _read(folder):
    """Read a run as commands do, as far as its config goes."""
    record = configfile.read_run(Run(folder))
    configs.check(record["config"])
    Answers.from_record(record)


def test_a_run_that_is_right_is_read(folder):
    (folder / "config.json").write_text(json.dumps(RECORD))
    _read(folder)
    assert configs.check(configfile.load(str(folder)).to_dict()).train.steps == 3


@mutants.cases(500)
@given(raw=mutants.of_json(RECORD))
def test_a_run_that_lies_of_itself_is_one_line(folder, raw):
    (folder / "config.json").write_bytes(raw)
    mutants.refused(_read, folder)
    mutants.refused(lambda: configs.check(configfile.load(str(folder)).to_dict()))


@mutants.cases(300)
@given(config=mutants.of_value(RECORD["config"]))
def test_a_config_that_lies_is_one_line(folder, config):
    (folder / "config.json").write_text(json.dumps(RECORD | {"config": config}))
    mutants.refused(_read, folder)
    mutants.refused(lambda: configs.check(configfile.load(str(folder)).to_dict()))


def _lines(values):
    return "".join(json.dumps(value) + "\n" for value in values).encode()


def _metrics(folder):
    run = Run(folder)
    list(run.rows())
    for name in ("train/loss", "eval/loss", "final/loss"):
        run.series(name)
    run.mend("metrics.jsonl")
    run.rewind(2)


def test_metrics_that_are_right_are_read(folder):
    (folder / "metrics.jsonl").write_bytes(_lines(ROWS[:1]) + b'{"step": 2, "tr')
    _metrics(folder)
    assert [row["step"] for row in Run(folder).rows()] == [1]


@mutants.cases(700)
@given(
    raw=st.one_of(
        mutants.of_bytes(_lines(ROWS)),
        mutants.of_value(ROWS).filter(lambda v: isinstance(v, list)).map(_lines),
    )
)
def test_metrics_that_were_torn_or_lie_are_one_line(folder, raw):
    (folder / "metrics.jsonl").write_bytes(raw)
    said = mutants.refused(_metrics, folder)
    assert not said or "metrics.jsonl" in said
    if said:  # what cannot be read stays as it is
        assert (folder / "metrics.jsonl").read_bytes().startswith(raw[:1])
    progress.last_step(folder)


@mutants.cases(100)
@given(raw=mutants.of_bytes(b"400\n"))
def test_a_last_step_that_is_none_is_one_line(folder, raw):
    (folder / "DONE").write_bytes(raw)
    mutants.refused(Run(folder).done_step)


@pytest.fixture(scope="module")
def going(tmp_path_factory):
    """Return the folder of a run that goes on."""
    return folders.run(tmp_path_factory.mktemp("runs") / "going")


def _told(going):
    """Read where a run is, and draw what came of it, refused or not."""
    said = mutants.refused(status.read, going)
    _, row, last = status.lines([status.seen(going)])
    assert row.isprintable() and len(row) < 400
    assert ("unreadable" in last) == bool(said)
    return said


TOLD = {
    "config.json": json.dumps(RECORD).encode(),
    "metrics.jsonl": _lines([*ROWS, *folders.rows(3)]),
    "events.jsonl": _lines(folders.EVENTS),
    "exits/0": b"75\n",
    "FAILED": b"UserError: it is full\n",
}


def test_a_run_that_tells_what_is_right_is_taken(going):
    tally = mutants.Tally()
    for name, raw in TOLD.items():
        (going / name).write_bytes(raw)
        tally.add(_told(going))
    assert (tally.refused, tally.taken) == (0, len(TOLD))


@mutants.cases(700)
@given(data=st.data(), name=st.sampled_from(sorted(TOLD)))
def test_a_run_that_tells_nonsense_is_one_line(going, data, name):
    raw = data.draw(mutants.of_bytes(TOLD[name]))
    try:
        (going / name).write_bytes(raw)
        _told(going)
    finally:
        (going / name).write_bytes(TOLD[name])


@mutants.cases(500)
@given(
    record=mutants.of_value(folders.RECORD),
    metrics=mutants.of_value(folders.rows(3)),
    events=mutants.of_value(folders.EVENTS),
)
def test_a_run_whose_numbers_lie_is_one_line(going, record, metrics, events):
    for name in ("exits/0", "FAILED"):
        (going / name).unlink(missing_ok=True)
    (going / "config.json").write_text(json.dumps(record))
    (going / "metrics.jsonl").write_bytes(_lines(_listed(metrics)))
    (going / "events.jsonl").write_bytes(_lines(_listed(events)))
    _told(going)


TABLE = [runfolders.row("a", 20), runfolders.row("a", 40, parent_id="b")]
PLANS = [
    {"name": "000-a", "hash": "0" * 16, "parent": "", "budget_flops": 1e9,
     "replicate": 0, "role": "run"},
    {"name": "001-b", "hash": "1" * 16, "parent": "000-a", "budget_flops": None,
     "replicate": 1, "role": "branch"},
]  # fmt: skip


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """Return a folder of a sweep with one run that left rows."""
    folder = tmp_path_factory.mktemp("swept")
    runfolders.run(folder / "runs" / "000-a", TABLE)
    (folder / "sweep.jsonl").write_bytes(_lines(PLANS))
    return folder


def test_a_sweep_that_is_right_is_read(swept):
    assert len(rows.collect(swept).rows) == 2
    (swept / "sweep.json").write_text('{"sweep": {}}')
    assert [one["name"] for one in workdir.read(swept)[1]] == ["000-a", "001-b"]


@mutants.cases(400)
@given(table=st.one_of(mutants.of_value(TABLE), mutants.of_bytes(_lines(TABLE))))
def test_a_table_that_lies_is_one_line(swept, table):
    file = swept / "runs" / "000-a" / "table.jsonl"
    raw = table if isinstance(table, bytes) else _lines(_listed(table))
    file.write_bytes(raw)
    try:
        mutants.refused(_written, swept)
        mutants.refused(cells.read, file)
    finally:
        file.write_bytes(_lines(TABLE))


def _listed(value):
    return value if isinstance(value, list) else [value]


def _written(folder):
    rows.write(folder, rows.collect(folder).rows)


@mutants.cases(400)
@given(plans=st.one_of(mutants.of_value(PLANS), mutants.of_bytes(_lines(PLANS))))
def test_lines_of_a_sweep_that_lie_are_one_line(swept, plans):
    raw = plans if isinstance(plans, bytes) else _lines(_listed(plans))
    (swept / "sweep.jsonl").write_bytes(raw)
    (swept / "sweep.json").write_text('{"sweep": {}}')
    mutants.refused(_written, swept)
    if not mutants.refused(workdir.read, swept):
        for one in workdir.read(swept)[1]:
            path = workdir.run_path(swept, one["name"]).resolve()
            assert path.parent == (swept / "runs").resolve()


@mutants.cases(200)
@given(raw=mutants.of_json({"000-a": {"state": "running", "pid": 7, "loss": None}}))
def test_states_of_a_sweep_that_lie_are_one_line(swept, raw):
    (swept / records.FILE).write_bytes(raw)
    mutants.refused(records.read, swept)


SWEEP = json.loads(
    json.dumps(configfile.load(str(SWEEPS / "tiny_isoflop.py")).to_dict())
)


def test_a_sweep_file_that_is_right_is_taken():
    assert sweep.check(configfile.load(str(SWEEPS / "tiny_isoflop.py")).to_dict())


@mutants.cases(300)
@given(raw=mutants.of_value(SWEEP))
def test_a_sweep_file_that_lies_is_one_line(raw):
    if isinstance(raw, dict):
        mutants.refused(sweep.check, raw)
