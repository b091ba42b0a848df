import json
import pathlib

import pytest

from fm_jax import configfile
from fm_jax.errors import UserError
from fm_jax.sweeps import plans, sweep, workdir
from fm_jax.tables import rows

SWEEPS = pathlib.Path(__file__).parent.parent.parent / "configs" / "sweeps"


def _sweep(name="tiny_isoflop", design=(), base=()):
    raw = configfile.load(str(SWEEPS / f"{name}.py")).to_dict()
    raw["design"] |= dict(design)
    for section, values in dict(base).items():
        raw["base"][section] |= values
    return sweep.check(raw)


def _files(folder):
    return {p.name: p.read_text() for p in folder.iterdir() if p.is_file()}


def test_a_plan_is_read_back_as_it_was_made(tmp_path):
    asked = _sweep("tiny_branches")
    runs = workdir.write(asked, tmp_path / "a")
    record, read = workdir.read(tmp_path / "a")
    again = sweep.check(record["sweep"])
    assert not configfile.difference(again.raw, asked.raw)
    assert [one.hash for one in plans.plan(again)] == [one.hash for one in runs]
    assert read == json.loads(json.dumps([vars(one) for one in runs]))
    assert {"budget_flops", "parent", "replicate"} <= read[0].keys()  # what tables ask


def test_the_same_sweep_leaves_the_folder_as_it_is(tmp_path):
    runs = workdir.write(_sweep(), tmp_path)
    before = _files(tmp_path)
    assert workdir.write(_sweep(), tmp_path) == runs
    assert _files(tmp_path) == before


def test_a_longer_sweep_goes_on_and_keeps_names(tmp_path):
    short = workdir.write(
        _sweep(design={"budgets": (1e11, 8e11), "replicates": 1}), tmp_path
    )
    longer = _sweep(design={"budgets": (1e11, 4e11, 8e11), "replicates": 1})
    runs = workdir.write(longer, tmp_path)
    names = {one.hash: one.name for one in runs}
    assert len(runs) > len(short)
    assert all(names[one.hash] == one.name for one in short)
    lines = (tmp_path / rows.SWEEP_FILE).read_text().splitlines()
    assert [json.loads(line)["index"] for line in lines] == list(range(len(runs)))


def test_another_sweep_is_refused_with_what_differs(tmp_path):
    workdir.write(_sweep(), tmp_path)
    before = _files(tmp_path)
    other = _sweep(base={"optimizer": {"learning_rate": 5e-3}, "log": {"every": 3}})
    with pytest.raises(UserError) as caught:
        workdir.write(other, tmp_path)
    said = str(caught.value)
    assert "--workdir or --out must be this sweep's" in said
    assert "base.optimizer.learning_rate: 0.02 there, 0.005 here" in said
    assert "log.every" not in said
    assert _files(tmp_path) == before


def test_where_only_the_rules_changed_that_is_said(tmp_path):
    workdir.write(_sweep(), tmp_path)
    file = tmp_path / rows.SWEEP_FILE
    first, *rest = file.read_text().splitlines()
    record = json.loads(first) | {"hash": "0"}
    file.write_text("\n".join([json.dumps(record), *rest]) + "\n")
    with pytest.raises(UserError, match="the same config, planned by another version"):
        workdir.planned(_sweep(), tmp_path)


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match=r"must be a sweep or an empty folder; got"):
        workdir.write(_sweep(), tmp_path)
    assert _files(tmp_path) == {"thesis.tex": "mine"}


@pytest.mark.parametrize("name", workdir.FOLDERS)
def test_a_file_where_a_folder_must_be_is_told(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"{name} must be a folder or free to be one"):
        workdir.write(_sweep(), tmp_path)
    assert _files(tmp_path) == {name: "mine"}


def test_a_folder_without_a_plan_is_no_sweep(tmp_path):
    with pytest.raises(UserError, match=r"must be a sweep's folder with sweep.json"):
        workdir.read(tmp_path)


def test_what_a_run_took_is_read_from_its_metrics(tmp_path):
    (one, *_) = runs = workdir.write(_sweep(design={"budgets": (1e11,)}), tmp_path)
    run = workdir.run_path(tmp_path, one.name)
    run.mkdir(parents=True)
    told = [
        {"step": 1, "startup/import_seconds": 2.0, "startup/total_seconds": 9.0},
        {
            "step": one.steps,
            "perf/median_tokens_per_second": 1000.0,
            "time/train_seconds": 50.0,
            "time/wait_for_data_seconds": 3.0,
            "time/compile_seconds": 4.0,
            "time/eval_seconds": 1.5,
        },
    ]
    text = "".join(json.dumps(row) + "\n" for row in told)
    (run / "metrics.jsonl").write_text(text)
    assert workdir.finished(tmp_path, runs) == []
    (run / "DONE").write_text(f"{one.steps}\n")
    (found,) = workdir.finished(tmp_path, runs)
    assert found.params == one.params["total"]
    assert found.flops_per_second == 1000 * one.flops_exact / one.tokens
    assert found.overhead_seconds == 7.5  # import, compile, evaluation


def test_plans_of_a_folder_are_those_of_the_sweep_alone(tmp_path):
    assert workdir.planned(_sweep(), tmp_path / "new") == plans.plan(_sweep())
    assert not (tmp_path / "new").exists()
