"""A tracker's process: what it does or fails to do reaches us as an error, in time."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from fm_jax.trackers.child import COMMAND, Child, TrackerError

# A process that takes every line and keeps it; {} is what else it does with one.
TAKES = """
import json, os, sys, time
for line in sys.stdin:
    said = json.loads(line)
    with open(sys.argv[1], "a") as stream:
        stream.write(line)
    {}
    print(json.dumps({{"taken": 1, "is_done": "end" in said}}), flush=True)
"""
START = {"tracker": "none", "name": "run"}


@pytest.fixture
def child(tmp_path):
    """Return `child(code, **more)`: a Child of that code; all are gone at the end."""
    made = []

    def start(code, **more):
        command = (sys.executable, "-c", code, str(tmp_path / "taken"))
        made.append(Child(START, tmp_path / "child.log", command=command, **more))
        return made[-1]

    yield start
    for one in made:
        one.kill()


def _taken(tmp_path):
    return [json.loads(line) for line in open(tmp_path / "taken")]


def _soon():
    return time.monotonic() + 20


def _until_raised(one):
    with pytest.raises(TrackerError) as caught:
        while True:
            one.flush()
            time.sleep(0.02)
    return str(caught.value)


def _is_gone(pid):
    try:
        status = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return status.rpartition(")")[2].split()[0] == "Z"  # dead, if nobody has asked


def test_all_is_taken_in_order(child, tmp_path):
    one = child(TAKES.format("pass"))
    rows = [{"step": n, "train/loss": n / 7} for n in range(3000)]
    for row in rows:
        one.row(1.5, row)
    one.rewind(7, 0, rows)
    one.end("finished")
    one.close(_soon())
    told = [{"time": 1.5, "row": row} for row in rows]
    ends = [{"went_on_from": 7}, {"end": "finished"}]
    assert _taken(tmp_path) == [START, *told, *ends]
    assert one.num_dropped == 0


def test_nothing_is_left_open(child):
    before = sorted(os.listdir("/proc/self/fd"))
    one = child(TAKES.format("pass"))
    one.end("finished")
    one.close(_soon())
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert one._process.returncode is not None


@pytest.mark.parametrize(
    ("does", "said"),
    [
        ("print(json.dumps({'error': 'no such project'}), flush=True)", "no such pro"),
        ("sys.exit(3)", "its process is gone"),
        ("os.kill(os.getpid(), 9)", "its process is gone"),
    ],
)
def test_a_process_that_fails_is_told_of(child, tmp_path, does, said):
    one = child(TAKES.format(does))
    why = _until_raised(one)
    assert said in why and why.endswith(f"(see {tmp_path / 'child.log'})")
    assert one._process.returncode is not None


def test_a_process_that_takes_nothing_is_ended(child):
    one = child("import time; time.sleep(60)", hang_seconds=0.3)
    assert "it took nothing for 0.3 s" in _until_raised(one)
    assert one._process.returncode == -signal.SIGKILL


def test_a_process_with_nothing_to_take_is_no_hang(child, tmp_path):
    one = child(TAKES.format("pass"), hang_seconds=0.4)
    deadline = time.monotonic() + 20
    while one._num_taken < 1 and time.monotonic() < deadline:
        one.flush()
    time.sleep(0.6)
    one.row(1.0, {"step": 1})
    one.flush()
    one.end("finished")
    one.close(_soon())
    assert len(_taken(tmp_path)) == 3


def test_a_process_that_does_not_end_is_ended_in_time(child):
    one = child(TAKES.format("'end' in said and time.sleep(60)"))
    one.end("finished")
    began = time.monotonic()
    with pytest.raises(TrackerError, match="not at an end in time"):
        one.close(time.monotonic() + 0.5)
    assert time.monotonic() - began < 3
    assert one._process.returncode == -signal.SIGKILL


def test_rows_that_a_process_is_too_slow_for_are_counted_and_hold_nothing_up(
    child, monkeypatch
):
    monkeypatch.setattr("fm_jax.trackers.child.MOST_BYTES", 1 << 20)
    one = child("import time; time.sleep(60)")
    row = {"step": 1, "train/loss": 0.5, "of": "x" * 1000}
    began = time.monotonic()
    for _ in range(3000):
        one.row(1.0, row)
        one.flush()
    assert time.monotonic() - began < 5
    assert 1500 < one.num_dropped < 2500  # a MiB waits, and some of it in the pipe
    assert len(one._unsent) < (1 << 20) + 2000


def _named(tmp_path, name, code):
    """Put a library of that name, with `code`, where the real process finds it."""
    place = tmp_path / "library"
    place.mkdir()
    (place / f"{name}.py").write_text(code)
    return str(place)


def _real(tmp_path, monkeypatch, code, **environ):
    """Return a Child of the real process, whose wandb is `code`."""
    monkeypatch.setenv("PYTHONPATH", _named(tmp_path, "wandb", code))
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    told = {"tracker": "wandb", "path": str(tmp_path), "name": "run", "id": "run-1"}
    return Child(told | {"config": {}}, tmp_path / "wandb.log", command=COMMAND)


def test_what_a_library_prints_is_in_the_log_and_its_error_is_told(
    tmp_path, monkeypatch
):
    code = "print('hello'); raise RuntimeError('key hunter22hunter is wrong')"
    one = _real(tmp_path, monkeypatch, code, WANDB_API_KEY="hunter22hunter")
    assert "RuntimeError: key [left out] is wrong" in _until_raised(one)
    log = (tmp_path / "wandb.log").read_text()
    assert log.startswith("hello\n") and "Traceback" in log
    assert "hunter22hunter" not in log


STUB = """
import atexit, os, time
atexit.register(time.sleep, 60)
class Settings:
    def __init__(self, **more): pass
class Run:
    summary = {}
    def define_metric(self, *a, **k): pass
    def log(self, row): print("log", row)
    def finish(self, exit_code): print("finish", exit_code)
    def mark_preempting(self): print("preempting")
def init(**more):
    print(os.getpid(), more["id"])
    return Run()
def teardown(code): print("teardown", code)
"""


def test_exit_hooks_of_a_library_keep_nobody_waiting(tmp_path, monkeypatch):
    one = _real(tmp_path, monkeypatch, STUB)
    one.row(1.0, {"step": 3, "train/loss": 0.5, "text": "no"})
    one.end("preempted")
    one.close(_soon())
    assert (tmp_path / "wandb.log").read_text().splitlines()[1:] == [
        "log {'train/loss': 0.5, 'step': 3}",
        "preempting",
        "finish 75",
        "teardown 75",
    ]


def test_a_process_hears_no_signal_but_ends_when_we_are_gone(tmp_path):
    """As a scheduler sends SIGTERM to all that a job has, or ends us at once."""
    log = tmp_path / "wandb.log"
    place = _named(tmp_path, "wandb", STUB)
    told = {"tracker": "wandb", "path": ".", "name": "run", "id": "i", "config": {}}
    code = (
        "import os, pathlib, time\n"
        "from fm_jax.trackers.child import Child\n"
        f"one = Child({told!r}, pathlib.Path({str(log)!r}))\n"
        "one.row(1.0, {'step': 1, 'train/loss': 0.5})\n"
        "while one._num_taken < 2: one.flush(); time.sleep(0.02)\n"
        "os.kill(one._process.pid, 15); os.kill(one._process.pid, 2)\n"
        "print(one._process.pid, flush=True)\n"
        "os._exit(85)\n"
    )
    root = os.path.abspath(os.path.join(__file__, "..", "..", ".."))
    path = os.pathsep.join([place, root])
    gone = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        timeout=60,
    )
    assert gone.returncode == 85
    deadline = time.monotonic() + 20
    while "teardown 1" not in (text := log.read_text()):
        assert time.monotonic() < deadline, text
        time.sleep(0.05)
    assert "finish 1\n" in text
    while not _is_gone(int(gone.stdout)):  # whatever its exit hooks wait for
        assert time.monotonic() < deadline
        time.sleep(0.05)
