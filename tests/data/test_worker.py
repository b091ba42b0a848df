"""Tests of worker processes: what they do, what they say, and that they end."""

import dataclasses
import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fm_jax.data import lanes, shards, worker
from fm_jax.data.hands import Hand, Work
from fm_jax.data.lanes import Sizes
from fm_jax.data.worker import Job, Setup
from fm_jax.errors import UserError
from fm_jax.tokenizers import plain
from tests.data import made

BYTES = plain.ByteTokenizer()
SIZES = Sizes(lane_bytes=1500, shard_tokens=700, batch_bytes=100)


@pytest.fixture
def started(monkeypatch):
    """Return the list of processes that a test starts."""
    found = []
    start = subprocess.Popen

    def note(*args, **options):
        found.append(start(*args, **options))
        return found[-1]

    monkeypatch.setattr(worker.subprocess, "Popen", note)
    yield found
    for process in found:
        assert process.returncode is not None


def work_on(folder, corpus, *, sizes=SIZES, **options):
    """Return the work on a corpus, its lanes, and what a process is told of it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(BYTES.to_json())
    source = made.source_of(corpus)
    work = Work(
        folder=str(folder),
        source=source.spec("train"),
        share=source.share("train"),
        without="",
        sizes=sizes,
        **made.OPTIONS | options,
    )
    planned = lanes.plan(source.pieces("train"), sizes)
    setup = Setup(work, str(folder / "tokenizer.json"), BYTES.end_id, 1)
    return work, planned, setup


def run(setup, planned, *, num_workers=2, report=lambda *_: None, finish=None):
    worker.run(
        setup,
        (Job(lane, 30) for lane in planned),
        num_workers=num_workers,
        report=report,
        finish=finish or (lambda lane: None),
        idle=lambda: None,
    )


def made_in(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("num_workers", [1, 3])
def test_processes_write_what_is_written_here(num_workers, started, tmp_path):
    made.write_corpus(tmp_path / "corpus")
    work, planned, setup = work_on(tmp_path / "there", tmp_path / "corpus")
    finished, reports = [], []
    run(
        setup,
        planned,
        num_workers=num_workers,
        finish=finished.append,
        report=lambda *told: reports.append(told),
    )
    assert len(planned) > 4
    assert sorted(lane.number for lane in finished) == list(range(len(planned)))
    assert len(started) == num_workers
    assert {process.returncode for process in started} == {0}
    sizes = sum(lane.size for lane in planned)
    assert sum(done for *_, done in reports) == sizes
    here = tmp_path / "here"
    work, planned, _ = work_on(here, tmp_path / "corpus")
    hand = Hand(work, BYTES, num_threads=1)
    for lane in planned:
        Job(lane, 30).do(hand, lambda *_: None)
    assert made_in(here) == made_in(tmp_path / "there")
    assert any(len(shards.records(here, lane.number)) > 1 for lane in planned)


def test_no_more_processes_are_started_than_there_are_lanes(started, tmp_path):
    made.write_corpus(tmp_path / "corpus", num_files=2)
    _, planned, setup = work_on(tmp_path / "there", tmp_path / "corpus")
    run(setup, planned[:2], num_workers=5)
    assert len(started) == 2


def test_a_users_mistake_comes_out_word_for_word(started, tmp_path):
    made.write_corpus(tmp_path / "corpus")
    file = tmp_path / "corpus" / "3.jsonl"
    file.write_text(file.read_text() + '{"text": 5}\n')
    work, planned, setup = work_on(tmp_path / "there", tmp_path / "corpus")
    hand = Hand(work, BYTES, num_threads=1)
    with pytest.raises(UserError) as here:
        for lane in planned:
            Job(lane, None).do(hand, lambda *_: None)
    assert "3.jsonl line 44" in str(here.value)
    with pytest.raises(UserError) as there:
        run(setup, planned)
    assert str(there.value) == str(here.value)


def test_what_a_process_cannot_set_up_is_the_users_mistake_too(started, tmp_path):
    made.write_corpus(tmp_path / "corpus")
    _, planned, setup = work_on(tmp_path / "there", tmp_path / "corpus")
    (tmp_path / "there" / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"there/tokenizer\.json"):
        run(setup, planned)


def test_a_full_disk_in_a_process_is_the_same_error_here(started, tmp_path):
    made.write_corpus(tmp_path / "corpus")
    _, planned, setup = work_on(tmp_path / "there", tmp_path / "corpus")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, old[1]))
    try:
        with pytest.raises(OSError, match="File too large") as error:
            run(setup, planned)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, ignored)
    assert error.value.errno == errno.EFBIG


def large_corpus(folder):
    """Write files that take their time."""
    folder.mkdir()
    row = json.dumps({"text": "some text " * 20}) + "\n"
    for number in range(4):
        (folder / f"{number}.jsonl").write_text(row * 10_000)


def test_a_process_that_is_killed_is_named_by_what_it_read(started, tmp_path):
    """Fault 42, data: kill -9 of a process that prepares data.

    Promise: the build stops and names the file that the process was reading.
    """
    large_corpus(tmp_path / "corpus")
    _, planned, setup = work_on(tmp_path / "there", tmp_path / "corpus")
    killed = []

    def kill(name, *_):
        if not killed:
            killed.append(name)
            os.kill(started[int(name[0])].pid, signal.SIGKILL)

    with pytest.raises(RuntimeError) as error:
        run(setup, planned, report=kill)
    assert str(error.value) == (
        "a process that builds a token store must live; it ended with status -9 while "
        f"it read {killed[0]}. Was there memory enough? Start again: finished shards "
        "are kept."
    )
    assert not isinstance(error.value, UserError)
    assert len(started) == 2


def test_what_a_process_cannot_explain_is_on_its_stderr(started, tmp_path, capfd):
    made.write_corpus(tmp_path / "corpus")
    work, planned, setup = work_on(tmp_path / "there", tmp_path / "corpus")
    work = dataclasses.replace(work, source={"kind": "none of ours"})
    expected = r"status 1 while it read 0\.jsonl\. It says why above\. "
    with pytest.raises(RuntimeError, match=expected):
        run(dataclasses.replace(setup, work=work), planned, num_workers=1)
    assert capfd.readouterr().err.rstrip().endswith("KeyError: 'none of ours'")


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_error_here_ends_all_processes(error, started, tmp_path):
    large_corpus(tmp_path / "corpus")
    _, planned, setup = work_on(tmp_path / "there", tmp_path / "corpus")

    def fail(*_):
        raise error

    with pytest.raises(error):
        run(setup, planned, report=fail)
    assert [process.returncode for process in started] == [-9, -9]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_leaves_a_process_at_work(number, started, tmp_path):
    """Fault 5, stopping: SIGTERM comes to the processes that prepare data, too.

    Promise: they work on until whoever started them ends.
    """
    made.write_corpus(tmp_path / "corpus")
    _, planned, setup = work_on(tmp_path / "there", tmp_path / "corpus")
    groups = []

    def interrupt(*_):
        for process in started:
            if process.poll() is None:
                groups.append(os.getpgid(process.pid))
                os.kill(process.pid, number)

    run(setup, planned, num_workers=1, report=interrupt)
    assert groups
    assert os.getpgid(0) not in groups
    assert {process.returncode for process in started} == {0}


# Starts a build that says the pids of its processes, and then waits for them.
STARTER = """
    import sys
    from pathlib import Path
    from fm_jax.data import worker
    from tests.data import test_worker
    start = worker.subprocess.Popen
    def note(*args, **options):
        process = start(*args, **options)
        print(process.pid, flush=True)
        return process
    worker.subprocess.Popen = note
    folder = Path(sys.argv[1])
    _, planned, setup = test_worker.work_on(folder / "there", folder / "corpus")
    test_worker.run(setup, planned)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
def test_processes_end_when_whoever_started_them_is_killed(tmp_path):
    large_corpus(tmp_path / "corpus")
    code = "\n".join(line[4:] for line in STARTER.splitlines())
    with subprocess.Popen(
        [sys.executable, "-B", "-c", code, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(worker.__file__).parents[2],
    ) as starter:
        pids = [int(starter.stdout.readline()) for _ in range(2)]
        assert all(map(made.is_alive, pids))
        starter.kill()
    deadline = time.monotonic() + 10
    while any(map(made.is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(made.is_alive, pids))


def test_a_process_finds_the_package_and_nothing_in_the_folder_it_is_in(
    started, tmp_path, monkeypatch
):
    made.write_corpus(tmp_path / "corpus")
    _, planned, setup = work_on(tmp_path / "there", tmp_path / "corpus")
    (tmp_path / "json.py").write_text("raise ImportError('not this one')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "of the user")
    environments = []
    start = worker.subprocess.Popen

    def note(*args, env, **options):
        environments.append(env)
        return start(*args, env=env, **options)

    monkeypatch.setattr(worker.subprocess, "Popen", note)
    run(dataclasses.replace(setup, num_threads=3), planned, num_workers=1)
    (env,) = environments
    root = Path(worker.__file__).parents[2]
    assert env["PYTHONPATH"] == f"{root}{os.pathsep}of the user"
    assert env["RAYON_NUM_THREADS"] == "3"
    assert env["TOKENIZERS_PARALLELISM"] == "true"


def test_a_process_imports_nothing_heavy():
    heavy = ["jax", "tensorflow", "tensorflow_datasets", "datasets", "pyarrow"]
    heavy += ["tokenizers", "tiktoken", "sentencepiece", "fsspec", "rich"]
    code = "import sys, fm_jax.data.worker\n"
    code += f"print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(worker.__file__).parents[2],
    )
    assert done.stdout.strip() == "[]"
