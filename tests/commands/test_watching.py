"""Tests of what fm status prints and when it ends, on made folders."""

import json
import os
import pty
import subprocess
import sys
import threading

import pytest

from fm_jax import cli, machine
from tests import folders


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    """Leave the tests' own environment as it is."""
    monkeypatch.setattr(machine, "skip_absent_tpu", lambda: None)


@pytest.fixture
def several(tmp_path):
    """Return a folder with a run that goes on, one that is done, one of nonsense."""
    folders.run(tmp_path / "runs" / "b", DONE="30\n")
    folders.run(tmp_path / "runs" / "a")
    folders.run(tmp_path / "runs" / "c")
    (tmp_path / "runs" / "c" / "metrics.jsonl").write_text("[]\n")
    return tmp_path / "runs"


def test_all_runs_of_a_folder_are_shown_though_one_is_unreadable(several, capsys):
    assert cli.main(["status", str(several)]) == 0
    _, *rows, last = capsys.readouterr().out.splitlines()
    assert [row.split()[:2] for row in rows] == [
        [f"{several}/a", "running"],
        [f"{several}/b", "done"],
        [f"{several}/c", "unreadable"],
    ]
    assert "metrics.jsonl must be an object" in rows[2]
    assert last == "3 runs: 1 running, 1 done, 1 unreadable"


def test_json_is_a_line_for_each_run(several, capsys):
    rows = [{"step": 3, "train/loss": float("nan"), "eval/loss": 2.5}]
    folders.run(several / "d", metrics=rows)
    assert cli.main(["status", f"{several}/a", f"{several}/d", "--json"]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first.pop("time") > 1e9 and first.pop("heartbeat") < 30
    assert first == {
        "path": f"{several}/a", "state": "running", "step": 30, "steps": 100,
        "loss": 2.0, "eval_loss": 3.25, "tokens_per_second": 320.0, "mfu": 0.25,
        "seconds_left": 14.0, "attempts": 1, "goodput": 0.5, "why": "",
    }  # fmt: skip
    assert (second["loss"], second["eval_loss"]) == (None, 2.5)  # JSON has no NaN


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "must be given run folders; got none"),
        (["{}/none"], "which is no folder"),
        (["{}/runs/c"], "metrics.jsonl must be an object"),
        (["{}/runs", "--every=0.01"], "--every must be from 0.1 to 86400 seconds"),
        (["{}/runs", "--every=-1"], "--every must be"),
        (["{}/runs", "--every=nan"], "--every must be"),
        (["{}/runs", "--every=inf"], "--every must be"),
    ],
)
def test_bad_input_is_one_line(words, said, several, capsys):
    assert cli.main(["status", *(word.format(several.parent) for word in words)]) == 2
    out, err = capsys.readouterr()
    assert not out and said in err and err.count("\n") == 1


def test_looking_again_ends_once_no_run_is_running(several, capsys):
    timer = threading.Timer(0.5, (several / "a" / "DONE").write_text, ["30\n"])
    timer.start()
    assert cli.main(["status", str(several), "--every=0.2"]) == 0
    timer.join()
    shown = capsys.readouterr().out.split("runs: ")
    assert len(shown) > 3  # a table each time, the first line of which says when
    assert shown[0][:2] == "20" and shown[0].splitlines()[1].startswith("run ")
    assert shown[1].startswith("1 running") and shown[-1].startswith("2 done")


def test_what_was_interrupted_ends_well(several, monkeypatch, capsys):
    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", interrupt)
    assert cli.main(["status", str(several), "--every=2"]) == 0
    assert "interrupted" not in capsys.readouterr().err


def test_a_terminal_is_redrawn_until_no_run_is_running(several):
    for index in range(30):  # more than fit
        folders.run(several / f"a{index:02}", DONE="30\n")
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-m", "fm_jax.cli", "status", str(several), "--every=0.2"],
        stdout=theirs,
        stderr=subprocess.PIPE,
        env=os.environ | {"COLUMNS": "250", "LINES": "10", "TERM": "xterm"},
        text=True,
    )
    os.close(theirs)
    timer = threading.Timer(1.5, (several / "a" / "DONE").write_text, ["30\n"])
    timer.start()
    said = _all(ours)
    timer.join()
    assert child.wait(timeout=10) == 0, child.stderr.read()
    child.stderr.close()
    assert "\x1b[2K" in said  # drawn over
    screens = said.split("loss, nats")[1:]
    assert len(screens) > 3
    assert f"{several}/a " in screens[0].splitlines()[1]  # what is running comes first
    assert "33 runs: " in screens[0]
    assert "running" not in screens[-1] and "32 done" in screens[-1]


def _all(terminal):
    """Return what is written to a terminal until nobody has it open."""
    found = b""
    while True:
        try:
            part = os.read(terminal, 65_536)
        except OSError:  # nobody has
            part = b""
        if not part:
            os.close(terminal)
            return found.decode()
        found += part
