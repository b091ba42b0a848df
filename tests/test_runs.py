"""Tests of the run folder: whole files, torn lines, and what a folder may be."""

import json
import os
import subprocess
import sys

import pytest

from fm_jax.errors import UserError
from fm_jax.runs import Run


@pytest.fixture
def run(tmp_path):
    """Return a run that has begun in a new folder."""
    run = Run(tmp_path / "run")
    run.begin()
    return run


def _names(run):
    return sorted(path.name for path in run.path.iterdir())


def test_a_write_that_fails_leaves_the_old_file(run, monkeypatch):
    run.write("DONE", "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(UserError) as error:
            run.write("DONE", "new")
    assert str(error.value) == (
        f"{run.path / 'DONE'} must be writable and its disk have room; got No space "
        "left on device."
    )
    assert (run.path / "DONE").read_text() == "old"
    run.write("DONE", "new")
    assert (run.path / "DONE").read_text() == "new"
    assert _names(run) == ["DONE"]


def test_a_reader_sees_the_old_file_or_the_new_one(run):
    run.write("tokenizer.json", "a" * 300_000)
    code = (
        "import pathlib, sys\n"
        "from fm_jax.runs import Run\n"
        "run = Run(pathlib.Path(sys.argv[1]))\n"
        "for i in range(200):\n"
        "    run.write('tokenizer.json', 'ab'[i % 2] * 300_000)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(run.path)])
    seen = set()
    while writer.poll() is None:
        text = (run.path / "tokenizer.json").read_text()
        seen.add((text[0], len(set(text)), len(text)))
    assert writer.returncode == 0
    assert seen == {("a", 1, 300_000), ("b", 1, 300_000)}


def test_text_is_written_in_utf8(run):
    run.write("tokenizer.json", "é\u2028λ")
    assert (run.path / "tokenizer.json").read_bytes() == "é\u2028λ".encode()


def test_rows_come_back_in_order_as_they_were_appended(run):
    rows = [{"step": 1, "train/loss": 0.1}, {"step": 2, "text": 'a\n"b" é\u2028'}]
    for row in rows:
        run.append(row)
    assert list(run.rows()) == rows


def test_a_torn_last_line_is_left_out(run):
    """Fault 45, around it: the last line of the metrics is cut anywhere.

    Promise: readers leave it out and keep all others.
    """
    run.append({"step": 1})
    run.append({"step": 2})
    file = run.path / "metrics.jsonl"
    whole = file.read_bytes()
    for cut in range(len(b'{"step": 1}\n'), len(whole)):
        file.write_bytes(whole[:cut])
        assert list(run.rows()) == [{"step": 1}]
    file.write_bytes(whole)
    assert list(run.rows()) == [{"step": 1}, {"step": 2}]


def test_a_file_that_is_not_there_has_no_rows(run):
    assert list(run.rows("samples.jsonl")) == []


def test_a_series_is_the_steps_and_values_of_the_rows_that_have_it(run):
    run.append({"step": 10, "train/loss": 3.5})
    run.append({"step": 20, "eval/loss": 3.25})
    run.append({"step": 20, "train/loss": 3.0})
    assert run.series("train/loss") == ([10, 20], [3.5, 3.0])
    assert run.series("eval/loss") == ([20], [3.25])
    assert run.series("grads/norm") == ([], [])


def test_rewind_keeps_what_was_written_before_the_save_alone(run):
    """Fault 44, around it: a run goes back to a checkpoint behind its last metrics.

    Promise: lines after that step are dropped before they are written again, samples
    and closing rows too.
    """
    kept = [{"step": 10, "train/loss": 3.5}, {"step": 20, "eval/loss": 3.0}]
    for row in [
        *kept,
        {"step": 20, "final/loss": 2.9, "time/eval_seconds": 1.0},
        {"step": 20, "predicted/step_seconds": 0.5, "memory/peak_bytes": 10},
        {"step": 21, "train/loss": 2.8},
        {"step": 30, "train/loss": 2.7},
    ]:
        run.append(row)
    run.append({"step": 20, "text": "def "}, "samples.jsonl")
    run.rewind(20)
    assert list(run.rows()) == kept
    assert list(run.rows("samples.jsonl")) == []


def test_rewind_to_the_beginning_drops_every_row(run):
    run.append({"step": 1, "train/loss": 3.5})
    run.rewind(0)
    assert list(run.rows()) == []


def test_rewind_mends_a_torn_last_line_so_that_appending_goes_on(run):
    """Fault 45, around it: the last line of the metrics is cut anywhere.

    Promise: a run that goes on cuts it off before it writes the next.
    """
    run.append({"step": 1})
    with open(run.path / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 2, "train/lo')
    run.rewind(5)
    run.append({"step": 3})
    assert list(run.rows()) == [{"step": 1}, {"step": 3}]


def test_rewind_makes_no_files(run):
    run.rewind(3)
    assert _names(run) == []


def test_a_log_grows_by_lines(run):
    run.log("step 1")
    run.log("step 2: é")
    assert (run.path / "log.txt").read_text("utf-8") == "step 1\nstep 2: é\n"


def test_lines_that_cannot_be_appended_are_the_users_error(run):
    (run.path / "log.txt").mkdir()
    (run.path / "metrics.jsonl").mkdir()
    for name, call in (("log.txt", run.log), ("metrics.jsonl", run.append)):
        with pytest.raises(UserError) as error:
            call({"step": 1} if name == "metrics.jsonl" else "step 1")
        assert str(error.value) == (
            f"{run.path / name} must be writable and its disk have room; got Is a "
            "directory."
        )


def test_a_run_exists_from_its_config_on_and_is_done_by_its_step(run):
    assert not run.exists()
    run.write_config({"config": {}, "history": []})
    assert run.exists()
    assert run.done_step() == 0
    run.write("DONE", "400\n")
    assert run.done_step() == 400


def test_to_begin_again_takes_away_how_the_run_had_ended(run):
    run.write_config({"config": {}, "history": []})
    run.write("DONE", "4\n")
    run.write("FAILED", "KeyboardInterrupt\n")
    run.append({"step": 4})
    run.begin()
    assert _names(run) == ["config.json", "metrics.jsonl"]
    assert run.done_step() == 0


def test_the_config_comes_back_as_it_was_written(run):
    record = {"config": {"train": {"steps": 3}}, "history": [], "time": 1.5}
    record |= {"changed_from_base": {}, "resolved": {}, "data": {}}
    run.write_config(record)
    assert run.read_config() == record
    assert json.loads((run.path / "config.json").read_text()) == record


@pytest.mark.parametrize("name", ["missing", "file"])
def test_what_is_not_a_run_has_no_config(name, tmp_path):
    (tmp_path / "file").write_text("hello")
    with pytest.raises(UserError) as error:
        Run(tmp_path / name).read_config()
    assert str(error.value) == (
        f"a run must be a folder with config.json; got {tmp_path / name}. "
        "fm train prints the folder of its run."
    )


def test_a_broken_config_is_refused(run):
    (run.path / "config.json").write_text('{"config": ')
    with pytest.raises(UserError) as error:
        run.read_config()
    assert str(error.value) == (
        f"{run.path}/config.json must be JSON; got "
        "Expecting value: line 1 column 12 (char 11)."
    )


@pytest.mark.parametrize("text", ['{"model_type": "gpt2"}', "[1]"])
def test_a_config_that_no_run_wrote_is_refused(text, run):
    (run.path / "config.json").write_text(text)
    with pytest.raises(UserError) as error:
        run.read_config()
    assert str(error.value) == (
        f"{run.path}/config.json must be written by a run; got one that something "
        "else wrote. Choose the folder of a run."
    )


def test_a_run_an_empty_folder_and_a_new_one_are_free(tmp_path):
    (tmp_path / "empty").mkdir()
    Run(tmp_path / "empty").check_free()
    Run(tmp_path / "new").check_free()
    old = Run(tmp_path / "old")
    old.begin()
    old.write_config({"config": {}, "history": []})
    old.check_free()


@pytest.mark.parametrize("name", ["thesis", "thesis/thesis.tex"])
def test_a_folder_of_something_else_is_not_free(name, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("")
    with pytest.raises(UserError) as error:
        Run(tmp_path / name).check_free()
    assert str(error.value) == (
        f"--workdir must be a run or an empty folder; got {tmp_path / name}, which "
        "holds something else. Choose another folder."
    )


def test_a_run_cannot_begin_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "run"
    with pytest.raises(UserError) as error:
        Run(path).begin()
    assert str(error.value) == (
        f"{path} must be writable and its disk have room; got Not a directory."
    )


# ---- of several processes


def _use(run):
    """Call everything of a run that writes."""
    with run.held():
        run.begin()
        run.write_config({"config": {}, "history": []})
        run.write("DONE", "7\n")
        run.append({"step": 7, "train/loss": 1.0})
        run.append({"step": 7, "text": "def "}, "samples.jsonl")
        run.log("step 7")
        run.rewind(3)


def test_a_run_that_does_not_write_makes_no_folder(tmp_path):
    _use(Run(tmp_path / "run", writes=False))
    assert list(tmp_path.iterdir()) == []
    _use(Run(tmp_path / "run"))
    assert (tmp_path / "run" / "DONE").exists()


def test_a_run_that_does_not_write_stands_beside_the_one_that_does(run):
    _use(run)
    run.append({"step": 9, "train/loss": 0.5})
    run.write("FAILED", "KeyboardInterrupt\n")
    before = {path.name: path.read_bytes() for path in run.path.iterdir()}
    assert {"DONE", "FAILED", "config.json", "metrics.jsonl", "log.txt"} <= set(before)
    with run.held():
        _use(Run(run.path, writes=False))
    assert {path.name: path.read_bytes() for path in run.path.iterdir()} == before


def test_a_torn_line_is_cut_before_the_next_is_written(tmp_path):
    """Fault 45, around it: the last line of the table of evaluations is cut.

    Promise: it is cut off before the next is written.
    """
    run = Run(tmp_path)
    run.append({"step": 1}, "table.jsonl")
    with open(tmp_path / "table.jsonl", "a") as stream:
        stream.write('{"step": 2, "lo')
    run.mend("table.jsonl")
    run.append({"step": 2}, "table.jsonl")
    assert list(run.rows("table.jsonl")) == [{"step": 1}, {"step": 2}]
    run.mend("missing.jsonl")
    assert not (tmp_path / "missing.jsonl").exists()


def test_a_new_start_takes_away_what_the_one_before_said_of_its_processes(tmp_path):
    run = Run(tmp_path)
    for name in ("alive/3", "exits/1", "FAILED"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("75\n")
    Run(tmp_path, writes=False).begin()
    assert (tmp_path / "alive" / "3").exists()
    run.begin()
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]
