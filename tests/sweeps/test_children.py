import subprocess
import sys
import time

import pytest

from fm_jax.sweeps import children, costs

SLEEP = [
    sys.executable,
    "-c",
    "import time; print('going', flush=True); time.sleep(60)",
]


@pytest.fixture
def no_patience(monkeypatch):
    monkeypatch.setattr(children, "GRACE_SECONDS", 0.5)
    monkeypatch.setattr(children, "POLL_SECONDS", 0.02)


def _start(tmp_path, *more, code=""):
    command = [*SLEEP, *more] if not code else [sys.executable, "-c", code, *more]
    slot = children.Slot(None, {})
    return children.start(command, log=tmp_path / "log", slot=slot)


def _wait_for_words(child):
    while not child.last_words():
        time.sleep(0.02)


def test_processes_share_a_gpu_where_there_are_too_few(monkeypatch):
    monkeypatch.setattr(costs, "gpus", lambda: [("0", "a")])
    for slot in children.slots(3):
        assert slot.environment == {
            "CUDA_VISIBLE_DEVICES": "0",
            "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.300",
        }


def test_last_words_are_those_of_this_start(tmp_path):
    child = _start(tmp_path, code="print('one'); print('two'); print()")
    child.process.wait()
    assert child.last_words() == "two"
    child = _start(tmp_path, code="")
    assert child.seconds() >= 0
    children.stop([child])
    child = _start(tmp_path, code="pass")
    child.process.wait()
    assert child.last_words() == ""
    assert (tmp_path / "log").read_text().startswith("one\ntwo\n")


def test_a_process_that_does_not_stop_is_ended(tmp_path, no_patience):
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    child = _start(tmp_path, code=code + "print('deaf', flush=True); time.sleep(60)")
    _wait_for_words(child)
    children.stop([child])
    assert child.process.returncode == -9


def test_a_leftover_is_known_by_the_run_that_it_trains(tmp_path, no_patience):
    child = _start(tmp_path, f"--workdir={tmp_path / 'a'}")
    pid = child.process.pid
    _wait_for_words(child)
    assert children.is_ours(pid, tmp_path / "a")
    assert not children.is_ours(pid, tmp_path / "b")
    children.end_leftover(pid, tmp_path / "b")  # its number may be another's by now
    with pytest.raises(subprocess.TimeoutExpired):
        child.process.wait(0.2)
    children.end_leftover(pid, tmp_path / "a")
    assert child.process.wait() == -15
