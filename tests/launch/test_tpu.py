"""Tests of launch/tpu/queued_resource.sh: its very commands, and what it refuses."""

import os
import pathlib
import shlex
import subprocess

import pytest

from fm_jax.cluster import launchers

SCRIPT = pathlib.Path(__file__).parents[2] / "launch" / "tpu" / "queued_resource.sh"
GIVEN = {"NAME": "fm", "ZONE": "us-x1-b", "TYPE": "v6e-16", "RUNTIME": "v2-tpu"}
AWKWARD = [
    "a b",
    "it's",
    'say "so"',
    "$HOME",
    "`id`",
    "*",
    "",
    "--x=('/a b/*',)",
    "ü\n",
]


def _run(*arguments, **changed):
    inherited = {k: v for k, v in os.environ.items() if k not in {*GIVEN, "SPOT"}}
    return subprocess.run(
        [SCRIPT, *arguments],
        env=inherited | {"DRY": "1"} | GIVEN | changed,
        capture_output=True,
        text=True,
        check=False,
    )


def _commands(*arguments, **changed):
    """Return the words of each command that is printed, as bash reads them."""
    done = _run(*arguments, **changed)
    assert (done.returncode, done.stderr) == (0, "")
    return [_as_bash_reads(line) for line in done.stdout.splitlines()]


def _as_bash_reads(line):
    read = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True
    )
    return read.stdout.decode().split("\0")[:-1]


def test_a_slice_is_asked_for_looked_at_and_given_back():
    queued = "gcloud compute tpus queued-resources"
    create = shlex.split(
        f"{queued} create fm --node-id=fm --zone=us-x1-b --accelerator-type=v6e-16 "
        "--runtime-version=v2-tpu"
    )
    assert _commands("create") == [create]
    assert _commands("create", SPOT="1") == [[*create, "--spot"]]
    assert _commands("status") == [
        shlex.split(
            f"{queued} describe fm --zone=us-x1-b --format='value(state.state)'"
        )
    ]
    assert _commands("delete") == [
        shlex.split(f"{queued} delete fm --zone=us-x1-b --force --quiet")
    ]


def test_the_source_is_packed_sent_and_installed():
    *packing, send, install = _commands("sync", NAME="a b")
    packed = "dist/fm_jax.tgz"
    assert packing == [
        ["mkdir", "-p", "dist"],
        ["git", "archive", f"--output={packed}", "HEAD"],
    ]
    tpu = ["gcloud", "compute", "tpus", "tpu-vm"]
    assert send == [*tpu, "scp", packed, "a b:", "--zone=us-x1-b", "--worker=all"]
    assert install[:-1] == [*tpu, "ssh", "a b", "--zone=us-x1-b", "--worker=all"]
    there = install[-1].removeprefix("--command=")
    assert there.startswith("mkdir -p fm_jax && tar -xzf fm_jax.tgz -C fm_jax && ")
    assert there.endswith(" && fm_jax/launch/local.sh true")
    subprocess.run(["bash", "-n", "-c", there], check=True)


def test_a_worker_runs_the_very_words_and_knows_itself_one_of_several(tmp_path):
    """What ssh gives to the worker's shell, run by a shell beside a false local.sh."""
    (command,) = _commands("run", "fm", *AWKWARD)
    assert command[:-1] == shlex.split(
        "gcloud compute tpus tpu-vm ssh fm --zone=us-x1-b --worker=all"
    )
    local = tmp_path / "fm_jax" / "launch" / "local.sh"
    local.parent.mkdir(parents=True)
    local.write_text(
        '#!/bin/sh\nprintf \'%s\\0\' $$ "$PWD" $FM_ACCELERATOR $FM_COORDINATOR "$@"\n'
    )
    local.chmod(0o755)
    there = command[-1].removeprefix("--command=")
    shell = subprocess.Popen(
        ["bash", "-c", there], cwd=tmp_path, stdout=subprocess.PIPE
    )
    out = shell.communicate()[0].decode().split("\0")[:-1]
    # Its process is the shell's own: nothing stands between ssh and the run.
    assert out == [str(shell.pid), f"{tmp_path}/fm_jax", "tpu", "auto", "fm", *AWKWARD]
    found = launchers.find("", 0, -1, {"FM_COORDINATOR": out[3]})
    assert found == launchers.Cluster(launchers.AUTO)


@pytest.mark.parametrize(
    ("arguments", "changed", "message"),
    [
        ([], {}, "the command must be create, sync, run, status or delete; got ''."),
        (["start"], {}, "the command must be create, sync, run, status or delete; got"),
        (["run"], {}, "run must be given a command; got none."),
        (["delete", "fm"], {}, "delete must be alone; got 'fm' after it."),
        (["status"], {"ZONE": ""}, "ZONE must be set; got nothing."),
        (["run", "fm"], {"NAME": ""}, "NAME must be set; got nothing."),
        (["create"], {"TYPE": ""}, "TYPE must be set; got nothing."),
        (["create"], {"RUNTIME": ""}, "RUNTIME must be set; got nothing."),
    ],
)
def test_misuse_is_one_line_and_status_2(arguments, changed, message):
    done = _run(*arguments, **changed)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"launch/tpu/queued_resource.sh: {message}")
