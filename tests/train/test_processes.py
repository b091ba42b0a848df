"""Tests of a run as several real processes, which talk by gloo as hosts would."""

import json
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

from fm_jax import trees
from fm_jax.runs import Run
from fm_jax.train import restore

LAUNCH = pathlib.Path(__file__).parent.parent.parent / "launch" / "local.py"
# Sums over devices are made in another order: float32's last bits, twenty updates on.
LOSS, WEIGHT = {"rtol": 2e-6}, {"rtol": 2e-5, "atol": 2e-6}
# Under a constant rate, half a run is the first half of the whole.
FLAGS = (
    "--config.schedule.name=constant",
    "--config.schedule.warmup_fraction=0",
    "--config.mesh.preset=fsdp",
    "--config.model.mlp_dim=32",
)


@pytest.fixture(scope="module")
def together(environment, tiny):
    """Return `together(count, devices, *flags)`: the finished launch of fm train."""

    def run(count, devices, *flags):
        command = [sys.executable, "-m", "fm_jax.cli", "train", *tiny, *FLAGS, *flags]
        return subprocess.run(
            [
                sys.executable,
                str(LAUNCH),
                f"--processes={count}",
                f"--devices_per_process={devices}",
                *command,
            ],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run


@pytest.fixture(scope="module")
def alone(together, tmp_path_factory) -> Run:
    """Return twenty steps of one process with all eight devices."""
    run = Run(tmp_path_factory.mktemp("runs") / "alone")
    done = together(1, 8, f"--workdir={run.path}")
    assert done.returncode == 0, done.stderr
    return run


def _weights(run: Run) -> dict[str, np.ndarray]:
    found = trees.leaves_by_path(restore.load(run.path, "20").params)
    return {name: np.asarray(leaf) for name, leaf in found.items()}


def _compare(run: Run, other: Run) -> None:
    """Check that two runs saw the same tokens and came to the same weights."""
    for name, tolerance in (
        ("train/loss", LOSS),
        ("train/tokens", {"rtol": 0}),
        ("eval/loss", LOSS),
        ("final/loss", LOSS),
        ("final/tokens", {"rtol": 0}),
    ):
        steps, ours = run.series(name)
        others, theirs = other.series(name)
        assert steps == others and steps
        np.testing.assert_allclose(ours, theirs, **tolerance, err_msg=name)
    ours, theirs = _weights(run), _weights(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], **WEIGHT, err_msg=name)


@pytest.mark.slow
def test_two_processes_do_what_one_does(together, alone, tmp_path):
    """Fault 28, processes: one process could run out of data before the others.

    Promise: all read one plan, a function of seed and step, to the same last step.
    """
    run = Run(tmp_path / "run")
    done = together(2, 4, f"--workdir={run.path}")
    assert done.returncode == 0, done.stderr
    _compare(run, alone)
    record = run.read_config()
    assert len(record["history"][0]["devices"]) == 8
    # Process 0 alone speaks of the run, and the folder is written once.
    others = [line for line in done.stderr.splitlines() if line.startswith("[1]")]
    assert not [line for line in others if "loss" in line or str(run.path) in line]
    assert len(list(run.rows("samples.jsonl"))) == 1
    assert (run.path / "DONE").read_text() == "20\n"


@pytest.mark.slow
def test_a_run_goes_on_with_four_then_two_then_one_process(together, alone, tmp_path):
    run = Run(tmp_path / "run")
    for count, steps in ((4, 10), (2, 15), (1, 20)):
        done = together(
            count, 8 // count, f"--workdir={run.path}", f"--config.train.steps={steps}"
        )
        assert done.returncode == 0, done.stderr
    assert len(run.read_config()["history"]) == 3
    # Nothing was done twice: each start went on from where the one before it ended.
    steps, _ = run.series("train/loss")
    assert steps == list(range(1, 21))
    assert "Going on from step 15" in done.stderr
    evaluated, _ = run.series("eval/loss")
    kept = [row for row in run.rows() if row["step"] != 15 or "eval/loss" not in row]
    text = "".join(json.dumps(row) + "\n" for row in kept)
    assert 15 in evaluated  # at the second start's end, where the whole run has none
    (run.path / "metrics.jsonl").write_text(text)
    _compare(run, alone)


@pytest.mark.slow
def test_a_run_goes_on_over_another_mesh_of_more_processes(together, alone, tmp_path):
    run = Run(tmp_path / "run")
    for count, flags in (
        (1, ["--config.train.steps=10"]),
        (2, ["--config.mesh.preset=context", "--config.mesh.tensor=2"]),
    ):
        done = together(count, 8 // count, f"--workdir={run.path}", *flags)
        assert done.returncode == 0, done.stderr
    assert "'fsdp': 2, 'expert': 1, 'context': 2, 'tensor': 2" in done.stderr
    _compare(run, alone)


def _pair(environment, tiny, workdirs, *flags):
    """Return the finished processes of a run whose two processes differ in flags."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "fm_jax.cli", "train", *tiny, *FLAGS, *own,
             f"--workdir={workdirs[index]}", f"--coordinator=127.0.0.1:{port}",
             "--num_processes=2", f"--process_id={index}"],
            env=environment | {"JAX_NUM_CPU_DEVICES": "4"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for index, own in enumerate(flags)
    ]  # fmt: skip
    return [(p.communicate(timeout=120)[1], p.returncode) for p in processes]


@pytest.mark.slow
def test_processes_with_other_configs_are_refused_by_all(environment, tiny, tmp_path):
    """Fault 29, processes: hosts were given different configs.

    Promise: all end with exit 2 at the start, and are told which process differs in
    what key.
    """
    path = tmp_path / "run"
    ended = _pair(
        environment, tiny, [path, path], (), ("--config.optimizer.beta1=0.8",)
    )
    for said, status in ended:
        line = next(line for line in said.splitlines() if line.startswith("fm: "))
        assert status == 2
        assert line == (
            "fm: the config must be the same in all processes; process 1 has "
            "optimizer.beta1=0.8 where process 0 has 0.9. Processes that differ from "
            "0: [1]. Start all with one command and one version of the code."
        )
    assert not path.exists()


@pytest.mark.slow
def test_a_run_in_use_is_refused_by_all(environment, tiny, tmp_path):
    """Fault 23, checkpoints: two live jobs in one run folder.

    Promise: all processes of the second end with exit 2.
    """
    run = Run(tmp_path / "run")
    with run.held():
        ended = _pair(environment, tiny, [run.path] * 2, (), ())
    for said, status in ended:
        assert status == 2
        assert "--workdir must not be in use" in said


@pytest.mark.slow
def test_a_coordinator_that_does_not_answer_is_named(environment, tiny, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "fm_jax.cli", "train", *tiny,
         f"--workdir={tmp_path / 'run'}", "--coordinator=127.0.0.1:9",
         "--num_processes=2", "--process_id=1", "--join_timeout=2"],
        env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .startswith(
            "fm: process 0 must answer at 127.0.0.1:9 within 2 s; process 1 of 2 got"
        )
    )
