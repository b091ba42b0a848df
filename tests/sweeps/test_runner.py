"""The runner with a script that stands for `fm train`, and once with fm itself."""

import fcntl
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

from fm_jax import configfile
from fm_jax.errors import UserError
from fm_jax.sweeps import costs, plans, runner, sweep, workdir

ROOT = pathlib.Path(__file__).parent.parent.parent
SWEEPS = ROOT / "configs" / "sweeps"

# Stands for fm train: says who it is, does what BEHAVE has for the seed of its config,
# and leaves the files that a run leaves. Each start is a line of `starts`.
FAKE = """
import json, os, pathlib, sys, time
given = dict(a[2:].split("=", 1) for a in sys.argv[1:])
config = json.loads(pathlib.Path(given["config"]).read_text())["config"]
run = pathlib.Path(given["workdir"])
behave = json.loads(os.environ["BEHAVE"])
start = {
    "name": run.name, "pid": os.getpid(), "from": config["init"]["from"],
    "cores": sorted(os.sched_getaffinity(0)),
    "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
    "memory": os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION"),
    "began": time.time(),
}
run.mkdir(parents=True, exist_ok=True)
(run / "FAILED").unlink(missing_ok=True)
how = behave.get(run.name, behave.get("else", "done"))
seconds = 0.0
if ":" in how:
    how, seconds = how.split(":")
with open(os.environ["STARTS"], "a") as stream:
    stream.write(json.dumps(start) + "\\n")
steps = config["train"]["steps"]
row = {"step": steps // 2, "train/loss": 3.0}
(run / "metrics.jsonl").write_text(json.dumps(row) + "\\n")
time.sleep(float(seconds))
with open(os.environ["STARTS"], "a") as stream:
    stream.write(json.dumps({"name": run.name, "ended": time.time()}) + "\\n")
if how == "done":
    with open(run / "metrics.jsonl", "a") as stream:
        stream.write(json.dumps({"step": steps, "final/loss": 1.25}) + "\\n")
    (run / "DONE").write_text(f"{steps}\\n")
elif how == "diverged":
    (run / "FAILED").write_text("DivergedError: train/loss must stay finite\\n")
    print("fm: train/loss must stay finite")
    sys.exit(76)
elif how == "failed":
    (run / "FAILED").write_text("RuntimeError: no luck\\n")
    print("RuntimeError: no luck")
    sys.exit(1)
"""


def _sweep(name="grid", **design):
    raw = configfile.load(str(SWEEPS / "tiny_isoflop.py")).to_dict()
    kinds = {
        "grid": {"kind": "grid", "sizes": (16, 24), "tokens": (1e6, 2e6)},
        "branches": {
            "kind": "branches",
            "sizes": (16, 24),
            "tokens_per_param": (40.0, 80.0),
        },
    }
    raw["design"] |= {"budgets": (), "replicates": 1} | kinds[name] | design
    return sweep.check(raw)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Return `run(sweep, behave, ...)`: the exit status, and what was said."""
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    monkeypatch.setenv("STARTS", str(tmp_path / "starts.jsonl"))
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(costs, "machine_peak", lambda dtype: (1e9, "pretended"))
    monkeypatch.setattr(costs, "gpus", list)

    def run(asked, behave=(), parallel=1):
        monkeypatch.setenv("BEHAVE", json.dumps(dict(behave)))
        said = []
        status = runner.run(
            asked,
            tmp_path / "dir",
            parallel=parallel,
            say=said.append,
            train=(sys.executable, str(script)),
            is_terminal=False,
        )
        return status, said

    run.folder = tmp_path / "dir"
    run.script = script
    run.starts = tmp_path / "starts.jsonl"
    return run


def _starts(fake):
    rows = [json.loads(line) for line in fake.starts.read_text().splitlines()]
    return [row for row in rows if "began" in row], {
        row["name"]: row["ended"] for row in rows if "ended" in row
    }


def _names(asked):
    return [one.name for one in plans.plan(asked)]


def test_every_run_is_trained_once_and_in_order(fake):
    asked = _sweep()
    status, said = fake(asked)
    assert status == 0
    assert [row["name"] for row in _starts(fake)[0]] == _names(asked)
    assert said[-1] == "4 runs: 4 done"
    assert any("done after 0:00:0" in line and "loss 1.2500" in line for line in said)
    assert all(
        (fake.folder / "logs" / f"{name}.log").exists() for name in _names(asked)
    )
    for name in _names(asked):
        kept = configfile.load(str(fake.folder / "configs" / f"{name}.json"))
        assert kept.train.steps > 0


def test_the_same_command_again_trains_nothing(fake):
    asked = _sweep()
    fake(asked)
    status, said = fake(asked)
    assert status == 0
    assert len(_starts(fake)[0]) == 4
    assert "4 of 4 runs ended before" in said


def test_a_run_that_failed_is_tried_again_on_the_next_start(fake):
    asked = _sweep()
    bad = _names(asked)[1]
    status, said = fake(asked, {bad: "failed"})
    assert status == 1
    assert any(f"{bad} failed" in line and "no luck" in line for line in said)
    assert said[-1] == "4 runs: 3 done, 1 failed"
    assert fake(asked)[0] == 0
    assert [row["name"] for row in _starts(fake)[0]] == [*_names(asked), bad]


def test_a_run_that_diverged_is_recorded_and_left_alone(fake):
    asked = _sweep()
    bad = _names(asked)[0]
    status, said = fake(asked, {bad: "diverged"})
    assert status == 0
    assert said[-1] == "4 runs: 1 diverged, 3 done"
    assert fake(asked)[0] == 0
    assert len(_starts(fake)[0]) == 4


def test_a_diverged_run_whose_folder_was_taken_away_is_trained_again(fake):
    asked = _sweep()
    bad = _names(asked)[0]
    fake(asked, {bad: "diverged"})
    shutil.rmtree(workdir.run_path(fake.folder, bad))
    assert fake(asked)[1][-1] == "4 runs: 4 done"


def test_a_run_that_ends_without_a_word_is_a_failure(fake):
    status, said = fake(_sweep(), {"else": "silent"})
    assert status == 1
    assert any("exit status 0, no output" in line for line in said)


def test_branches_wait_for_their_trunk_and_begin_from_it(fake):
    asked = _sweep("branches")
    trunk, *_ = _names(asked)
    status, _ = fake(asked, {trunk: "done:0.5"}, parallel=2)
    assert status == 0
    starts, ended = _starts(fake)
    for one in plans.plan(asked):
        (row,) = (row for row in starts if row["name"] == one.name)
        if one.parent:
            assert row["began"] >= ended[one.parent]
            parent = (fake.folder / "runs" / one.parent).absolute()
            assert row["from"] == f"{parent}@{one.branch_step}"
        else:
            assert row["from"] == ""
    names = [row["name"] for row in starts]
    trunks = {one for one in _names(asked) if one.endswith("trunk")}
    assert set(names[:2]) == trunks


@pytest.mark.parametrize(("how", "status"), [("failed", 1), ("diverged", 0)])
def test_branches_of_a_lost_trunk_are_blocked(fake, how, status):
    asked = _sweep("branches")
    trunk = _names(asked)[0]
    found, said = fake(asked, {trunk: how})
    assert found == status
    assert said[-1] == f"6 runs: 1 {how}, 2 blocked, 3 done"
    assert any(f"blocked: {trunk} {how}" in line for line in said)
    table = runner.status(asked, fake.folder)
    assert table[-1] == said[-1]
    if how == "failed":  # and may go on when the trunk does
        assert fake(asked)[0] == 0


def test_runs_at_once_have_cores_of_their_own(fake):
    cores = os.sched_getaffinity(0)
    if len(cores) < 2:
        pytest.skip("one core")
    assert fake(_sweep(), {"else": "done:0.3"}, parallel=2)[0] == 0
    starts, ended = _starts(fake)
    a, b = starts[:2]
    assert b["began"] < ended[a["name"]]
    assert not set(a["cores"]) & set(b["cores"])
    assert set(a["cores"]) | set(b["cores"]) <= cores


def test_runs_at_once_have_gpus_of_their_own(fake, monkeypatch):
    monkeypatch.setattr(costs, "gpus", lambda: [("3", "a"), ("5", "a"), ("7", "a")])
    assert fake(_sweep(), {"else": "done:0.3"}, parallel=2)[0] == 0
    starts, _ = _starts(fake)
    assert {row["gpus"] for row in starts[:2]} == {"3,7", "5"}
    assert starts[0]["memory"] is None


def test_runs_share_a_gpu_where_there_are_too_few(monkeypatch):
    monkeypatch.setattr(costs, "gpus", lambda: [("0", "a")])
    for slot in runner._slots(3):
        assert slot.environment == {
            "CUDA_VISIBLE_DEVICES": "0",
            "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.300",
        }


def test_more_runs_at_once_than_cores_are_refused(fake):
    most = len(os.sched_getaffinity(0))
    with pytest.raises(UserError, match=f"at most the cores of this machine, {most}"):
        fake(_sweep(), parallel=most + 1)
    assert not fake.folder.exists()
    with pytest.raises(UserError, match="--parallel must be >= 1; got 0"):
        fake(_sweep(), parallel=0)


def test_two_sweeps_do_not_run_in_one_folder(fake):
    fake.folder.mkdir()
    with open(fake.folder / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="--workdir must not be in use"):
            fake(_sweep())
    assert not fake.starts.exists()


def test_the_folder_of_another_sweep_is_refused_before_anything_starts(fake):
    fake(_sweep())
    with pytest.raises(UserError, match=r"design\.tokens"):
        fake(_sweep(tokens=(1e6, 3e6)))
    assert len(_starts(fake)[0]) == 4


def test_more_runs_are_added_to_a_folder(fake):
    fake(_sweep())
    longer = _sweep(tokens=(1e6, 2e6, 3e6))
    assert fake(longer)[1][-1] == "6 runs: 6 done"
    assert len(_starts(fake)[0]) == 6


def test_the_status_tells_what_is_done_and_what_waits(fake):
    asked = _sweep()
    with pytest.raises(UserError, match=r"must be a sweep's folder"):
        runner.status(asked, fake.folder)
    bad = _names(asked)[2]
    fake(asked, {bad: "failed"})
    table = runner.status(asked, fake.folder)
    assert table[-1] == "4 runs: 3 done, 1 failed"
    assert sum("1.2500" in line for line in table) == 3
    (line,) = (line for line in table if line.startswith(bad))
    assert "no luck" in line


# ---- stopped and started again, as a process


SCRIPT = """
import json, pathlib, sys
from fm_jax.sweeps import costs, runner, sweep
raw = json.loads(pathlib.Path(sys.argv[1]).read_text())
costs.machine_peak = lambda dtype: (1e9, "pretended")
train = json.loads(sys.argv[3])
try:
    status = runner.run(
        sweep.check(raw), pathlib.Path(sys.argv[2]), parallel=int(sys.argv[4]),
        say=lambda line: print(line, flush=True), is_terminal=False,
        **({"train": train} if train else {}),
    )
except KeyboardInterrupt:
    status = 130
sys.exit(status)
"""


def _process(asked, folder, train, parallel=1, **environment):
    raw = folder.parent / "sweep_raw.json"
    raw.write_text(json.dumps(asked.raw))
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, raw, folder, json.dumps(train), str(parallel)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
    )


def _wait(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


def _lives(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_sweep_that_is_stopped_stops_its_runs_and_goes_on_later(fake, number):
    asked = _sweep()
    names = _names(asked)
    process = _process(
        asked,
        fake.folder,
        [sys.executable, str(fake.script)],
        BEHAVE=json.dumps({names[1]: "done:60"}),
    )
    _wait(lambda: fake.starts.exists() and len(_starts(fake)[0]) == 2)
    child = _starts(fake)[0][1]["pid"]
    os.kill(process.pid, number)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "4 runs: 1 done, 3 waiting. Stopped; the same command goes on." in said
    assert not _lives(child)
    assert "1 done" in runner.status(asked, fake.folder)[-1]
    assert fake(asked)[0] == 0
    assert [row["name"] for row in _starts(fake)[0]] == [*names[:2], *names[1:]]


def test_what_a_killed_sweep_left_running_is_ended_first(fake):
    asked = _sweep()
    names = _names(asked)
    process = _process(
        asked,
        fake.folder,
        [sys.executable, str(fake.script)],
        BEHAVE=json.dumps({names[0]: "done:60"}),
    )
    _wait(lambda: fake.starts.exists() and len(_starts(fake)[0]) == 1)
    child = _starts(fake)[0][0]["pid"]
    assert "1 running" in runner.status(asked, fake.folder)[-1]
    process.kill()
    process.communicate()
    assert _lives(child)
    status, said = fake(asked)
    assert status == 0
    assert not _lives(child)
    assert any(f"process {child}, left by a sweep that was killed" in s for s in said)


@pytest.mark.slow
def test_a_killed_sweep_of_real_runs_ends_as_one_that_was_not(tmp_path):
    raw = configfile.load(str(SWEEPS / "tiny_branches.py")).to_dict()
    raw["design"] |= {"sizes": (16,), "tokens_per_param": (12.0,)}
    raw["base"]["train"] |= {"batch_size": 4}
    raw["base"]["synthetic"] |= {"num_tokens": 100_000, "num_eval_tokens": 5_000}
    raw["base"]["data"]["cache_dir"] = str(tmp_path / "cache")
    asked = sweep.check(raw)
    trunk, branch = plans.plan(asked)
    folder = tmp_path / "dir"
    quick = {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache" / "jax"),
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }

    process = _process(asked, folder, [], **quick)
    checkpoints = workdir.run_path(folder, trunk.name) / "checkpoints"
    metrics = workdir.run_path(folder, branch.name) / "metrics.jsonl"
    _wait(metrics.exists, 200)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 130
    saved = {int(p.name) for p in checkpoints.iterdir() if p.name.isdigit()}
    assert branch.branch_step in saved

    process = _process(asked, folder, [], **quick)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert said.splitlines()[-1] == "2 runs: 2 done"
    assert (folder / "table.csv").read_text().count("\n") >= 3

    # The same length in one go, at the same rates: what a branch is said to equal.
    config = {section: dict(keys) for section, keys in branch.config.items()}
    config["init"] |= {"from": "", "optimizer": False}
    (tmp_path / "whole.json").write_text(json.dumps({"config": config}))
    subprocess.run(
        [
            *runner.TRAIN,
            f"--config={tmp_path / 'whole.json'}",
            f"--workdir={tmp_path / 'whole'}",
        ],
        check=True,
        capture_output=True,
        cwd=ROOT,
        env=os.environ | quick,
    )
    ends = []
    for run in (tmp_path / "whole", workdir.run_path(folder, branch.name)):
        text = (run / "metrics.jsonl").read_text()
        rows = [json.loads(line) for line in text.splitlines()]
        ends.append(next(row["final/loss"] for row in rows if "final/loss" in row))
    assert ends[0] == ends[1]
