"""Tests of launch/sky/train.yaml: what SkyPilot reads, and what its nodes run."""

import os
import pathlib
import subprocess

import pytest
import yaml

from fm_jax import cli, errors, flags, watch
from fm_jax import config as configs

FILE = pathlib.Path(__file__).parents[2] / "launch" / "sky" / "train.yaml"
# Of a task and of its resources: sky/utils/schemas.py of skypilot 0.14, as far as used.
KEYS = {"name", "workdir", "num_nodes", "resources", "file_mounts", "envs", "secrets",
        "setup", "run"}  # fmt: skip
RESOURCES = {"accelerators", "use_spot", "job_recovery"}


@pytest.fixture
def task():
    """Return the file as plain data."""
    return yaml.safe_load(FILE.read_text())


@pytest.fixture
def ran(task, tmp_path):
    """Return `ran(status)`: what a node runs where fm ends so, and how that ends."""

    def ran(status, **given):
        local = tmp_path / "launch" / "local.sh"
        local.parent.mkdir(exist_ok=True)
        ending = f"kill -{status - 128} $$" if status > 128 else f"exit {status}"
        words = "$FM_COORDINATOR $FM_NUM_PROCESSES $FM_PROCESS_ID"
        local.write_text(f"#!/bin/sh\nprintf '%s\\0' {words} \"$@\"\n{ending}\n")
        local.chmod(0o755)
        told = {"SKYPILOT_NUM_NODES": "3", "SKYPILOT_NODE_RANK": "1",
                "SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8\n10.0.0.9"}  # fmt: skip
        done = subprocess.run(
            ["bash", "-c", task["run"]],
            cwd=tmp_path,
            env=os.environ | task["envs"] | told | given,
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        return done.stdout.split("\0")[:-1], done.returncode

    return ran


def test_the_keys_are_known(task):
    assert set(task) == KEYS
    assert set(task["resources"]) == RESOURCES
    assert set(task["resources"]["job_recovery"]) == {
        "max_restarts_on_errors",
        "recover_on_exit_codes",
    }


def test_a_node_runs_words_that_fm_takes_as_one_of_several(ran):
    out, status = ran(0, WORKDIR="/ckpt/a b")
    assert (out[:3], status) == (["10.0.0.7:12355", "3", "1"], 0)
    assert out[3] == "fm"
    name, rest = cli.named(out[4:])
    parsed, raw = flags.parse(cli.COMMANDS[name], rest)
    configs.check(raw)
    assert parsed.workdir == "/ckpt/a b"
    assert raw["data"]["paths"] == ("/ckpt/corpus/*.jsonl.zst",)


def test_a_run_is_started_again_where_that_helps_and_nowhere_else(task, ran):
    """SkyPilot recovers where any node's status is in its list."""
    again = set(task["resources"]["job_recovery"]["recover_on_exit_codes"])
    assert task["resources"]["job_recovery"]["max_restarts_on_errors"] == 0
    assert again == {errors.StoppedError.exit_status, watch.EXIT_HUNG}
    for status in (*again, 134, 137, 139, 143):
        assert ran(status)[1] in again
    final = {errors.UserError.exit_status, errors.DivergedError.exit_status}
    for status in {*final, cli.EXIT_FAILURE, 0}:
        assert ran(status)[1] == status
    # SkyPilot's own status of the nodes that it stops because another failed.
    assert 137 not in again


def test_a_secret_is_no_variable_of_the_task(task):
    assert task["secrets"].keys() == {"WANDB_API_KEY"}
    assert not task["envs"].keys() & task["secrets"].keys()


def test_skypilot_reads_it(task, monkeypatch):
    sky = pytest.importorskip("sky", reason="skypilot is not here: 300 MB")
    monkeypatch.chdir(FILE.parents[2])  # workdir is looked at
    found = sky.Task.from_yaml(str(FILE))
    assert found.num_nodes == task["num_nodes"]
    (resources,) = found.resources
    recovery = task["resources"]["job_recovery"]
    assert resources.job_recovery.items() >= recovery.items()
