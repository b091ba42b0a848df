"""Hosts that do not belong together, or do not see the same, train nothing."""

import contextlib
import pathlib
import shutil
import socket
import subprocess
import sys
import time

import pytest

from fm_jax.runs import Run

ROOT = pathlib.Path(__file__).parent.parent.parent
LAUNCH = ROOT / "launch" / "local.py"


@pytest.fixture
def port():
    """Return a port of this machine that is free."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def host(environment, tiny, port):
    """Return `host(index, workdir, *flags, **options)`: one of two processes."""
    with contextlib.ExitStack() as stack:

        def start(index, workdir, *flags, **options):
            options = {"env": environment} | options
            given = {flag.partition("=")[0] for flag in flags}
            kept = [flag for flag in tiny if flag.partition("=")[0] not in given]
            process = subprocess.Popen(
                [sys.executable, "-m", "fm_jax.cli", "train", *kept, *flags,
                 f"--workdir={workdir}", f"--coordinator=127.0.0.1:{port}",
                 "--num_processes=2", f"--process_id={index}", "--join_timeout=60"],
                stderr=subprocess.PIPE, text=True, **options,
            )  # fmt: skip
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        yield start


def ended(*processes):
    """Return the last line of each process, all of which must end with status 2."""
    lines = []
    for process in processes:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 2, said
        assert "Traceback" not in said
        lines.append([x for x in said.splitlines() if x.startswith("fm: ")][-1])
    return lines


def corpora(folder):
    """Return two folders with a corpus under one name, one letter apart."""
    for index in (0, 1):
        texts = folder / str(index) / "texts"
        texts.mkdir(parents=True)
        for number in range(40):
            text = f"one word and another {number} " * 9
            (texts / f"{number}.txt").write_text(text.replace("9", "89"[index]))
    return folder / "0", folder / "1"


@pytest.mark.slow
def test_hosts_with_other_data_are_refused(host, tmp_path):
    """Fault 29, processes: hosts have different text under one name.

    Promise: all end with exit 2 before a step is compiled, and are told which process
    differs in which split's digest; no run folder is begun.
    """
    flags = ["--config.data.paths=('texts',)", "--config.data.cache_dir=cache"]
    own = corpora(tmp_path)
    run = tmp_path / "run"
    first, second = (host(i, run, *flags, cwd=own[i]) for i in (0, 1))
    lines = ended(first, second)
    assert lines[0] == lines[1]
    assert lines[0].startswith("fm: the data must be the same in all processes; ")
    assert "process 1 has eval_store=" in lines[0]
    assert "; train_store=" in lines[0]
    assert not Run(run).exists()


@pytest.mark.slow
def test_hosts_with_other_code_are_refused(host, environment, tmp_path):
    """Fault 29, processes: one line of the code is another on one host.

    Promise: all end with exit 2 at the start, and are told that the code differs,
    committed or not.
    """
    for name in ("fm_jax", "configs"):
        shutil.copytree(ROOT / name, tmp_path / "copy" / name)
    with open(tmp_path / "copy" / "fm_jax" / "models" / "layers.py", "a") as file:
        file.write("# another line\n")
    run = tmp_path / "run"
    path = {"PYTHONPATH": str(tmp_path / "copy")}
    first, second = host(0, run), host(1, run, env=environment | path, cwd=tmp_path)
    lines = ended(first, second)
    assert lines[0] == lines[1]
    assert (
        "the config must be the same in all processes; process 1 has code=" in lines[0]
    )
    assert not run.exists()


@pytest.mark.slow
def test_two_launches_of_one_port_are_not_mixed(host, tmp_path):
    """Fault 30, processes: two runs were given one port, and a host of each meets.

    Promise: both are told that their configs or folders differ, the one whose port is
    taken that it is, all with exit 2; neither run begins.
    """
    one, two = tmp_path / "one", tmp_path / "two"
    waiting = host(0, one)
    time.sleep(1)
    late = host(0, two)
    (said,) = ended(late)
    assert "process 0 must be able to listen at 127.0.0.1:" in said
    assert "Address already in use. Choose another port." in said
    lines = ended(waiting, host(1, two))
    for line in lines:
        assert line.startswith("fm: the config must be the same in all processes; ")
        assert "; process 1 has --workdir=" in line
    assert not one.exists()
    assert not two.exists()


# Of the steps that process 1 sees, the last is missing: its disk is late.
STALE = """
import os, sys
from fm_jax import checkpoints, cli
if os.environ["FM_PROCESS_ID"] == "1":
    steps = checkpoints.Checkpoints.steps
    checkpoints.Checkpoints.steps = lambda self: steps(self)[:-1]
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_hosts_that_see_different_checkpoints_do_not_part(
    fm, tiny, environment, tmp_path
):
    """Fault 19, checkpoints: hosts see different latest steps.

    Promise: all end with exit 2 and are told which process sees what; none goes on.
    """
    run = Run(tmp_path / "run")
    flags = [*tiny, "--config.checkpoint.keep=3", "--config.mesh.preset=fsdp"]
    flags += [f"--workdir={run.path}", "--config.sample.num_tokens=1"]
    done = fm("train", *flags, "--config.train.steps=10", JAX_NUM_CPU_DEVICES="2")
    assert done.returncode == 0, done.stderr
    done = subprocess.run(
        [sys.executable, LAUNCH, "--processes=2", "--devices_per_process=1",
         sys.executable, "-c", STALE, "train", *flags],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert (
        "fm: what is seen of the checkpoints must be the same in all processes; "
        "process 1 has steps=[5] where process 0 has [5, 10]."
    ) in done.stderr
    assert max(row["step"] for row in run.rows()) == 10
