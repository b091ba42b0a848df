"""Real runs as fm status tells of them: going, killed, stopped, ended in every way."""

import json
import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from fm_jax import life, status
from fm_jax.runs import Run
from tests import folders

LONG = ("--config.train.steps=100000", "--config.checkpoint.every=1000",
        "--config.eval.every=20", "--config.log.every=2")  # fmt: skip


def _until(child, seen, seconds=120):
    """Wait until `seen()`; the child must live as long."""
    deadline = time.monotonic() + seconds
    while not seen():
        assert child.poll() is None, child.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_a_run_is_told_while_it_goes_when_it_was_killed_and_when_it_stopped(
    start, fm, tmp_path
):
    run = tmp_path / "runs" / "long"
    child = start(run, *LONG)
    _until(child, lambda: status.read(run).state != "waiting")
    assert status.read(run).state == "running"  # from its first moment on
    _until(child, lambda: status.read(run).step >= 60)
    told = fm("status", tmp_path / "runs", "--json")
    assert told.returncode == 0, told.stderr
    found = json.loads(told.stdout)
    assert (found["state"], found["steps"], found["attempts"]) == ("running", 100000, 1)
    assert found["step"] >= 60 and 0 < found["loss"] < 6 and 0 < found["eval_loss"] < 6
    assert found["tokens_per_second"] > 0 and found["mfu"] > 0
    left = (100000 - found["step"]) * 8 * 16 / found["tokens_per_second"]
    assert found["seconds_left"] == pytest.approx(left)
    assert found["heartbeat"] < 6 and 0 < found["goodput"] < 1

    child.kill()
    child.wait()
    for file in (run / "alive" / "0", *run.glob("*.json*")):  # as time goes by
        folders.aged(file, life.LOST_SECONDS + 1)
    found = status.read(run)
    assert (found.state, found.seconds_left) == ("lost", None)
    assert found.why.startswith("its process was killed")

    child = start(run, *LONG)  # goes on, from its first step: nothing was saved
    _until(child, lambda: status.read(run).state == "running")
    _until(child, lambda: status.read(run).step >= 2 and status.read(run).attempts == 2)
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=60) == 75
    found = status.read(run)
    assert (found.state, found.why, found.attempts) == ("stopped", "", 2)

    child = start(run, *LONG)  # what the start before said of its end is gone
    _until(child, lambda: status.read(run).state != "stopped")
    assert status.read(run).state == "running"
    child.send_signal(signal.SIGINT)
    assert child.wait(timeout=60) == 130
    found = status.read(run)
    assert (found.state, found.why) == ("stopped", life.AT_ONCE)


@pytest.mark.slow
def test_watching_ends_by_itself_when_the_run_is_done(start, environment, tmp_path):
    run = tmp_path / "run"
    child = start(run, "--config.train.steps=20")
    _until(child, lambda: status.read(run).state == "running")
    ours, theirs = pty.openpty()
    watcher = subprocess.Popen(
        [sys.executable, "-m", "fm_jax.cli", "status", str(run), "--every=0.3"],
        stdout=theirs,
        env=environment | {"TERM": "xterm"},
    )
    os.close(theirs)
    said = b""
    while watcher.poll() is None:
        try:
            said += os.read(ours, 65_536)
        except OSError:
            break
    assert watcher.wait(timeout=10) == 0
    os.close(ours)
    screens = said.decode().split("loss, nats")
    assert " running " in screens[1] and "1 run: 1 done" in screens[-1]
    assert child.wait(timeout=60) == 0, child.communicate()[1]
    found = status.read(run)
    (final,) = Run(run).series("final/loss")[1]
    assert (found.step, found.eval_loss, found.seconds_left) == (20, final, None)


@pytest.mark.slow
def test_what_ended_a_run_is_told(start, fm, tiny, tmp_path):
    rate = ("--config.optimizer.learning_rate=1e30", "--config.train.max_skips=0")
    diverges = start(tmp_path / "diverges", *rate)
    (tmp_path / "fails" / "tokenizer.json").mkdir(parents=True)  # in the way
    fails = start(tmp_path / "fails")
    refused = start(tmp_path / "refused", "--config.model.num_heads=3")
    ended = [child.wait(timeout=120) for child in (diverges, fails, refused)]
    assert ended == [76, 2, 2]
    assert [
        (one.path.name, one.state, one.why.partition(":")[0])
        for one in map(status.read, status.find([tmp_path]))
    ] == [("diverges", "diverged", "DivergedError"), ("fails", "failed", "UserError")]
    # Before anything is begun there is nothing to tell of.
    told = fm("status", tmp_path / "refused")
    assert told.returncode == 2 and "which is no folder" in told.stderr
