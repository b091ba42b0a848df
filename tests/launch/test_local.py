"""Tests of launch/local.sh and local.py: who is told what, and how it all ends."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

LAUNCH = pathlib.Path(__file__).parent.parent.parent / "launch"
WHO = "import os\nwho = int(os.environ['FM_PROCESS_ID'])\n"


def _start(*command, **kwargs):
    return subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )


def _end(process):
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def _local(code, *options):
    """Start Python code as the processes of a launch."""
    return _start(
        sys.executable, LAUNCH / "local.py", *options, sys.executable, "-c", WHO + code
    )


def test_each_process_is_told_who_it_is_and_its_devices():
    code = (
        "import json\n"
        "names = ('FM_', 'JAX_NUM', 'JAX_PLATFORMS')\n"
        "print(json.dumps({k: v for k, v in os.environ.items() "
        "if k.startswith(names)}))"
    )
    status, out, err = _end(_local(code, "--processes=3", "--devices_per_process=4"))
    assert (status, err) == (0, "")
    lines = out.splitlines()
    told = [json.loads(line[line.index("{") :]) for line in lines]
    told.sort(key=lambda each: each["FM_PROCESS_ID"])
    addresses = {each["FM_COORDINATOR"] for each in told}
    assert len(addresses) == 1
    assert addresses.pop().startswith("127.0.0.1:")
    assert [each["FM_PROCESS_ID"] for each in told] == ["0", "1", "2"]
    for each in told:
        assert each["FM_NUM_PROCESSES"] == "3"
        assert each["JAX_PLATFORMS"] == "cpu"
        assert each["JAX_NUM_CPU_DEVICES"] == "4"


def test_devices_are_left_alone_where_none_are_asked_for(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES", raising=False)
    code = "print(os.environ['JAX_PLATFORMS'], 'JAX_NUM_CPU_DEVICES' in os.environ)"
    assert _end(_local(code))[1] == "tpu False\n"


def test_only_the_lines_of_the_others_say_whose_they_are():
    code = "import sys\nprint('out\\n  more')\nprint('err', file=sys.stderr)"
    status, out, err = _end(_local(code, "--processes=2"))
    assert status == 0
    assert sorted(out.splitlines()) == ["  more", "[1]   more", "[1] out", "out"]
    assert sorted(err.splitlines()) == ["[1] err", "err"]


def test_the_first_failure_is_the_status_and_ends_the_others():
    code = (
        "import sys, time\n"
        "if who == 1: sys.exit(76)\n"
        "try: time.sleep(60)\n"
        "except BaseException: sys.exit(1)\n"
    )
    began = time.monotonic()
    status, _, err = _end(_local(code, "--processes=3"))
    assert status == 76
    assert err == (
        "launch/local.sh: process 1 ended with status 76; ending the others\n"
    )
    assert time.monotonic() - began < 8


def test_a_process_that_dies_of_a_signal_gives_128_and_its_number():
    code = "import signal\nif who == 1: os.kill(os.getpid(), signal.SIGABRT)\n"
    assert _end(_local(code, "--processes=2"))[0] == 128 + signal.SIGABRT


def test_a_process_that_ignores_sigterm_is_killed_after_the_grace():
    code = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "if who == 1: time.sleep(0.5); sys.exit(3)\n"
        "time.sleep(60)\n"
    )
    launch = (
        f"import sys; sys.path.insert(0, {str(LAUNCH)!r}); import local\n"
        f"command = [sys.executable, '-c', {WHO + code!r}]\n"
        "sys.exit(local.run(command, num_processes=2, grace_seconds=0.5))"
    )
    began = time.monotonic()
    assert _end(_start(sys.executable, "-c", launch))[0] == 3
    assert 1 <= time.monotonic() - began < 8


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher_reaches_all_once(number, tmp_path):
    code = (
        "import signal, sys, time\n"
        "got = []\n"
        "for n in (signal.SIGTERM, signal.SIGINT):\n"
        "    signal.signal(n, lambda n, _: got.append(n))\n"
        f"open(f'{tmp_path}/{{who}}', 'w').close()\n"
        "while not got: time.sleep(0.02)\n"
        "time.sleep(0.4 * who)\n"
        "print([int(n) for n in got])\n"
        "sys.exit(75)\n"
    )
    process = _local(code, "--processes=2")
    while len(list(tmp_path.iterdir())) < 2:
        time.sleep(0.02)
    process.send_signal(number)
    status, out, _ = _end(process)
    assert status == 75
    assert set(out.splitlines()) == {f"[{int(number)}]", f"[1] [{int(number)}]"}


def test_launches_at_once_have_ports_of_their_own():
    code = "import time\nprint(os.environ['FM_COORDINATOR'])\ntime.sleep(0.5)"
    launches = [_local(code) for _ in range(4)]
    assert len({_end(each)[1] for each in launches}) == 4


def test_a_command_that_is_no_program_is_one_line():
    process = _start(sys.executable, LAUNCH / "local.py", "--processes=2", "nowhere")
    status, out, err = _end(process)
    assert (status, out) == (127, "")
    assert err.startswith("launch/local.sh: the command must be a program; got ")
    assert err.count("\n") == 1


# ---- local.sh


@pytest.fixture
def installed(tmp_path):
    """Return the environment in which local.sh finds its installation made."""
    root, venv = LAUNCH.parent, tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    python = venv / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    pins = f'cat "{root}/pyproject.toml" "{root}/launch/constraints.txt" | cksum'
    made = subprocess.run(
        ["sh", "-c", pins], capture_output=True, text=True, check=True
    )
    (venv / ".fm_jax").write_text(f"cpu {made.stdout.strip()}\n")
    ours = {"FM_VENV": str(venv), "FM_ACCELERATOR": "cpu"}
    return {k: v for k, v in os.environ.items() if not k.startswith("FM_")} | ours


def test_local_sh_runs_a_plain_command_as_before(installed):
    code = "import os, sys; print(sys.argv[1:], 'FM_PROCESS_ID' in os.environ)"
    process = _start(
        LAUNCH / "local.sh", "python", "-c", code, "--processes=2", env=installed
    )
    assert _end(process) == (0, "['--processes=2'] False\n", "")


def test_local_sh_runs_as_many_processes_as_it_is_told(installed):
    code = "import os; print(os.environ['JAX_NUM_CPU_DEVICES'])"
    options = ("--devices_per_process=5", "--processes=2")
    process = _start(LAUNCH / "local.sh", *options, "python", "-c", code, env=installed)
    status, out, err = _end(process)
    assert (status, err) == (0, "")
    assert sorted(out.splitlines()) == ["5", "[1] 5"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes=0", "true"], "--processes must be a whole number from 1 to"),
        (["--processes=two", "true"], "9999; got 'two'."),
        (["--devices_per_process=-1", "true"], "--devices_per_process must be a whole"),
        (["--process=2", "true"], "options must be --processes=N and"),
        (["--processes", "2", "true"], "got --processes. The command's own options"),
        (["--processes=2"], "a command must be given."),
    ],
)
def test_local_sh_refuses_what_it_cannot_do_in_one_line(installed, arguments, message):
    status, out, err = _end(_start(LAUNCH / "local.sh", *arguments, env=installed))
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("launch/local.sh: ")
    assert message in err


def test_local_sh_refuses_extras_that_are_no_names(installed):
    env = installed | {"FM_EXTRAS": "parity;serve"}
    status, out, err = _end(_start(LAUNCH / "local.sh", "true", env=env))
    assert (status, out) == (2, "")
    assert "FM_EXTRAS must be names with commas between them; got 'parity;serve'" in err


@pytest.mark.skipif(not shutil.which("flock"), reason="flock must be there; got none")
def test_of_several_that_come_at_once_one_installs(installed, tmp_path):
    tools, log = tmp_path / "tools", tmp_path / "log"
    tools.mkdir()
    tool = tools / "uv"
    tool.write_text(
        f"#!/bin/sh\necho $1 >>{log}\nsleep 0.5\nfor venv; do :; done\n"
        'if [ "$1" = venv ]; then mkdir -p "$venv/bin"; touch "$venv/pyvenv.cfg"; fi\n'
    )
    tool.chmod(0o755)
    env = installed | {
        "FM_VENV": str(tmp_path / "new"),
        "PATH": f"{tools}:{installed['PATH']}",
    }
    several = [_start(LAUNCH / "local.sh", "echo", "ran", env=env) for _ in range(3)]
    assert [_end(one)[:2] for one in several] == [(0, "ran\n")] * 3
    assert log.read_text().split() == ["venv", "pip"]


def test_an_installation_with_extras_serves_those_who_ask_for_none(installed):
    marker = pathlib.Path(installed["FM_VENV"], ".fm_jax")
    marker.write_text(marker.read_text().replace("cpu ", "cpu,parity "))
    for extras in ("", "parity"):
        env = installed | {"FM_EXTRAS": extras}
        assert _end(_start(LAUNCH / "local.sh", "true", env=env)) == (0, "", "")
