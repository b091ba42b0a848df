"""Tests of what processes do together: start, tell, agree, leave."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent


def _environ():
    ours = ("FM_", "SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "JAX_NUM_CPU_DEVICES")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    return kept | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


# ---- alone


def test_one_process_alone_needs_neither_jax_nor_a_disk():
    code = (
        "import pathlib, sys\n"
        "from fm_jax.cluster import together\n"
        "together.start(None)\n"
        "assert together.count() == 1 and together.is_main()\n"
        "together.agree('config', {'a': 1})\n"
        "together.shares_folder(pathlib.Path('/proc/none'))\n"
        "together.leave(2, within_seconds=0)\n"
        "assert together.on_main(lambda: 7) == 7\n"
        "assert 'jax' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_auto_outside_of_a_cluster_is_an_error_of_one_line():
    # This process has looked at its devices, so another one must start.
    code = (
        "from fm_jax.cluster import launchers, together\n"
        "from fm_jax.errors import UserError\n"
        "try: together.start(launchers.Cluster('auto'))\n"
        "except UserError as error: print(error)\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=_environ(),
    )
    assert found.stdout.startswith("jax must find the other processes by itself; got:")
    assert found.stdout.count("\n") == 1


# ---- several


SCENARIO = """
import json, os, pathlib, sys
from fm_jax.cluster import launchers, together
from fm_jax.errors import UserError

folder, kind = pathlib.Path(sys.argv[1]), sys.argv[2]
found = launchers.find("", 0, -1, os.environ)
me, said = found.process_id, {}
if kind == "devices":
    os.environ["JAX_NUM_CPU_DEVICES"] = "31"[me]


def note(name, do):
    try:
        said[name] = do()
    except Exception as error:
        said[name] = f"{type(error).__name__}: {error}"


def mistaken():
    raise UserError("no such corpus")


def all_of_it():
    note("who", lambda: [together.count(), together.is_main()])
    note("told", lambda: together.on_main(lambda: {"by": me, "text": "\\u00e9" * 999}))
    note("mistake", lambda: together.on_main(mistaken))
    note("failure", lambda: together.on_main(lambda: 1 / 0))
    note("not_json", lambda: together.on_main(lambda: {1}))
    note("agree", lambda: together.agree("config", {"a": [1, None], "b": float("nan")}))
    mine = {"a": 1, "seed": me, "long": "x" * 999 * me} | ({"new": 1} if me else {})
    note("differ", lambda: together.agree("config", mine))
    note("shared", lambda: together.shares_folder(folder / "run"))
    own = folder / f"own{me}"
    note("own", lambda: together.shares_folder(own, timeout_seconds=1))
    note("unwritable", lambda: together.shares_folder(folder / "file" / "run"))


def end(status):
    (folder / f"{kind}{me}.json").write_text(json.dumps(said))
    together.leave(status, within_seconds=1)
    sys.exit(status)


note("start", lambda: together.start(found, timeout_seconds=60))
if kind == "talk":
    all_of_it()
elif kind == "leave" and me == 1:
    print("no corpus here", file=sys.stderr)
    end(2)
elif kind == "leave":
    note("waited", lambda: together.on_main(lambda: 0))
end(0 if kind == "talk" else 2)
"""


def _launch(folder, kind, *options):
    """Return the finished launch of a scenario, and what each process noted."""
    launch = [sys.executable, str(ROOT / "launch" / "local.py"), "--processes=2"]
    done = subprocess.run(
        [*launch, *options, sys.executable, "-c", SCENARIO, str(folder), kind],
        env=_environ(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    files = [folder / f"{kind}{index}.json" for index in (0, 1)]
    return done, [json.loads(file.read_text()) for file in files if file.exists()]


@pytest.fixture(scope="module")
def talk(tmp_path_factory):
    """Return the folder of one launch of two processes, and what each noted."""
    folder = tmp_path_factory.mktemp("talk")
    (folder / "file").touch()
    done, said = _launch(folder, "talk", "--devices_per_process=3")
    assert done.returncode == 0, done.stderr
    return folder, said


def test_two_processes_work_as_one(talk):
    _, said = talk
    assert [each["start"] for each in said] == [None, None]
    assert [each["who"] for each in said] == [[2, True], [2, False]]


def test_all_get_what_process_0_found(talk):
    _, said = talk
    for each in said:
        assert each["told"] == {"by": 0, "text": "\u00e9" * 999}
        assert each["mistake"] == "UserError: no such corpus"


def test_an_error_of_process_0_leaves_nobody_waiting(talk):
    _, (first, second) = talk
    assert first["failure"] == "ZeroDivisionError: division by zero"
    assert (
        second["failure"] == f"RuntimeError: process 0 failed with {first['failure']}"
    )
    assert first["not_json"].startswith("TypeError: ")
    assert second["not_json"].startswith("RuntimeError: process 0 failed with TypeE")


def test_all_are_told_which_process_differs_in_what(talk):
    _, said = talk
    assert [each["agree"] for each in said] == [None, None]
    assert said[0]["differ"] == said[1]["differ"]
    assert said[0]["differ"] == (
        "UserError: config must be the same in all processes; process 1 has "
        f'long="{"x" * 56}... where process 0 has ""; new=1 where process 0 has '
        "nothing; seed=1 where process 0 has 0. Processes that differ from 0: [1]. "
        "Start all with one command and one version of the code."
    )


def test_a_folder_that_is_not_shared_is_refused_by_all(talk):
    """Fault 18, checkpoints: --workdir is not on a disk that all hosts share.

    Promise: all are told who does not see what process 0 writes, exit 2; nothing is
    left there.
    """
    folder, said = talk
    assert [each["shared"] for each in said] == [None, None]
    assert list((folder / "run").iterdir()) == []
    for index, each in enumerate(said):
        assert each["own"] == (
            "UserError: --workdir must be on a disk that all processes share; "
            "processes [1] do not see what process 0 writes in "
            f"{folder / f'own{index}'}."
        )
        assert each["unwritable"] == (
            f"UserError: {folder / 'file' / 'run'} must be a folder that can be "
            "written; got Not a directory."
        )
    assert list((folder / "own0").iterdir()) == []


def test_processes_of_different_devices_are_refused(tmp_path):
    """Fault 29, processes: hosts have different numbers of devices.

    Promise: all end with exit 2 at the start, and are told the number of each.
    """
    done, said = _launch(tmp_path, "devices")
    assert done.returncode == 2
    for each in said:
        assert each["start"] == (
            "UserError: each process must have the same number of devices; got 3 in "
            "process 0, 1 in process 1. Show each as many."
        )


def test_a_process_that_leaves_alone_leaves_with_its_own_status(tmp_path):
    done, _ = _launch(tmp_path, "leave")
    assert done.returncode == 2
    assert "[1] no corpus here\n" in done.stderr
    assert "process 1 ended with status 2; ending the others" in done.stderr
