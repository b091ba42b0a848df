"""Real runs that are asked to stop, or hang, or lose a process."""

import os
import signal
import socket
import subprocess
import time

import numpy as np
import pytest

from fm_jax import events
from fm_jax.checkpoints import Checkpoints
from fm_jax.runs import Run

SLOW = "--config.eval.max_batches=0"  # every held-out text at each evaluation
# What differs between two runs of the same bits.
OF_TIME = ("run/", "perf/", "time/", "startup/", "memory/", "compile/", "predicted/")


def _until(child: subprocess.Popen, seen, seconds: float = 120) -> None:
    """Wait until `seen()`; the child must live as long."""
    deadline = time.monotonic() + seconds
    while not seen():
        assert child.poll() is None, child.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _happened(run: Run, event: str) -> bool:
    return any(row["event"] == event for row in events.read(run))


def _reached(run: Run, step: int) -> bool:
    return any(row["step"] >= step for row in run.rows() if "train/loss" in row)


def _lines(run: Run) -> list[dict]:
    """Return what a run measured, without what its clock and machine did."""
    found = []
    for row in run.rows():
        kept = {k: v for k, v in row.items() if not k.startswith(OF_TIME)}
        if len(kept) > 1:
            found.append(kept)
    return found


def _digests(run: Run, step: int) -> dict[str, int]:
    saved = Checkpoints(run.checkpoints)
    found = saved.digests(step)
    saved.close()
    return found


@pytest.fixture(scope="module")
def long(tiny, fm, tmp_path_factory) -> tuple[list[str], Run]:
    """Return flags of a run long enough to be caught, and the undisturbed run."""
    flags = ["--config.train.steps=400", "--config.checkpoint.every=100",
             "--config.eval.every=150"]  # fmt: skip
    run = Run(tmp_path_factory.mktemp("undisturbed") / "run")
    done = fm("train", *tiny, *flags, f"--workdir={run.path}")
    assert done.returncode == 0, done.stderr
    return flags, run


@pytest.mark.slow
def test_a_run_that_is_asked_to_stop_saves_and_goes_on_with_the_same_bits(
    start, long, tmp_path
):
    """Fault 2, stopping: SIGTERM comes between two steps.

    Promise: the run saves, exits 75, and the same command ends it with the same bits.
    """
    flags, whole = long
    run = Run(tmp_path / "run")
    child = start(run.path, *flags)
    _until(child, lambda: _reached(run, 120))
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 75, err
    assert "stopped as asked, saved at step" in err
    assert (run.path / "exits" / "0").read_text() == "75\n"
    assert not (run.path / "FAILED").exists()
    assert events.read(run)[0]["event"] == "start"
    assert events.read(run)[-1]["status"] == 75
    child = start(run.path, *flags)
    _, err = child.communicate(timeout=120)
    assert child.returncode == 0, err
    assert "Going on from step" in err and "goodput" in err
    assert (run.path / "exits" / "0").read_text() == "0\n"
    assert _lines(run) == _lines(whole)
    assert _digests(run, 400) == _digests(whole, 400) != {}


@pytest.mark.slow
def test_a_run_that_is_asked_to_stop_within_a_save_ends_it(start, long, tmp_path):
    """Fault 6, stopping: SIGTERM comes while a checkpoint is being written.

    Promise: that save is finished, a newer one is made, and both are whole.
    """
    run = Run(tmp_path / "run")
    child = start(run.path, *long[0])
    _until(child, lambda: _happened(run, "save"))
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 75, err
    saved = Checkpoints(run.checkpoints)
    first, *rest = saved.steps()
    assert first == 100 and len(rest) <= 1
    assert all(saved.check(step) for step in saved.steps())
    saved.close()


@pytest.mark.slow
def test_a_run_stops_within_an_evaluation_and_makes_up_for_it(
    start, fm, tiny, tmp_path
):
    """Fault 3, stopping: SIGTERM comes within an evaluation.

    Promise: the run leaves it, saves, exits 75; the next start evaluates that step.
    """
    folder = tmp_path / "corpus"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(2):
        letters = rng.integers(97, 123, 1_500_000, np.uint8)
        (folder / f"{index}.txt").write_bytes(letters.tobytes())
    flags = [f"--config.data.paths=('{folder}',)", "--config.data.eval_fraction=0.5",
             "--config.train.steps=12", "--config.sample.num_tokens=0"]  # fmt: skip
    run = Run(tmp_path / "run")
    child = start(run.path, *flags, SLOW)
    _until(child, lambda: _reached(run, 10))
    time.sleep(0.5)
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 75, err
    assert "saved at step 10" in err
    assert not run.series("eval/loss")[0]
    short = "--config.eval.max_batches=3"  # how much is read is no matter here
    done = fm("train", *tiny, *flags, short, f"--workdir={run.path}")
    assert done.returncode == 0, done.stderr
    assert run.series("eval/loss")[0] == [10, 12]
    assert run.series("train/loss")[0] == list(range(1, 13))


@pytest.mark.slow
def test_a_run_stops_before_its_first_step(start, fm, tiny, tmp_path):
    """Fault 3, stopping: SIGTERM comes while programs compile.

    Promise: exit 75 once the compiler returns, with nothing to save.
    """
    run = Run(tmp_path / "run")
    cold = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    child = start(run.path, **cold)
    _until(child, lambda: _happened(run, "start"))
    time.sleep(0.2)
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 75, err
    assert "before the first step" in err
    assert not run.series("train/loss")[0]
    done = fm("train", *tiny, f"--workdir={run.path}")
    assert done.returncode == 0, done.stderr


# ---- several processes


def _pair(start, run, *flags, **extra) -> list[subprocess.Popen]:
    """Start the two processes of a run."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = [f"--coordinator=localhost:{port}", "--num_processes=2",
              "--config.mesh.preset=fsdp", "--config.model.mlp_dim=32",
              "--config.train.steps=3000", "--config.checkpoint.every=0",
              "--config.eval.every=0"]  # fmt: skip
    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    return [
        start(run.path, *common, *flags, f"--process_id={index}", **devices, **extra)
        for index in range(2)
    ]


def _statuses(run: Run) -> dict[str, str]:
    folder = run.path / "exits"
    return {path.name: path.read_text().strip() for path in folder.iterdir()}


@pytest.mark.slow
def test_all_processes_stop_at_one_step_when_one_is_asked(start, tmp_path):
    """Fault 1, stopping: SIGTERM comes to one of several processes.

    Promise: all stop at one common step, save it together and exit 75.
    """
    run = Run(tmp_path / "run")
    pair = _pair(start, run)
    _until(pair[0], lambda: _reached(run, 20))
    pair[1].send_signal(signal.SIGTERM)
    said = [child.communicate(timeout=120)[1] for child in pair]
    assert [child.returncode for child in pair] == [75, 75], said
    assert _statuses(run) == {"0": "75", "1": "75"}
    steps = [err.split("saved at step ")[1].split(".")[0] for err in said]
    assert steps[0] == steps[1]
    saved = Checkpoints(run.checkpoints)
    assert saved.steps() == [int(steps[0])]
    saved.check(int(steps[0]))
    saved.close()


@pytest.mark.slow
def test_a_process_whose_peer_freezes_says_where_it_waits_and_ends(start, tmp_path):
    """Fault 26, processes: one process freezes and the others wait for it.

    Promise: after --hang seconds they say who was last heard of when, and exit 85.
    """
    run = Run(tmp_path / "run")
    pair = _pair(start, run, "--hang=8")
    _until(pair[0], lambda: _reached(run, 20))
    os.kill(pair[1].pid, signal.SIGSTOP)
    try:
        _, err = pair[0].communicate(timeout=90)
    finally:
        pair[1].kill()
    assert pair[0].returncode == 85, err
    assert "hung" in err and "; process 1 gave" in err
    assert "loop.py" in (run.path / "stacks-0.txt").read_text()
    assert _statuses(run)["0"] == "85"


@pytest.mark.slow
def test_a_process_whose_peer_is_killed_does_not_wait_for_it(start, tmp_path):
    """Fault 25, processes: one process is killed.

    Promise: the others end within a minute, with 85 or by a signal, to be run again.
    """
    run = Run(tmp_path / "run")
    pair = _pair(start, run)
    _until(pair[0], lambda: _reached(run, 20))
    pair[1].kill()
    pair[0].communicate(timeout=100)
    assert pair[0].returncode == 85 or pair[0].returncode < 0
    assert not run.is_done()
