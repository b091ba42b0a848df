"""Tests of what a run's folder tells: made ones, torn ones, those of strangers."""

import dataclasses
import json
import os
import time
from pathlib import Path

import pytest

from fm_jax import jsonfiles, life, status
from fm_jax.errors import UserError
from fm_jax.runs import Run
from fm_jax.watch import TELL
from tests import folders

ENDED = {"alive_0": None, "seconds": 50}  # alive/0 is taken away at an end


def test_a_run_that_goes_on_is_told_in_numbers(tmp_path):
    found = status.read(folders.run(tmp_path / "run", seconds=2))
    assert 2 <= found.heartbeat < 10
    assert dataclasses.replace(found, heartbeat=None) == status.Status(
        path=tmp_path / "run",
        state="running",
        step=30,
        steps=100,
        loss=2.0,
        eval_loss=3.25,
        tokens_per_second=320.0,
        mfu=0.25,
        seconds_left=70 * 64 / 320,
        attempts=1,
        goodput=0.5,
    )


@pytest.mark.parametrize(
    ("files", "state", "why"),
    [
        (ENDED | {"DONE": "30\n", "exits_0": "0\n"}, "done", ""),
        (ENDED | {"exits_0": "75\n"}, "stopped", ""),
        (ENDED | {"exits_0": "143\n"}, "stopped", life.AT_ONCE),
        (ENDED | {"FAILED": "KeyboardInterrupt: \n"}, "stopped", life.AT_ONCE),
        (
            ENDED | {"FAILED": "DivergedError: no\nmore\n", "exits_0": "76\n"},
            "diverged",
            "DivergedError: no",
        ),
        (ENDED | {"exits_0": "76\n"}, "diverged", "exit status 76"),
        (ENDED | {"FAILED": "OSError: full\nmore\n"}, "failed", "OSError: full"),
        (ENDED | {"exits_0": "1\n"}, "failed", "exit status 1"),
        # A process that is ended by its watch leaves alive/0.
        (
            {"exits_0": "85\n", "stacks-0.txt": "hung\n\nThread\n"},
            "failed",
            "hung",
        ),
        ({"seconds": 31}, "lost", "its process was killed, or its machine is gone"),
        ({"exits_0": ""}, "running", ""),  # it is being written
        # Between the start and the first sign of life, and after the last.
        ({"alive_0": None}, "running", ""),
        # Of several processes one ends before the other.
        ({"exits_1": "0\n"}, "running", ""),
        ({"exits_1": "0\n", "alive_1": 45}, "running", ""),
        ({"exits_1": "1\n"}, "failed", "exit status 1"),
        (
            ENDED | {"exits_0": "75\n", "exits_1": "1\n"},
            "failed",
            "process 1: exit status 1",
        ),
        ({"alive_1": 20}, "running", ""),
        (
            {"alive_1": 45},
            "lost",
            "process 1 of 2 was killed, or its machine is gone",
        ),
        (
            {"exits_0": "1\n", "alive_1": 45, "alive_2": 40, "FAILED": "no peer\n"},
            "failed",
            "process 1 of 3 fell silent; no peer",
        ),
        ({"exits_0": "1\n", "alive_1": 20, "FAILED": "no\n"}, "failed", "no"),
        # Where nobody watches, what is written is the sign of life.
        ({"alive_0": 99}, "running", ""),
    ],
)
def test_the_state_is_what_the_folder_tells(files, state, why, tmp_path):
    path = folders.run(tmp_path / "run", **files)
    found = status.read(path)
    assert (found.state, found.why) == (state, why)
    assert (found.seconds_left is not None) == (state == "running")


def test_a_run_is_lost_only_after_several_signs_that_did_not_come(tmp_path):
    assert life.LOST_SECONDS > 4 * TELL
    found = status.read(folders.run(tmp_path / "run", alive_1=45))
    assert 45 <= found.heartbeat < 60  # of the one that is silent longest


def test_a_run_that_is_done_tells_its_final_loss(tmp_path):
    rows = [*folders.rows(), {"step": 30, "final/loss": 3.125}, {"step": 30, "x": 1}]
    path = folders.run(tmp_path / "run", metrics=rows, DONE="30\n")
    found = status.read(path)
    assert (found.step, found.loss, found.eval_loss) == (30, 2.0, 3.125)


def test_nothing_begun_is_waiting(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        assert status.read(path) == status.Status(path=path, state="waiting")


def test_before_its_first_step_nothing_but_signs_of_life_are_known(tmp_path):
    path = folders.run(tmp_path / "run", metrics=[], events=folders.EVENTS[:1])
    found = status.read(path)
    assert (found.state, found.step, found.attempts) == ("running", 0, 1)
    assert (found.loss, found.seconds_left, found.goodput) == (None, None, None)


def test_a_clock_that_is_behind_the_disk_makes_no_negative_age(tmp_path):
    found = status.read(folders.run(tmp_path / "run", seconds=-3600))
    assert (found.state, found.heartbeat) == ("running", 0)


def test_an_evaluation_long_ago_is_found_and_no_more_is_read(tmp_path, monkeypatch):
    rows = [*folders.rows(20), *folders.rows(9000)[21:]]
    path = folders.run(tmp_path / "run", metrics=rows)
    assert (path / "metrics.jsonl").stat().st_size > 5 * jsonfiles.BLOCK_BYTES
    read, parsed, parse = [], [], jsonfiles.parse
    last_lines = jsonfiles.last_lines
    monkeypatch.setattr(
        jsonfiles,
        "last_lines",
        lambda file: (read.append(line) or line for line in last_lines(file)),
    )
    monkeypatch.setattr(
        jsonfiles, "parse", lambda text, **how: parsed.append(1) or parse(text, **how)
    )
    assert status.read(path).eval_loss == 3.25
    assert len(read) > 8000 and len(parsed) < 10
    Run(path).append({"step": 9000, "eval/loss": 3.5})
    read.clear()
    assert status.read(path).eval_loss == 3.5
    assert len(read) < 10
    monkeypatch.setattr(jsonfiles, "TAIL_BYTES", 100_000)
    path = folders.run(tmp_path / "other", metrics=rows)
    found = status.read(path)
    assert (found.step, found.eval_loss) == (9000, None)


def test_torn_lines_are_left_out(tmp_path):
    path = folders.run(tmp_path / "run")
    for name in ("metrics.jsonl", "events.jsonl"):
        with open(path / name, "a") as stream:
            stream.write('{"step": 31, "train/lo')
    assert status.read(path).step == 30


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("config.json", "{}", "must be written by a run"),
        ("config.json", json.dumps(folders.RECORD | {"resolved": {}}), "with steps"),
        ("metrics.jsonl", "nonsense\n", "a line of .* must be JSON"),
        ("metrics.jsonl", '{"step": "x"}\n', "step of a line of .*metrics.jsonl must"),
        ("metrics.jsonl", '{"step": 1, "train/loss": "x"}\n', "train/loss of a line"),
        ("events.jsonl", '{"attempt": 1}\n', "an object with time"),
        ("exits/0", "\x1b[2J", "must hold an exit status"),
    ],
)
def test_what_no_run_wrote_is_one_clear_line(name, text, said, tmp_path):
    path = folders.run(tmp_path / "run")
    (path / name).write_text(text)
    with pytest.raises(UserError, match=said):
        status.read(path)
    told = status.seen(path)
    assert told.state == "unreadable" and len(status.lines([told])) == 3


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "events.jsonl", "FAILED", "exits/0", "config.json"]
)
def test_a_pipe_in_place_of_a_file_is_not_waited_for(name, tmp_path):
    path = folders.run(tmp_path / "run")
    (path / name).unlink(missing_ok=True)
    os.mkfifo(path / name)
    with pytest.raises(UserError, match="no plain file"):
        status.read(path)


def test_what_a_table_repeats_moves_no_cursor_and_is_short(tmp_path):
    path = folders.run(
        tmp_path / "a\x1b[31mb",
        metrics=[{"step": 2**60, "train/loss": 1e308, "perf/mfu": float("nan")}],
        FAILED="\x1b[2J" + "x" * 5000,
    )
    head, row, _ = status.lines([status.seen(path)])
    assert row.isprintable() and r"\x1b[31mb" in row
    assert len(row) < 400 and "1e+308" in row and "nan%" in row
    assert head.split()[:3] == ["run", "state", "step"]


# ---- many runs


def test_runs_are_found_three_folders_deep_and_sorted(tmp_path):
    (tmp_path / "b" / "checkpoints").mkdir(parents=True)
    for name in ("b", "a/1/y", "a/1/x", ".hidden/z", "a/1/2/deep", "b/checkpoints/c"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / name / "events.jsonl").write_text("")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")  # somebody's weights
    names = ["a/1/x", "a/1/y", "b"]
    assert status.find([tmp_path]) == [tmp_path / name for name in names]
    assert status.find([tmp_path, tmp_path / "b"]) == status.find([tmp_path])
    assert status.find([tmp_path / "a"])[0] == tmp_path / "a/1/2/deep"


@pytest.mark.parametrize(
    ("name", "said"), [("none", "which is no folder"), ("", "which holds none")]
)
def test_a_path_without_a_run_is_refused(name, said, tmp_path):
    with pytest.raises(UserError, match=f"RUN must be .*; got .*{said}"):
        status.find([tmp_path / name])


def test_a_table_of_several_runs():
    known = {"steps": 400, "loss": 2.0, "eval_loss": 3.25, "mfu": 0.25, "attempts": 1}
    found = [
        status.Status(path=Path("a"), state="done", step=400, heartbeat=90.5, **known),
        status.Status(path=Path("bb"), state="lost", step=30, why="killed", **known),
        status.Status(path=Path("c"), state="waiting"),
        status.Status(
            path=Path("d"), state="running", step=1234, steps=5000, goodput=0.5,
            tokens_per_second=12_345.6, seconds_left=3661, heartbeat=0.2, attempts=2,
        ),
    ]  # fmt: skip
    assert status.lines(found) == TABLE.strip("\n").split("\n")


TABLE = """
run  state           step  loss, nats  held out  tokens/s    MFU     left  heartbeat  starts  goodput
a    done         400/400      2.0000    3.2500            25.0%             0:01:31       1
bb   lost          30/400      2.0000    3.2500            25.0%                           1           killed
c    waiting
d    running  1,234/5,000                          12,346         1:01:01    0:00:01       2    50.0%
4 runs: 1 done, 1 lost, 1 waiting, 1 running
"""  # noqa: E501


def test_reading_is_quick(tmp_path):
    rows = folders.rows(30_000)
    path = folders.run(tmp_path / "run", metrics=rows)
    began = time.process_time()
    for _ in range(10):
        status.read(path)
    assert time.process_time() - began < 2  # a hundredth of that here
