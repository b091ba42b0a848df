"""Tests of fm fit, predict, suggest and sweep as a user calls them."""

import json
import subprocess
import sys

import pytest

from fm_jax import cli
from fm_jax.scaling import files
from tests.scaling import surfaces

FIGURES = {"isoflop", "frontier", "residuals", "contours", "draws", "cut"}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    columns = surfaces.isoflop()
    named = {"N": columns["params"], "D": columns["tokens"], "loss": columns["loss"]}
    return surfaces.write(folder / "stranger.csv", named)


@pytest.fixture(scope="module")
def folder(table):
    out = table.parent / "fit"
    status = cli.main(["fit", f"--runs={table}", f"--out={out}", "--map=params=N",
                       "--map=tokens=D", "--num_bootstraps=300"])  # fmt: skip
    assert status == 0
    return out


def _said(capsys, *argv, status=0):
    assert cli.main(list(map(str, argv))) == status
    printed = capsys.readouterr()
    return printed.err if status else printed.out


# ---- a stranger's table


def test_a_strangers_table_gives_a_whole_report_in_one_command(folder):
    names = {path.name for path in folder.iterdir()}
    assert {f"{name}.png" for name in FIGURES} <= names
    assert {f"{name}.csv" for name in FIGURES} <= names
    assert {"fit.json", "draws.npz", "report.html"} <= names
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(FIGURES)
    assert "http" not in page.replace("http://www.w3.org", "")


def test_fit_json_names_its_results(folder):
    record = json.loads((folder / "fit.json").read_text())
    third = record["approach3"]
    for name in ("E", "A", "B", "alpha", "beta", "a"):
        low, high = third["ci"][name]
        assert low < third[name] < high
    assert third["objective"] > 0
    assert record["approach2"]["a"] + record["approach2"]["b"] == pytest.approx(1)
    assert record["inputs"]["sha256"]
    assert record["options"]["bootstrap"] == "pairs"


def test_nothing_of_a_fit_imports_jax(table, tmp_path):
    code = (
        "import sys; from fm_jax import cli; "
        f"s = cli.main(['fit', '--runs={table}', '--out={tmp_path}', '--map=params=N', "
        "'--map=tokens=D', '--num_bootstraps=100']); "
        "print(s, [m for m in ('jax', 'pandas', 'tensorflow') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "0 []"


def test_json_is_what_is_kept(table, tmp_path, capsys):
    printed = _said(capsys, "fit", f"--runs={table}", f"--out={tmp_path}", "--json",
                    "--map=params=N,tokens=D", "--num_bootstraps=100",
                    "--nofigures")  # fmt: skip
    assert json.loads(printed) == files.load(tmp_path)[0]


# ---- predictions


def test_a_prediction_writes_a_config_that_plans_the_same_run(folder, capsys, tmp_path):
    out = tmp_path / "next.py"
    said = _said(capsys, "predict", f"--fit={folder}", "--flops=1e18", f"--out={out}")
    assert "95 %" in said
    from fm_jax import config, configfile

    checked = config.check(configfile.load(str(out)).to_dict())
    assert checked.train.steps > 0
    assert checked.model.embed_dim > 0


@pytest.mark.parametrize("count", ["total", "non_embedding", "matmul"])
def test_a_prediction_takes_every_count(folder, capsys, tmp_path, count):
    out = tmp_path / "c.py"
    said = _said(capsys, "predict", f"--fit={folder}", "--flops=1e18",
                 f"--count={count}", "--json", f"--out={out}")  # fmt: skip
    assert json.loads(said)["count"] == count


def test_the_same_prediction_may_be_asked_for_again(folder, capsys):
    first = _said(capsys, "predict", f"--fit={folder}", "--flops=2e18")
    assert _said(capsys, "predict", f"--fit={folder}", "--flops=2e18") == first


def test_suggestions_stay_within_their_budget(folder, capsys, tmp_path):
    out = tmp_path / "next.jsonl"
    said = _said(capsys, "suggest", f"--fit={folder}", "--target_flops=1e23", "--json",
                 "--budget_flops=3e20", f"--out={out}")  # fmt: skip
    found = json.loads(said)
    assert found["spent_flops"] <= 3e20
    assert found["sd_after"] < found["sd_before"]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == len(found["runs"])


# ---- mistakes


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["fit", "--runs=nothing.csv"], "nothing.csv"),
        (["fit", "--runs={table}"], "params"),
        (["fit", "--runs={table}", "--map=params=N,tokens=D", "--fix=E"], "--fix must"),
        (["fit", "--runs={table}", "--map=params=N,tokens=D", "--fix=e=1"], "'e'"),
        (["predict", "--fit={folder}"], "flops"),
        (["predict", "--fit={folder}", "--flops=-1"], "flops"),
        (["predict", "--fit={folder}", "--flops=1e20", "--count=all"], "count"),
        (["predict", "--fit=.", "--flops=1e20"], "--fit must be a folder with"),
        (["suggest", "--fit={folder}", "--target_flops=1e23"], "budget_flops"),
        (["sweep", "--config=configs/sweeps/tiny_isoflop.py", "--parallel=0"],
         "--parallel must be >= 1"),
        (["sweep", "--config=configs/sweeps/tiny_isoflop.py", "--mfu=0"],
         "--mfu must be above 0"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_exit_2(table, folder, capsys, argv, said):
    given = [a.format(table=table, folder=folder) for a in argv]
    printed = _said(capsys, *given, status=2)
    assert said in printed
    assert printed.startswith("fm: ")
    assert printed.count("\n") == 1


# ---- sweeps


def test_a_dry_run_shows_every_run_and_what_to_expect(capsys, tmp_path):
    said = _said(capsys, "sweep", "--config=configs/sweeps/tiny_isoflop.py",
                 "--dry_run", f"--workdir={tmp_path / 'none'}")  # fmt: skip
    for word in ("compute", "time", "memory", "disk", "expect"):
        assert f"\n{word} " in said
    assert not (tmp_path / "none").exists()
