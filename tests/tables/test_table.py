"""Points: what is taken from a table, what is left out, and what is refused."""

import hashlib
import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fm_jax.errors import UserError
from fm_jax.tables import rows, table
from tests.tables import runfolders
from tests.tables.runfolders import row

ROOT = Path(__file__).parent.parent.parent
DATA = ROOT.parent / "shared" / "data" / "scaling"
COLUMNS = ("params", "tokens", "loss", "flops")
TABLE = """params,tokens,loss,lr,seed
1000000,20000000,3.5,0.001,0
2000000,40000000,3.25,0.002,0
3000000,60000000,3.125,,1
"""


def _csv(tmp_path, text=TABLE):
    file = tmp_path / "runs.csv"
    file.write_text(text)
    return file


def _refused(said, path, **options):
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        table.read(path, **options)
    assert "\n" not in str(caught.value)


def _same(one, other):
    for name in (*COLUMNS, "budget"):
        assert getattr(one, name).tobytes() == getattr(other, name).tobytes()
        assert getattr(one, name).dtype == np.float64
    for name in ("cluster", "run", "is_final"):
        assert getattr(one, name).tolist() == getattr(other, name).tolist()
    assert list(one.extra) == list(other.extra)
    for name, column in one.extra.items():
        assert column.tobytes() == other.extra[name].tobytes()


# ---- anybody's table


def test_three_columns_are_enough(tmp_path):
    file = _csv(tmp_path)
    points = table.read(file)
    assert points.params.tolist() == [1e6, 2e6, 3e6]
    assert points.loss.tolist() == [3.5, 3.25, 3.125]
    assert points.flops.tolist() == [1.2e14, 4.8e14, 1.08e15]
    assert points.is_final.all()
    assert len(set(points.cluster)) == len(set(points.run)) == len(points) == 3
    assert np.isnan(points.budget).all()
    assert list(points.extra) == ["lr", "seed"]
    assert math.isnan(points.extra["lr"][2])
    record = points.record
    assert record["sha256"] == hashlib.sha256(TABLE.encode()).hexdigest()
    assert (record["rows_read"], record["rows"], record["format"]) == (3, 3, None)
    assert (record["count"], record["flops"], record["counts"]) == (
        "as given",
        "6ND",
        [],
    )
    assert json.loads(json.dumps(record)) == record


@pytest.mark.parametrize(
    "mapping",
    ["params=N,tokens=D", ("params=N", "tokens=D"), ["params = N , tokens=D", ""]],
)
def test_columns_are_taken_under_other_names(tmp_path, mapping):
    other = TABLE.replace("params,tokens", "N,D")
    points = table.read(_csv(tmp_path, other), mapping=mapping)
    assert points.tokens.tolist() == [2e7, 4e7, 6e7]
    assert points.record["mapping"] == {"params": "N", "tokens": "D"}
    assert "N" not in points.extra


def test_names_can_be_exchanged_and_a_column_overruled(tmp_path):
    file = _csv(tmp_path, "params,tokens,loss,body\n9e6,3e5,3,2e5\n8e6,2e5,4,1e5\n")
    points = table.read(file, mapping="params=tokens,tokens=params")
    assert points.params.tolist() == [3e5, 2e5]
    assert points.tokens.tolist() == [9e6, 8e6]
    assert table.read(file, mapping="params=body").params.tolist() == [2e5, 1e5]


def test_flops_are_the_tables_own_where_it_has_them(tmp_path):
    text = "params,tokens,loss,flops\n1e6,2e7,3,1e14\n2e6,4e7,3,5e14\n"
    file = _csv(tmp_path, text)
    points = table.read(file)
    assert points.flops.tolist() == [1e14, 5e14]
    assert points.record["flops"] == "column"
    assert points.record["notes"] == ["flops are 0.833 to 1.04 times 6*params*tokens"]
    points = table.read(file, flops="6nd")
    assert points.flops.tolist() == [1.2e14, 4.8e14]
    assert (points.record["flops"], points.record["notes"]) == ("6ND", [])
    _refused("must have the columns flops", _csv(tmp_path), flops="exact")


@pytest.mark.parametrize("name", ["isoflop_{}", "{}", "isoFLOPs-{}"])
def test_groups_called_by_their_budget_are_budgets(tmp_path, name):
    lines = [
        f"1e6,2e7,{3 + i},{name.format(b)}" for i, b in enumerate(["1e15", "6.5e18"])
    ]
    lines.append("1e6,2e7,6,none")
    points = table.read(_csv(tmp_path, "\n".join(["params,tokens,loss,group", *lines])))
    assert points.budget[:2].tolist() == [1e15, 6.5e18]
    assert math.isnan(points.budget[2])
    assert len(set(points.cluster)) == 3


def test_other_groups_are_clusters_and_a_budget_has_its_own_column(tmp_path):
    text = "params,tokens,loss,group,budget\n1e6,2e7,3,1,1e15\n"
    text += "1e6,2e7,4,1,\n1e6,2e7,5,2,\n"
    points = table.read(_csv(tmp_path, text))
    assert points.cluster.tolist() == ["1", "1", "2"]
    assert points.budget[0] == 1e15
    assert np.isnan(points.budget[1:]).all()


def test_a_group_that_all_rows_share_clusters_nothing(tmp_path):
    text = "params,tokens,loss,group\n1e6,2e7,3,x\n1e6,2e7,4,x\n1e6,2e7,5,y\n"
    points = table.read(_csv(tmp_path, text), exclude="group=y")
    assert len(set(points.cluster)) == 2


def test_rows_of_one_run_are_resampled_together(tmp_path):
    text = "params,tokens,loss,run,is_final\n1e6,2e7,3,x,False\n1e6,3e7,2,x,True\n"
    text += "1e6,2e7,3,y,1\n"
    points = table.read(_csv(tmp_path, text), curves=True)
    assert points.run.tolist() == points.cluster.tolist() == ["x", "x", "y"]
    assert points.is_final.tolist() == [False, True, True]
    assert table.read(_csv(tmp_path, text)).loss.tolist() == [2, 3]


def test_conditions_leave_rows_out_and_are_counted(tmp_path):
    points = table.read(_csv(tmp_path), exclude=("seed=1", "loss>3.4", "lr<0"))
    assert points.params.tolist() == [2e6]
    assert points.record["excluded"] == {"seed=1": 1, "loss>3.4": 1, "lr<0": 0}
    assert points.record["notes"] == ["exclude lr<0 met no row that was left"]
    for condition, kept in [
        ("seed!=0", 2),
        ("lr<0.0015", 2),
        ("lr>=0.001", 1),
        ("loss<=3.125", 2),
        ("lr=", 2),
        ("lr=.001,seed=1", 1),
        ("flops>4e14", 1),
    ]:
        assert len(table.read(_csv(tmp_path), exclude=condition)) == kept


def test_a_comma_may_stand_in_what_is_compared(tmp_path):
    text = 'params,tokens,loss,note\n1e6,2e7,3,"a,b"\n1e6,2e7,4,c\n'
    points = table.read(_csv(tmp_path, text), exclude=["note=a,b"])
    assert points.record["excluded"] == {"note=a,b": 1}


def test_a_bad_row_may_be_excluded(tmp_path):
    file = _csv(tmp_path, TABLE + "4000000,80000000,nan,,2\n")
    _refused("loss must be a number; got nan at line 5 of", file)
    assert len(table.read(file, exclude="seed=2")) == 3


def test_duplicates_are_refused_dropped_or_kept(tmp_path):
    file = _csv(tmp_path, TABLE + "1000000,20000000,3.5,0.004,0\n" * 5)
    _refused("of earlier rows again at line 5, line 6, line 7 and 2 more.", file)
    points = table.read(file, duplicates="drop")
    assert points.loss.tolist() == [3.5, 3.25, 3.125]
    assert points.record["notes"] == ["5 duplicate rows left out"]
    assert len(table.read(file, duplicates="keep")) == 8
    # Another seed may come to the same rounded loss.
    assert (
        len(table.read(_csv(tmp_path, TABLE + "1000000,20000000,3.5,0.001,7\n"))) == 4
    )


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("1e6,2e7,0", "loss must be above 0 nats per token; got 0 at line 3 of"),
        ("1e6,2e7,-1", "loss must be above 0 nats per token; got -1 at line 3"),
        ("1e6,2e7,", "loss must be a number; got nothing at line 3"),
        ("1e6,2e7,inf", "loss must be a number; got inf at line 3"),
        ("0.125,2e7,3", "params must be at least 1 (not in millions); got 0.125"),
        ("-5,2e7,3", "params must be at least 1 (not in millions); got -5"),
        ("1M,2e7,3", "params must be a number; got 1M at line 3"),
        ('"1,000",2e7,3', "params must be a number; got 1,000 at line 3"),
        (f"1{'0' * 400},2e7,3", "params must be a number; got 1000000"),
        ("7e10,1400,3", "tokens must be at least params / 1000 (not in billions); got"),
        ("7e10,-5,3", "tokens must be at least params / 1000"),
    ],
)
def test_what_cannot_be_is_refused_with_its_place(tmp_path, line, said):
    _refused(said, _csv(tmp_path, f"params,tokens,loss\n1e6,2e7,3.5\n{line}\n"))


def test_a_budget_or_flops_that_cannot_be_is_refused(tmp_path):
    head = "params,tokens,loss,{}\n1e6,2e7,3.5,-1\n"
    _refused("budget must be a number above 0, or empty; got -1 at line 2",
             _csv(tmp_path, head.format("budget")))  # fmt: skip
    _refused("flops must be above 0; got -1", _csv(tmp_path, head.format("flops")))
    _refused("is_final must be true or false; got -1",
             _csv(tmp_path, head.format("is_final")))  # fmt: skip


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ("70,1400", ["flops are below 1e9: are params and tokens in millions?"]),
        ("7000,1400", ["flops are below 1e9: are params and tokens in millions?"]),
        ("70,1.4e9", ["params are below 1000: are they in millions?"]),
        ("7000,1.4e5", []),
    ],
)
def test_units_that_are_rarely_meant_are_doubted(tmp_path, sizes, said):
    points = table.read(_csv(tmp_path, f"params,tokens,loss\n{sizes},2\n"))
    assert points.record["notes"] == said


def test_a_table_with_counts_alone_has_the_one_that_is_asked_for(tmp_path):
    text = "params_total,params_matmul,tokens,loss\n9e6,7e6,2e8,3\n"
    file = _csv(tmp_path, text)
    for count, params in (("total", 9e6), ("matmul", 7e6)):
        points = table.read(file, count=count)
        assert points.params.tolist() == [params]
        assert points.record["count"] == count
        assert points.record["counts"] == ["total", "matmul"]
    file = _csv(tmp_path, text.replace("params_total", "params"))
    assert table.read(file).record["count"] == "as given"
    assert table.read(file, count="matmul").params.tolist() == [7e6]
    file = _csv(tmp_path, text.replace("params_total", "size"))
    _refused("--map=params=size", file)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"count": "totl"}, "count must be one of the known names; got 'totl'. Did"),
        ({"flops": "6n"}, "flops must be one of the known names; got '6n'."),
        ({"duplicates": "no"}, "duplicates must be one of the known names"),
        ({"count": "matmul"}, "must have the columns params_matmul; got params"),
        ({"mapping": "params"}, "a mapping must be params=COLUMN; got 'params'."),
        ({"mapping": "params>lr"}, "a mapping must be NAME=COLUMN, once a name; got"),
        ({"mapping": "loss=lr,loss=lr"}, "a mapping must be NAME=COLUMN, once a name"),
        ({"mapping": "parms=lr"}, "a mapped name must be one of the known names; got"),
        ({"mapping": "params=M"}, "runs.csv must be one of the known names; got 'M'."),
        ({"mapping": "params=lr", "count": "matmul"}, "count must be total where"),
        ({"exclude": "loss"}, "exclude must be COLUMN=VALUE, !=, > or <; got 'loss'."),
        ({"exclude": "los>3"}, "got 'los'. Did you mean 'loss'?"),
        ({"exclude": "loss>x"}, "exclude must compare loss with a number; got 'x'."),
        ({"exclude": "loss=x"}, "exclude must compare loss with a number; got 'x'."),
        ({"exclude": "loss>0"}, "got none left after loss>0."),
    ],
)
def test_options_that_cannot_be_are_refused(tmp_path, options, said):
    _refused(said, _csv(tmp_path), **options)


# ---- the run table


def test_a_sweep_gives_its_finished_runs(tmp_path):
    runfolders.sweep(tmp_path)
    points = table.read(tmp_path)
    assert points.run.tolist() == ["a", "b", "c", "c-again"]
    assert points.params.tolist() == [3000, 5000, 7000, 13000]
    assert points.loss.tolist() == [3.25, 3.125, 3.0, 2.875]
    assert points.budget.tolist() == [1e15, 2e15, 4e15, 4e15]
    assert points.flops.tolist() == (6 * points.params * points.tokens).tolist()
    assert points.extra["replicate"].tolist() == [0, 0, 0, 1]
    assert np.isnan(points.extra["bayes_loss"]).tolist() == [True, False, True, True]
    record = points.record
    assert record["diverged"] == ["blown"]
    assert record["failed"] == ["stopped"]
    assert (record["running"], record["unstarted"]) == (2, 1)  # the trunk, waiting
    assert (record["rows_read"], record["rows"], record["format"]) == (10, 4, 1)
    assert record["counts"] == ["total", "non_embedding", "matmul"]
    names = ("a", "b", "blown", "c", "c-again", "stopped", "trunk")
    read = b"".join((tmp_path / "runs" / n / "table.jsonl").read_bytes() for n in names)
    assert record["sha256"] == hashlib.sha256(read).hexdigest()
    assert json.loads(json.dumps(record)) == record


def test_branches_are_resampled_with_their_trunk_and_replicates_apart(tmp_path):
    runfolders.sweep(tmp_path)
    points = table.read(tmp_path, curves=True)
    clusters = dict(zip(points.run, points.cluster, strict=True))
    assert clusters["a"] == clusters["b"] == clusters["trunk"] == "trunk"
    assert clusters["c"] != clusters["c-again"]


def test_a_branch_of_a_branch_belongs_to_the_trunk_even_if_that_is_not_there(tmp_path):
    parents = {"a": "gone", "b": "a", "c": None}
    for name, parent in parents.items():
        runfolders.run(tmp_path / name, [row(name, 40, parent_id=parent)])
    assert table.read(tmp_path).cluster.tolist() == ["gone", "gone", "c"]


def test_curves_keep_all_rows_but_those_that_diverged(tmp_path):
    runfolders.sweep(tmp_path)
    points = table.read(tmp_path, curves=True)
    assert points.run.tolist() == [
        "a", "a", "b", "blown", "c", "c-again", "stopped", "trunk", "trunk"
    ]  # fmt: skip
    assert points.is_final.sum() == 4
    assert points.extra["step"].tolist() == [30, 40, 40, 10, 40, 40, 10, 20, 30]


def test_a_result_from_before_a_longer_run_diverged_holds(tmp_path):
    made = [row("a", 40, loss=3.0), row("a", 50, steps=80)]
    made += [row("a", 70, steps=80), row("a", 60, steps=80, status="diverged")]
    runfolders.run(tmp_path / "a", made, FAILED="DivergedError: nan")
    points = table.read(tmp_path)
    assert points.loss.tolist() == [3.0]
    assert points.record["diverged"] == ["a"]
    points = table.read(tmp_path, curves=True)
    assert points.extra["step"].tolist() == [40, 50]


def test_a_run_that_went_on_after_it_diverged_is_no_longer_diverged(tmp_path):
    made = [
        row("a", 10),
        row("a", 30, loss=9.0),
        row("a", 35, status="diverged", loss=None),
    ]
    made += [row("a", 20), row("a", 30, loss=4.0), row("a", 40, loss=3.75)]
    runfolders.run(tmp_path / "a", made)
    points = table.read(tmp_path, curves=True)
    assert points.record["diverged"] == []
    assert points.extra["step"].tolist() == [10, 20, 30, 40]
    assert points.loss.tolist() == [3.5, 3.5, 4.0, 3.75]


def test_a_folder_of_runs_without_a_row_is_refused_in_a_line(tmp_path):
    runfolders.run(tmp_path / "a", [])
    with pytest.raises(UserError, match=r"came to its end; got none, but .*1 running"):
        table.read(tmp_path)


def test_the_untrained_model_is_no_point(tmp_path):
    runfolders.run(tmp_path / "a", [row("a", 0, loss=9.0), row("a", 40)])
    points = table.read(tmp_path, curves=True)
    assert points.extra["step"].tolist() == [40]
    assert points.record["notes"] == ["rows of untrained models left out: 1"]


def test_count_and_flops_choose_among_what_the_table_has(tmp_path):
    runfolders.sweep(tmp_path)
    points = table.read(tmp_path, count="non_embedding")
    assert points.params.tolist() == [1800, 3000, 4200, 7800]
    assert points.flops.tolist() == (6 * points.params * points.tokens).tolist()
    assert (points.record["count"], points.record["flops"]) == ("non_embedding", "6ND")
    points = table.read(tmp_path, flops="exact")
    assert points.flops.tolist() == (5.5 * points.params * points.tokens).tolist()
    assert points.record["flops"] == "exact"
    points = table.read(tmp_path, mapping="params=params_head")
    assert points.params.tolist() == [300, 500, 700, 1300]
    assert points.record["count"] == "as given"


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize(
    "options",
    [{}, {"curves": True}, {"count": "matmul"}, {"exclude": "name=c-again"},
     {"exclude": "is_final=true", "curves": True}],
)  # fmt: skip
def test_the_collected_table_gives_what_the_folder_gives(tmp_path, kind, options):
    runfolders.sweep(tmp_path)
    rows.write(tmp_path, rows.collect(tmp_path).rows)
    points = table.read(tmp_path / f"table.{kind}", **options)
    _same(table.read(tmp_path, **options), points)
    assert points.record["diverged"] == ["blown"]
    assert points.record["format"] == 1


def test_one_run_and_its_file_are_tables_too(tmp_path):
    runfolders.run(tmp_path / "a", [row("a", 20), row("a", 40, loss=3.0)])
    _same(table.read(tmp_path / "a"), table.read(tmp_path))
    assert table.read(tmp_path / "a" / "table.jsonl").loss.tolist() == [3.0]


def test_a_newer_table_is_refused(tmp_path):
    rows.write(tmp_path, [row("a", 40)])
    file = tmp_path / "table.csv"
    file.write_text(file.read_text().replace("\n1,a,", "\n2,a,"))
    _refused("must have format 1 of the run table; got 2. Read it with", file)


def test_a_status_that_is_none_is_refused(tmp_path):
    runfolders.run(tmp_path / "a", [row("a", 40) | {"status": "done"}])
    _refused("status must be one of running, final, diverged; got done at step 40 of a",
             tmp_path)  # fmt: skip


def test_a_final_row_without_a_loss_is_told_by_its_run(tmp_path):
    runfolders.run(tmp_path / "a", [row("a", 40, loss=None)])
    _refused("loss must be a number; got nothing at step 40 of a", tmp_path)


def test_a_folder_where_nothing_came_to_its_end_is_told(tmp_path):
    runfolders.sweep(tmp_path)
    for name in ("a", "b", "c", "c-again"):
        (tmp_path / "runs" / name / "table.jsonl").unlink()
    _refused("got none, but 1 diverged, 1 failed, 6 running, 1 unstarted.", tmp_path)


# ---- published tables, and time


def test_the_points_of_chinchilla_without_their_outliers_are_240():
    file = DATA / "chinchilla_epoch.csv"
    if not file.exists():
        pytest.skip(f"{file.name} is not there")
    points = table.read(file, exclude="outlier=1")
    assert len(points) == 240
    assert points.record["excluded"] == {"outlier=1": 5}
    assert len(set(points.budget[np.isfinite(points.budget)])) == 9


def test_the_repeated_rows_of_misfitting_are_seen():
    file = DATA / "misfitting_final.csv"
    if not file.exists():
        pytest.skip(f"{file.name} is not there")
    _refused("must have each result once", file)
    assert len(table.read(file, duplicates="keep")) == 261


def test_five_thousand_rows_take_less_than_a_tenth_of_a_second(tmp_path):
    rng = np.random.default_rng(0)
    numbers = rng.uniform(1, 2, (5000, 3)) * [1e6, 2e7, 1]
    lines = [
        f"{p:.0f},{t:.0f},{y!r},run{i}" for i, (p, t, y) in enumerate(numbers.tolist())
    ]
    file = _csv(tmp_path, "\n".join(["params,tokens,loss,run", *lines]))
    times = []
    for _ in range(3):
        began = time.process_time()
        points = table.read(file)
        times.append(time.process_time() - began)
    assert points.loss.tolist() == numbers[:, 2].tolist()
    assert min(times) < 0.1


def test_reading_imports_nothing_heavy():
    code = "import sys; from fm_jax.tables import table; print([m for m in "
    code += "('jax', 'pandas', 'scipy', 'pyarrow', 'tensorflow') if m in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"
