"""Real runs: what trackers have is what metrics.jsonl has, and no run is disturbed."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from fm_jax import config as configs
from fm_jax.runs import Run
from fm_jax.train.run import train
from tests.trackers import conftest
from tests.trackers.test_board import points as board_points
from tests.train import test_odd
from tests.train.test_odd import settings

SECRETS = {"WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
           "MY_SERVICE_TOKEN": "a-token-of-mine-1234"}  # fmt: skip
__all__ = ["settings"]
# Of a run's config, a value that holds what is secret in the environment.
PROMPT = (
    f"--config.sample.prompt=see https://me:hunter22@a.b/ {SECRETS['MY_SERVICE_TOKEN']}"
)
LOSSES = ("train/loss", "eval/loss", "final/loss", "grads/norm")


def _losses(run):
    return {name: run.series(name) for name in LOSSES}


def _float32(found):
    return {key: float(np.float32(value)) for key, value in found.items()}


@pytest.fixture(scope="module")
def plain(fm, tiny, tmp_path_factory):
    """Return a finished run without --track, and what it took in seconds."""
    run = Run(tmp_path_factory.mktemp("plain") / "run")
    for steps in (20, 20):  # the first fills the caches of compiled programs
        run = Run(run.path.with_name(f"{run.path.name}-again"))
        began = time.monotonic()
        done = fm("train", *tiny, f"--workdir={run.path}")
        seconds = time.monotonic() - began
        assert done.returncode == 0, done.stderr
        assert len(run.series("train/loss")[0]) == steps
    return run, seconds


@pytest.fixture
def trackers():
    """Skip where what --track needs is not installed."""
    reason = "runs --track for real, with the extras wandb and mlflow"
    for name in ("wandb", "mlflow", "sqlalchemy", "alembic"):
        pytest.importorskip(name, reason=reason)


def test_the_event_files_have_every_number_of_metrics_jsonl(plain):
    run, _ = plain
    wanted = conftest.points(run)
    assert len(wanted) > 150 and ("final/loss", 20) in wanted
    assert board_points(run.path / "tensorboard") == _float32(wanted)
    assert len(list((run.path / "tensorboard").iterdir())) == 1
    assert not (run.path / "trackers").exists()
    assert "WARNING" not in (run.path / "log.txt").read_text()


@pytest.mark.slow
def test_after_a_longer_run_goes_on_the_event_files_have_no_ghosts(fm, tiny, tmp_path):
    """It ended at step 10; its closing row goes, and 20 has another."""
    run = Run(tmp_path / "run")
    flags = ["train", *tiny, f"--workdir={run.path}"]
    assert fm(*flags, "--config.train.steps=10").returncode == 0
    assert ("final/loss", 10) in board_points(run.path / "tensorboard")
    done = fm(*flags)
    assert "Going on from step 10" in done.stderr
    wanted = conftest.points(run)
    assert ("final/loss", 10) not in wanted and ("final/loss", 20) in wanted
    assert board_points(run.path / "tensorboard") == _float32(wanted)
    assert len(list((run.path / "tensorboard").iterdir())) == 2


@pytest.mark.slow
def test_after_a_kill_the_event_files_have_what_the_run_kept_and_no_more(
    environment, fm, tiny, tmp_path
):
    run = Run(tmp_path / "run")
    flags = [*tiny, f"--workdir={run.path}", "--config.train.steps=600",
             "--config.checkpoint.every=50", "--config.eval.every=0"]  # fmt: skip
    command = [sys.executable, "-m", "fm_jax.cli", "train", *flags]
    with subprocess.Popen(
        command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    ) as child:
        while not any(row["step"] > 180 for row in run.rows()):
            assert child.poll() is None
            time.sleep(0.01)
        child.kill()
    killed = max(step for _, step in conftest.points(run))
    done = fm("train", *flags)
    assert done.returncode == 0, done.stderr
    (line,) = (x for x in done.stderr.splitlines() if "Going on from step" in x)
    assert int(line.split()[4].replace(",", "")) <= killed
    wanted = conftest.points(run)
    assert len({step for _, step in wanted}) == 600
    assert board_points(run.path / "tensorboard") == _float32(wanted)


def test_what_a_run_leaves_out_when_it_goes_back_is_in_no_event_file(
    settings, tmp_path, monkeypatch
):
    """It goes back from step 33 to 20 within one process."""
    settings["train"] |= {"max_skips": 0, "steps": 40}
    settings["checkpoint"] |= {"every": 20, "keep": 3}
    test_odd._broken(monkeypatch, {33}, np.nan)
    found = train(configs.check(settings), tmp_path / "run", ["fm"], None, 1)
    wanted = conftest.points(found)
    steps = {step for name, step in wanted if name == "train/loss"}
    assert steps == {*range(1, 21), *range(34, 41)}
    assert board_points(found.path / "tensorboard") == _float32(wanted)
    assert len(list((found.path / "tensorboard").iterdir())) == 1
    assert "trackers" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.slow
def test_both_have_what_metrics_jsonl_has_and_go_on_as_one_run(
    fm, tiny, trackers, plain, tmp_path
):
    run = Run(tmp_path / "my run")
    flags = ["train", *tiny, PROMPT, f"--workdir={run.path}",
             "--track=wandb", "--track=mlflow"]  # fmt: skip
    environ = {"WANDB_MODE": "offline"} | SECRETS
    done = fm(*flags, "--config.train.steps=10", **environ)
    assert done.returncode == 0, done.stderr
    first = conftest.points(run)
    done = fm(*flags, **environ)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    assert not subprocess.run(
        ["pgrep", "-f", str(tmp_path)], stdout=subprocess.PIPE, check=False
    ).stdout
    wanted = conftest.points(run)
    both = first | wanted  # neither takes back the first closing row
    # W&B: one id, two starts; the second says from where it went on.
    records = list(conftest.wandb_records(run.path))
    assert conftest.wandb_points(records) == both
    runs = [r.run for r in records if r.WhichOneof("record_type") == "run"]
    assert len({r.run_id for r in runs}) == 1
    assert {(r.project, r.display_name) for r in runs} == {("fm_jax", "my run")}
    assert [r.exit.exit_code for r in records if r.HasField("exit")] == [0, 0]
    # MLflow: one run, found again.
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{run.path}/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'fm_jax'")
    (kept,) = client.search_runs([experiment.experiment_id])
    assert kept.info.status == "FINISHED" and kept.info.run_name == "my run"
    assert kept.data.tags["fm_jax.went_on_from"] == "10"
    assert kept.data.params["train.batch_size"] == "8"
    found = {
        (name, one.step): one.value
        for name in kept.data.metrics
        for one in client.get_metric_history(kept.info.run_id, name)
    }
    assert found == both
    # Neither has a secret, nor says on what machine and how it runs.
    files = [f for f in run.path.rglob("*") if f.is_file()]
    told = [f for f in files if {"wandb", "trackers", "mlflow.db"} & set(f.parts)]
    assert len(told) > 5
    for file in told:
        content = file.read_bytes()
        assert not any(secret.encode() in content for secret in SECRETS.values()), file
        assert b"hunter22" not in content, file
    assert not any(r.HasField("environment") for r in records)


@pytest.mark.slow
@pytest.mark.parametrize("server", ["silent", "refusing"])
def test_a_server_that_does_not_answer_changes_nothing_of_the_run(
    hasty, tiny, trackers, plain, tmp_path, request, server
):
    """Fault 46, around it: a tracker refuses every call, or never answers.

    Promise: one warning; the run has the same losses, exits 0, and ends soon after.
    """
    whole, seconds = plain
    run, url = Run(tmp_path / "run"), request.getfixturevalue(server)
    began = time.monotonic()
    done = hasty(
        "train", *tiny, f"--workdir={run.path}", "--track=wandb", "--track=mlflow",
        WANDB_BASE_URL=url, WANDB_API_KEY=SECRETS["WANDB_API_KEY"],
        MLFLOW_TRACKING_URI=url,
    )  # fmt: skip
    took = time.monotonic() - began
    assert done.returncode == 0, done.stderr
    assert _losses(run) == _losses(whole)
    log = (run.path / "log.txt").read_text()
    for name in ("wandb", "mlflow"):
        assert log.count(f"WARNING: {name} is left out") == 1, log
    assert took < seconds + 60, (took, seconds)  # W&B alone would try for longer
    assert board_points(run.path / "tensorboard") == _float32(conftest.points(run))
    assert (run.path / "DONE").exists() and (run.path / "report.html").exists()


@pytest.mark.slow
def test_a_run_that_is_asked_to_stop_says_so_and_is_not_held_up(
    environment, tiny, trackers, tmp_path
):
    run = Run(tmp_path / "run")
    command = [sys.executable, "-m", "fm_jax.cli", "train", *tiny,
               f"--workdir={run.path}", "--config.train.steps=100000",
               "--config.eval.every=0", "--track=wandb", "--track=mlflow"]  # fmt: skip
    with subprocess.Popen(
        command,
        env=environment | {"WANDB_MODE": "offline"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as child:
        while not any(run.path.glob("wandb/*/*.wandb")):
            assert child.poll() is None
            time.sleep(0.1)
        time.sleep(2)
        os.killpg(child.pid, signal.SIGTERM)  # as a scheduler does, to all at once
        began = time.monotonic()
        _, err = child.communicate(timeout=60)
    assert child.returncode == 75, err
    assert time.monotonic() - began < 15
    assert "left out" not in err, err
    records = list(conftest.wandb_records(run.path))
    assert [r.exit.exit_code for r in records if r.HasField("exit")] == [75]
    assert any(r.HasField("preempting") for r in records)
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{run.path}/mlflow.db")
    (kept,) = client.search_runs(["1"])
    assert kept.info.status == "KILLED"
    assert kept.data.tags["fm_jax.status"] == "preempted"


def test_an_unknown_tracker_is_one_line_and_nothing_begins(fm, tiny, tmp_path):
    done = fm("train", *tiny, f"--workdir={tmp_path / 'run'}", "--track=wanbd")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "--track must be one of the known names; got 'wanbd'" in done.stderr
    assert not (tmp_path / "run").exists()


# Says at the end of `fm train` what it has imported and whether it opened a socket.
LOOKED_AT = """
import json, socket, sys
calls = []
sys.addaudithook(lambda event, args: event in (
    "socket.connect", "socket.bind", "socket.getaddrinfo") and calls.append(event))
from fm_jax import cli
status = cli.main(sys.argv[1:])
found = [m for m in ("wandb", "mlflow", "torch", "tensorflow", "tensorboardX",
                     "tensorboard") if m in sys.modules]
print("FOUND", json.dumps([status, found, calls]))
"""


def test_a_run_without_trackers_imports_none_and_opens_no_socket(
    environment, tiny, tmp_path
):
    command = [sys.executable, "-c", LOOKED_AT, "train", *tiny,
               "--config.train.steps=2", f"--workdir={tmp_path / 'run'}"]  # fmt: skip
    done = subprocess.run(
        command, env=environment, cwd=conftest.ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    (line,) = (x for x in done.stdout.splitlines() if x.startswith("FOUND"))
    assert json.loads(line.removeprefix("FOUND ")) == [0, [], []], done.stderr
