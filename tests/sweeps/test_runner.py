"""The runner with a script that stands for `fm train`, and once with fm itself."""

import fcntl
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from fm_jax import configfile
from fm_jax.errors import UserError
from fm_jax.sweeps import (
    children,
    costs,
    lines,
    plans,
    progress,
    records,
    runner,
    standing,
    sweep,
    workdir,
)

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
    print("RuntimeError: no luck here")
    sys.exit(1)
elif how == "refused":
    print("step 1\\nfm: config.data.paths must be files; got none. Name some.")
    sys.exit(2)
elif how == "killed":
    print("step 1")
    sys.stdout.flush()
    os.kill(os.getpid(), 9)
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
    monkeypatch.setattr(children, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(costs, "machine_peak", lambda dtype: (1e9, "pretended"))
    monkeypatch.setattr(costs, "gpus", list)

    def run(asked, behave=(), parallel=1):
        monkeypatch.setenv("BEHAVE", json.dumps(dict(behave)))
        said = []
        status = runner.run(
            asked,
            run.folder,
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


def _table(folder):
    _, found = standing.read(folder)
    return progress.table(found)


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
    assert said[0] == "4 of 4 runs ended before"
    assert said[1].startswith("run ")  # the table: nothing is announced again


def test_a_run_that_failed_is_tried_again_on_the_next_start(fake):
    asked = _sweep()
    bad = _names(asked)[1]
    status, said = fake(asked, {bad: "failed"})
    assert status == 1
    assert any(f"{bad} failed" in line and "no luck" in line for line in said)
    assert said[-1] == "4 runs: 3 done, 1 failed"
    assert fake(asked)[0] == 0
    assert [row["name"] for row in _starts(fake)[0]] == [*_names(asked), bad]


def test_what_ended_a_run_is_told_in_a_line(fake):
    asked = _sweep()
    names = _names(asked)
    behave = {names[1]: "failed", names[2]: "killed", names[3]: "refused"}
    told = dict(_failures(fake(asked, behave)[1]))
    assert told == {
        names[1]: "RuntimeError: no luck",
        names[2]: "ended by signal 9",
        names[3]: "config.data.paths must be files; got none. Name some.",
    }
    # An earlier try's reason is not that of the next.
    told = dict(_failures(fake(asked, {names[1]: "silent"})[1]))
    assert told == {names[1]: "exit status 0, no output"}


def _failures(said):
    form = r"\[./4\] (\S+) failed after \S+: (.*); left about .*"
    return [found.groups() for line in said if (found := re.fullmatch(form, line))]


def test_a_mistake_of_all_runs_stops_before_the_second(fake):
    asked = _sweep()
    names = _names(asked)
    with pytest.raises(UserError) as caught:
        fake(asked, {"else": "refused"})
    assert str(caught.value) == (
        "config.base.data.paths must be files; got none. Name some. "
        f"(said {names[0]}; 3 of 4 runs were not started)"
    )
    assert len(_starts(fake)[0]) == 1
    assert fake(asked)[1][-1] == "4 runs: 4 done"


def test_a_run_that_came_to_its_end_apart_shows_nothing_of_its_failure(fake):
    asked = _sweep()
    one = plans.plan(asked)[1]
    fake(asked, {one.name: "failed"})
    path = workdir.run_path(fake.folder, one.name)
    (path / "FAILED").unlink()
    (path / "DONE").write_text(f"{one.steps}\n")
    (line,) = (s for s in _table(fake.folder) if s.startswith(one.name))
    assert line.split() == [one.name, "done", f"{one.steps:,}/{one.steps:,}"]


def test_the_loss_of_a_run_is_read_once(fake):
    asked = _sweep()
    fake(asked)
    for name in _names(asked):
        (workdir.run_path(fake.folder, name) / "metrics.jsonl").unlink()
    assert sum("1.2500" in line for line in _table(fake.folder)) == 4
    assert {r["loss"] for r in records.read(fake.folder).values()} == {1.25}


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
    first, *_ = _names(asked)
    status, _ = fake(asked, {first: "done:0.5"}, parallel=2)
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
    roots = {one.name for one in plans.plan(asked) if not one.parent}
    assert {row["name"] for row in starts[:2]} == roots


@pytest.mark.parametrize("how", ["failed", "diverged"])
def test_a_lost_part_of_a_trunk_blocks_what_is_after_it_alone(fake, how):
    asked = _sweep("branches", sizes=(16,), tokens_per_param=(40.0, 80.0, 120.0))
    first, second, third, *branches = _names(asked)
    status, said = fake(asked, {second: how})
    assert status == 1
    table = _table(fake.folder)
    assert table[1:] == said[-len(table) + 1 :]
    states = {line.split()[0]: line.split()[1] for line in table[1:-1]}
    assert states == {
        first: "done",
        second: how,
        third: "blocked",
        **dict(zip(branches, ("done", "blocked", "blocked"), strict=True)),
    }
    assert any(f"{third} blocked: {second} {how}" in line for line in said)
    if how == "failed":  # and may go on when the trunk does
        assert fake(asked)[0] == 0


def test_a_folder_that_was_moved_is_gone_on_with(fake, tmp_path):
    asked = _sweep("branches", sizes=(16,))
    *others, last = plans.plan(asked)
    fake(asked, {last.name: "failed"})
    fake.folder.rename(tmp_path / "elsewhere")
    fake.folder = tmp_path / "elsewhere"
    status, said = fake(asked)
    assert (status, said[0]) == (0, "3 of 4 runs ended before")
    assert _starts(fake)[0][-1]["from"] == (
        f"{fake.folder}/runs/{last.parent}@{last.branch_step}"
    )
    assert len(others) == 3


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


def test_more_runs_at_once_than_cores_are_refused(fake):
    most = len(os.sched_getaffinity(0))
    with pytest.raises(UserError, match=f"at most the cores of this machine, {most}"):
        fake(_sweep(), parallel=most + 1)
    assert not fake.folder.exists()


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
    with pytest.raises(UserError, match=r"must be a sweep.jsonl or the folder"):
        lines.find(str(fake.folder))
    bad = _names(asked)[2]
    fake(asked, {bad: "failed"})
    table = _table(fake.folder)
    assert table[-1] == "4 runs: 3 done, 1 failed"
    assert sum("1.2500" in line for line in table) == 3
    (line,) = (line for line in table if line.startswith(bad))
    assert "no luck" in line


# ---- stopped and started again, as a process


SCRIPT = """
import json, pathlib, signal, sys
from fm_jax.sweeps import costs, runner, sweep
signal.signal(signal.SIGHUP, signal.SIG_DFL)
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
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
    assert "1 done" in _table(fake.folder)[-1]
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
    assert "1 running" in _table(fake.folder)[-1]
    process.kill()
    process.communicate()
    assert _lives(child)
    status, said = fake(asked)
    assert status == 0
    assert not _lives(child)
    assert any(f"process {child}, of a sweep that was killed" in s for s in said)


def test_a_terminal_that_closes_does_not_stop_what_shall_not_hear_of_it():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with runner._stop_asked():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
def test_a_killed_sweep_of_real_runs_ends_as_one_that_was_not(tmp_path):
    raw = configfile.load(str(SWEEPS / "tiny_branches.py")).to_dict()
    raw["design"] |= {"sizes": (16,), "tokens_per_param": (8.0, 12.0)}
    raw["base"]["train"] |= {"batch_size": 4}
    raw["base"]["synthetic"] |= {"num_tokens": 100_000, "num_eval_tokens": 5_000}
    raw["base"]["data"]["cache_dir"] = str(tmp_path / "cache")
    asked = sweep.check(raw)
    _, trunk, _, branch = plans.plan(asked)
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
    assert said.splitlines()[-1] == "4 runs: 4 done"
    assert (folder / "table.csv").read_text().count("\n") >= 5

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
