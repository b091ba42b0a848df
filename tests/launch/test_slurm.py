"""Tests of launch/slurm on a real SLURM: two nodes on loopback, real runs of fm."""

import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

import pytest

from fm_jax import events
from fm_jax.checkpoints import Checkpoints
from fm_jax.runs import Run
from tests.launch import loopback
from tests.launch.loopback import wait

ROOT = pathlib.Path(__file__).parents[2]
SLURM = ROOT / "launch" / "slurm"
STEPS = 300
CONFIG = f"""
from configs import base

def get_config():
    config = base.get_config()
    config.model.update(num_layers=1, embed_dim=16, num_heads=2)
    config.data.update(source="synthetic", tokenizer="symbols", max_length=32)
    config.synthetic.update(num_tokens=20000, num_eval_tokens=2000)
    config.train.update(batch_size=4, steps={STEPS})
    config.eval.every = 0
    config.checkpoint.every = 100
    config.log.every = 1
    config.sample.num_tokens = 0
    return config
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(loopback.missing()),
        reason=f"Debian's slurm-wlm and munge must be installed; got no "
        f"{', '.join(loopback.missing())}",
    ),
]


@pytest.fixture(scope="module")
def slurm():
    """A cluster, and beside it an installation of fm that launch/local.sh takes."""
    # Sockets want short paths.
    with tempfile.TemporaryDirectory(prefix="fm-slurm-") as name:
        folder = pathlib.Path(name)
        cluster = loopback.Cluster(folder / "cluster")
        venv = folder / "venv"
        (venv / "bin").mkdir(parents=True)
        (venv / "pyvenv.cfg").touch()
        script = venv / "bin" / "fm"
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m fm_jax.cli "$@"\n')
        script.chmod(0o755)
        pins = [ROOT / "pyproject.toml", ROOT / "launch" / "constraints.txt"]
        sums = subprocess.run(
            ["cksum"],
            input=b"".join(f.read_bytes() for f in pins),
            capture_output=True,
            check=True,
        ).stdout.decode()
        (venv / ".fm_jax").write_text(f"cpu {sums}")
        cluster.environ |= {
            "FM_HOME": str(ROOT),
            "FM_VENV": str(venv),
            "FM_ACCELERATOR": "cpu",
            "FM_EXTRAS": "",
            "HOME": str(folder),  # where compiled programs are kept
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "OMP_NUM_THREADS": "1",
        }
        (folder / "tiny.py").write_text(CONFIG)
        cluster.config = folder / "tiny.py"
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


def _submit(slurm, folder, *words, options=()):
    """Submit in `folder`; return the job's number."""
    folder.mkdir(exist_ok=True)
    return slurm.run("sbatch", "--parsable", *options, *words, cwd=folder)


def _train(slurm, folder, *overrides, options=("--time=30", "--signal=TERM@60")):
    words = [SLURM / "train.sbatch", "fm", "train", f"--config={slurm.config}",
             f"--workdir={folder / 'run'}", *overrides]  # fmt: skip
    return _submit(slurm, folder, *words, options=options)


def _said(folder):
    return "\n".join(f.read_text(errors="replace") for f in folder.glob("*.out"))


def _await_end(slurm, job, folder, seconds=180):
    """Wait until a job has ended; return its state."""
    over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
    wait(lambda: slurm.job(job, "JobState") in over, seconds, lambda: _said(folder))
    return slurm.job(job, "JobState")


def _await_step(folder, step, seconds=120):
    """Wait until the run of a folder has written a step's numbers."""
    wait(lambda: _steps(folder)[-1] >= step, seconds, lambda: _said(folder))


def _steps(folder):
    return [0, *(row["step"] for row in Run(folder / "run").rows())]


def _starts(folder):
    rows = events.read(Run(folder / "run"))
    return [row["step"] for row in rows if row["event"] == "ready"]


def _numbers(folder):
    """Return what a run came to: the loss of every step, and digests of its end."""
    run = Run(folder / "run")
    saved = Checkpoints(run.checkpoints)
    try:
        return run.series("train/loss"), saved.digests(STEPS)
    finally:
        saved.close()


@pytest.fixture(scope="module")
def whole(slurm, tmp_path_factory):
    """What a run of two processes that nothing interrupted came to."""
    folder = tmp_path_factory.mktemp("whole")
    job = _train(slurm, folder)
    assert _await_end(slurm, job, folder) == "COMPLETED"
    return folder


def test_a_job_of_two_nodes_is_one_run(slurm, whole):
    assert _starts(whole) == [0]
    record = Run(whole / "run").read_config()
    assert record["history"][0]["mesh"]["data"] == 2
    assert sorted(p.name for p in (whole / "run" / "exits").iterdir()) == ["0", "1"]
    assert "launch/slurm: status 0, restart 0" in _said(whole)
    steps, losses = _numbers(whole)[0]
    assert steps == list(range(1, STEPS + 1))
    assert losses[-1] < losses[0] - 1
    assert not list(whole.glob(".fm-*"))


def test_preempted_it_ends_with_the_same_bits(slurm, whole, tmp_path):
    """Fault 7, stopping: a job of higher priority takes the nodes.

    Promise: the run saves, is queued again, goes on, and ends with the bits of a run
    that nothing interrupted.
    """
    job = _train(slurm, tmp_path)
    _await_step(tmp_path, 5)
    urgent = ("--partition=urgent", "--exclusive", "--nodes=2", "--output=/dev/null")
    slurm.run("sbatch", *urgent, "--wrap", "sleep 0.1", cwd=tmp_path)
    assert _await_end(slurm, job, tmp_path) == "COMPLETED"
    first, again = _starts(tmp_path)
    assert first == 0 < again < STEPS
    assert "launch/slurm: status 75, restart 0" in _said(tmp_path)
    assert "launch/slurm: status 0, restart 1" in _said(tmp_path)
    assert _numbers(tmp_path) == _numbers(whole)


@pytest.fixture(scope="module")
def timed(slurm, tmp_path_factory):
    """A job whose time limit, of a minute, comes while another is tested."""
    folder = tmp_path_factory.mktemp("timed")
    # SLURM warns up to half a minute early, and knows no limit below a minute.
    options = ("--nodes=1", "--time=1", "--signal=TERM@20")
    job = _train(slurm, folder, "--config.train.steps=1000000", options=options)
    return folder, job


def test_a_node_is_lost_and_the_job_goes_on_when_it_is_back(
    slurm, whole, timed, tmp_path
):
    """Fault 9, processes: a node of a job is lost.

    Promise: SLURM queues the job again, and the run goes on from its last checkpoint to
    the bits of a run that nothing interrupted.
    """
    job = _train(slurm, tmp_path, "--config.checkpoint.every=50")
    _await_step(tmp_path, 60)
    slurm.kill_node("127.0.0.2")
    wait(lambda: slurm.job(job, "JobState") == "PENDING", 90, lambda: _said(tmp_path))
    wait(lambda: "127.0.0.2" in slurm.run("sinfo", "-h", "-t", "down", "-o", "%N"), 60)
    slurm.start_node("127.0.0.2")
    assert _await_end(slurm, job, tmp_path) == "COMPLETED"
    assert int(slurm.job(job, "Restarts")) >= 1
    starts = _starts(tmp_path)
    assert len(starts) == 2 and starts[1] >= 50
    assert _numbers(tmp_path) == _numbers(whole)


def test_out_of_time_it_goes_on_and_cancelled_it_does_not(slurm, timed):
    """Fault 8, stopping: SLURM's time limit comes, and later the user cancels.

    Promise: out of time the run saves, is queued again and goes on from there; what is
    cancelled saves and stays cancelled.
    """
    folder, job = timed
    wait(lambda: "restart 0" in _said(folder), 90, lambda: _said(folder))
    assert "launch/slurm: status 75, restart 0" in _said(folder)
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=30")
    wait(lambda: len(_starts(folder)) > 1, 90, lambda: _said(folder))
    begun = []
    while begun != _starts(folder):  # it may have been warned again before the update
        begun = _starts(folder)
        time.sleep(5)
        _await_step(folder, _starts(folder)[-1] + 5)
    begun, restarts = _starts(folder), slurm.job(job, "Restarts")
    assert set(begun) <= {0, *_saved(folder)}
    slurm.run("scancel", job)
    assert _await_end(slurm, job, folder) == "CANCELLED"
    told = f"launch/slurm: status 75, restart {restarts}"
    wait(lambda: told in _said(folder), 30, lambda: _said(folder))
    assert _saved(folder)[-1] > begun[-1]
    assert slurm.job(job, "Restarts") == restarts
    assert not slurm.run("squeue", "--noheader", f"--jobs={job}")


def _saved(folder):
    return [int(step) for step in re.findall(r"saved at step (\d+)", _said(folder))]


def test_a_mistake_is_told_and_not_tried_again(slurm, tmp_path):
    job = _train(slurm, tmp_path, "--config.train.batch_size=3")
    assert _await_end(slurm, job, tmp_path) == "FAILED"
    assert slurm.job(job, "ExitCode") == "2:0"
    assert slurm.job(job, "Restarts") == "0"
    assert "must divide" in _said(tmp_path)


def test_without_srun_that_is_said(slurm, tmp_path):
    words = f"fm train --config={slurm.config} --workdir={tmp_path / 'run'}"
    path = f"PATH={slurm.environ['FM_VENV']}/bin:$PATH"
    job = _submit(slurm, tmp_path, "--wrap", f"{path} {words}", options=("-n2", "-N2"))
    assert _await_end(slurm, job, tmp_path) == "FAILED"
    assert "must start the command with srun" in _said(tmp_path)
    assert not (tmp_path / "run").exists()


def test_gpus_that_were_asked_for_and_are_not_there_are_missed(slurm, tmp_path):
    words = [SLURM / "train.sbatch", "fm", "train", f"--config={slurm.config}",
             f"--workdir={tmp_path / 'run'}"]  # fmt: skip
    options = ("--nodes=1", "--gpus-per-node=2", "--export=ALL,JAX_PLATFORMS=")
    job = _submit(slurm, tmp_path, *words, options=options)
    assert _await_end(slurm, job, tmp_path) == "FAILED"
    assert slurm.job(job, "ExitCode") == "2:0"
    assert "where SLURM_GPUS_ON_NODE=2 says that there is one" in _said(tmp_path)


ASK = (
    "import json, os\n"
    "from fm_jax.cluster import launchers\n"
    "found = launchers.find('', 0, -1, os.environ)\n"
    "print(json.dumps([found.process_id, found.num_processes, found.coordinator, "
    "found.local_device_ids]))\n"
)


@pytest.mark.parametrize(
    ("layout", "devices"),
    [
        (["--ntasks-per-node=1", "--gpus-per-node=2"], [None, None]),
        (["--ntasks-per-node=2", "--gpus-per-node=2"], [[0], [1], [0], [1]]),
        # SLURM itself shows each task its own.
        (["--ntasks-per-node=2", "--gpus-per-task=1"], [None] * 4),
    ],
)
def test_each_task_takes_its_gpus_and_no_others(slurm, layout, devices):
    said = slurm.run("srun", "--nodes=2", *layout, sys.executable, "-c", ASK)
    told = sorted(json.loads(line) for line in said.splitlines())
    assert [index for index, *_ in told] == list(range(len(devices)))
    assert {num for _, num, *_ in told} == {len(devices)}
    (address,) = {address for _, _, address, _ in told}
    assert address.startswith("127.0.0.1:")
    assert [ids for *_, ids in told] == devices


def test_a_script_submitted_elsewhere_says_from_where(slurm, tmp_path):
    for name in ("train.sbatch", "sweep.sbatch"):
        folder = tmp_path / name
        environ = f"--export=ALL,FM_HOME={folder}"
        job = _submit(slurm, folder, SLURM / name, "x", options=(environ, "--array=0"))
        wait(lambda f=folder: "submit from the root of fm_jax" in _said(f), 30)
        assert _await_end(slurm, job, folder) == "FAILED"


def test_a_task_of_an_array_is_queued_again_alone(slurm, tmp_path):
    """The last task has the number of its whole array."""
    code = "[ $SLURM_ARRAY_TASK_ID$SLURM_RESTART_COUNT != 1 ] || exit 75; sleep 3"
    options = ("--nodes=1", "--array=0-1")
    words = (SLURM / "train.sbatch", "bash", "-c", code)
    job = _submit(slurm, tmp_path, *words, options=options)
    wait(lambda: "status 75, restart 0" in _said(tmp_path), 60)
    wait(
        lambda: not slurm.run("squeue", "--noheader", f"--jobs={job}"),
        60,
        lambda: _said(tmp_path),
    )
    ended = {str(i): slurm.job(f"{job}_{i}", "JobState") for i in (0, 1)}
    assert ended == {"0": "COMPLETED", "1": "COMPLETED"}
    assert [slurm.job(f"{job}_{i}", "Restarts") for i in (0, 1)] == ["0", "1"]


NUM_RUNS, BAD = 20, 7


def _fm(slurm):
    return pathlib.Path(slurm.environ["FM_VENV"]) / "bin" / "fm"


@pytest.fixture(scope="module")
def swept(slurm, tmp_path_factory):
    """A sweep of which one run fails, after its array."""
    folder = tmp_path_factory.mktemp("swept")
    lines = [{"train.steps": 6, "train.seed": seed} for seed in range(NUM_RUNS)]
    (folder / "lines.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in lines))
    said = slurm.run(
        _fm(slurm), "sweep", f"--config={slurm.config}", "--overrides=lines.jsonl",
        "--out=sweep.jsonl", cwd=folder,
    )  # fmt: skip
    names = [
        json.loads(line)["name"]
        for line in (folder / "sweep.jsonl").read_text().splitlines()
    ]
    # A folder that something else lies in.
    (folder / "runs" / names[BAD]).mkdir(parents=True)
    (folder / "runs" / names[BAD] / "theirs.txt").touch()
    # One alone first: all at once would compile the same programs.
    slurm.run(_fm(slurm), "sweep", "run", "sweep.jsonl", "--index=0", cwd=folder)
    assert Run(folder / "runs" / names[0]).is_done()
    (command,) = re.findall(r"^slurm +(sbatch .*)$", said, re.MULTILINE)
    job = _shell(slurm, folder, command)
    wait(
        lambda: not slurm.run("squeue", "--noheader", f"--jobs={job}"),
        240,
        lambda: _said(folder),
    )
    return folder, names


def _shell(slurm, folder, command):
    """Submit as a user does who copies a line, the checkout elsewhere."""
    command = command.replace("launch/slurm", str(SLURM))
    return slurm.run("bash", "-c", command, cwd=folder).rpartition(" ")[2]


def _status(slurm, folder):
    return slurm.run(_fm(slurm), "sweep", "status", "sweep.jsonl", cwd=folder)


def test_an_array_does_every_run_but_the_one_that_fails(slurm, swept):
    folder, names = swept
    for index, name in enumerate(names):
        assert Run(folder / "runs" / name).is_done() == (index != BAD)
        assert name.startswith(f"{index:03d}-")
    assert "must be a run or an empty folder" in _said(folder)


def test_the_failed_run_alone_is_repeated(slurm, swept):
    folder, names = swept
    begun = {n: len(events.read(Run(folder / "runs" / n))) for n in names}
    said = _status(slurm, folder)
    assert f"{NUM_RUNS} runs: {NUM_RUNS - 1} done" in said
    (command,) = re.findall(r"^sbatch .*$", said, re.MULTILINE)
    assert f"--array={BAD}%" in command
    (folder / "runs" / names[BAD] / "theirs.txt").unlink()
    job = _shell(slurm, folder, command)
    wait(lambda: not slurm.run("squeue", "--noheader", f"--jobs={job}"), 90)
    assert f"{NUM_RUNS} runs: {NUM_RUNS} done" in _status(slurm, folder)
    now = {n: len(events.read(Run(folder / "runs" / n))) for n in names}
    assert [n for n in names if now[n] != begun[n]] == [names[BAD]]


def test_a_done_run_is_left_as_it_is(slurm, swept):
    folder, names = swept
    rows = (folder / "runs" / names[0] / "metrics.jsonl").read_bytes()
    job = _submit(
        slurm, folder, SLURM / "sweep.sbatch", "sweep.jsonl", options=("--array=0",)
    )
    assert _await_end(slurm, job, folder) == "COMPLETED"
    assert (folder / "runs" / names[0] / "metrics.jsonl").read_bytes() == rows


def test_an_index_beyond_the_file_is_told(slurm, swept):
    folder, _ = swept
    job = _submit(
        slurm, folder, SLURM / "sweep.sbatch", "sweep.jsonl", options=("--array=99",)
    )
    assert _await_end(slurm, job, folder) == "FAILED"
    assert "--index must be below 20" in _said(folder)


def test_runs_of_an_array_share_programs_that_are_their_user_s(slurm, swept, whole):
    folder, names = swept
    programs = slurm.config.parent / ".cache" / "fm_jax" / "programs"
    assert (programs.stat().st_mode & 0o077) == 0
    log = (folder / "runs" / names[-1] / "log.txt").read_text()
    (misses,) = re.findall(r"persistent cache: \d+ hits .*?, (\d+) misses", log)[:1]
    assert int(misses) == 0
    assert os.stat(programs).st_uid == os.getuid()
