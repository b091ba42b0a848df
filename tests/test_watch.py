"""Tests of the watch, on real processes: asked to stop, stuck, interrupted."""

import pathlib
import signal
import subprocess
import sys
import time

import pytest

from fm_jax import watch as watches

HEAD = """
import sys, time
from fm_jax.watch import Watch
def stuck(seconds):  # in one call of C, as in a compiler: no handler of Python runs
    sum_of = sorted
    import ctypes
    ctypes.PyDLL(None).usleep(int(seconds * 1e6))  # and keeps the interpreter's lock
def asleep(seconds):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(0.05)
"""


def _start(body: str) -> subprocess.Popen:
    root = pathlib.Path(__file__).parent.parent
    child = subprocess.Popen(
        [sys.executable, "-c", HEAD + body],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=root,
    )
    assert child.stdout.readline() == "ready\n", child.stderr.read()
    return child


def _end(child: subprocess.Popen, *signals: int, pause: float = 0.3):
    for number in signals:
        child.send_signal(number)
        time.sleep(pause)
    out, err = child.communicate(timeout=30)
    return child.returncode, out, err


def test_one_signal_only_asks():
    child = _start("""
with Watch(grace_seconds=30) as watch:
    print("ready", flush=True)
    while not watch.is_asked:
        time.sleep(0.01)
    print("asked", flush=True)
sys.exit(75)
""")
    assert _end(child, signal.SIGTERM) == (75, "asked\n", "")


def test_an_error_is_raised_where_there_is_one():
    child = _start("""
with Watch() as watch:
    watch.error = SystemExit(7)
    print("ready", flush=True)
    asleep(20)
""")
    assert _end(child, signal.SIGTERM)[0] == 7


@pytest.mark.parametrize(("is_saved", "status"), [(True, 75), (False, 85)])
def test_a_process_that_does_not_end_in_time_is_ended(is_saved, status):
    """Fault 4, stopping: a process hangs after it was asked to stop.

    Promise: after --grace seconds it ends by itself, 75 if all is saved, else 85.
    """
    child = _start(f"""
with Watch(grace_seconds=1) as watch:
    watch.is_saved = {is_saved}
    print("ready", flush=True)
    asleep(30)
""")
    began = time.monotonic()
    code, _, err = _end(child, signal.SIGTERM)
    assert code == status
    assert 1 < time.monotonic() - began < 10
    assert "asked to stop 1 s ago" in err and "in asleep" in err


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_a_second_signal_ends_the_process_at_once(number, status):
    """Fault 4, stopping: a second signal comes.

    Promise: the process ends at once, 128 + the signal's number.
    """
    child = _start("""
import signal
with Watch() as watch:
    signal.signal(signal.SIGINT, lambda *_: None)  # a library that keeps it
    print("ready", flush=True)
    asleep(30)
""")
    began = time.monotonic()
    assert _end(child, number, number)[0] == status
    assert time.monotonic() - began < 10


def test_a_main_thread_that_is_stuck_is_ended_with_its_stacks(tmp_path):
    """Fault 27, processes: a process lives and its main thread is stuck.

    Promise: after --hang seconds it writes the stacks of all threads and exits 85.
    """
    (tmp_path / "alive").mkdir()
    (tmp_path / "alive" / "1").write_text("2\n")
    child = _start(f"""
import pathlib
ended = pathlib.Path({str(tmp_path)!r}, "ended")
with Watch(hang_seconds=1, on_end=lambda status: ended.write_text(str(status))) as w:
    w.stacks = pathlib.Path({str(tmp_path)!r}, "stacks")
    w.alive = pathlib.Path({str(tmp_path)!r}, "alive", "0")
    asleep(2.5)  # nothing is expected before the first beat
    w.beat()
    asleep(0.5)
    w.beat(times=4)
    asleep(2)
    w.rest()
    asleep(2)
    w.beat()
    print("ready", flush=True)
    asleep(30)
""")
    code, _, err = _end(child)
    assert code == 85 and "hung" in err
    assert "It gave 3 signs of life; process 1 gave 2," in err
    assert int((tmp_path / "alive" / "0").read_text()) in (1, 2, 3)
    assert "in asleep" in (tmp_path / "stacks").read_text()
    assert (tmp_path / "ended").read_text() == "85"


def test_handlers_are_put_back():
    child = _start("""
import signal
with Watch():
    pass
assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
assert signal.set_wakeup_fd(-1) == -1
print("ready", flush=True)
asleep(30)
""")
    assert _end(child, signal.SIGTERM)[0] == -signal.SIGTERM


def test_a_sign_of_life_that_is_taken_away_meanwhile_leaves_the_watch(monkeypatch):
    """Between the look at a run's file and the writing of it, the run may end."""
    told = []

    class Vanishing:
        def __bool__(self):
            watch.alive = None
            return True

        def write_text(self, text):
            told.append(text)

    monkeypatch.setattr(watches, "LOOK", 0.01)
    with watches.Watch() as watch:
        watch.alive = Vanishing()
        until = time.monotonic() + 10
        while not told and time.monotonic() < until:
            time.sleep(0.01)
        assert watch._thread.is_alive()
    assert told == ["0\n"]
