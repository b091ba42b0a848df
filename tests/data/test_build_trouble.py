"""Tests of what trouble leaves of a build, and of several builds of one store."""

import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from fm_jax.data.lanes import Sizes
from fm_jax.errors import UserError
from tests.data import made
from tests.data.made import (
    BYTES,
    SIZES,
    TEXTS,
    build,
    contents,
    corpus_of,
    left_in,
    refusal,
    start,
    texts_of,
)


@pytest.mark.parametrize("texts", [[], [""], ["held out"]], ids=len)
def test_an_empty_corpus_is_refused_and_leaves_nothing(texts, tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number, text in enumerate(texts or [""]):
        (corpus / f"{number}.txt").write_text(text)
    split = "train" if made.fraction_of("held out") < 0.25 else "eval"
    source = made.source_of(corpus)
    options = {"tokenizer": BYTES, "split": split, "source": source}
    if not texts:
        source.files[split].clear()
    assert refusal(made.build_files, tmp_path, **options) == (
        f"the corpus must have text to {'train on' if split == 'train' else 'hold out'}"
        "; got no document of that split. A plain file is one document: name held-out "
        "files in data.eval_paths, or change data.eval_fraction."
    )
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, UserError])
@pytest.mark.parametrize("after", ["no shard", "a shard"])
def test_a_build_that_is_interrupted_is_gone_on_with_from_its_shards(
    after, error, tmp_path, monkeypatch
):
    """A shard is finished after the first document, or none is."""
    read, say = made.read_list, []
    sizes = Sizes(shard_tokens=4 if after == "a shard" else 100, batch_bytes=1)
    options = {"sizes": sizes, "say": say.append}

    def fail(spec):
        def stop(piece, reading):
            yield from itertools.islice(read(spec)(piece, reading), 4)
            raise error("of the test")

        return stop

    monkeypatch.setattr(made, "read_list", fail)
    with pytest.raises(error):
        build(tmp_path, TEXTS, BYTES, **options)
    left = left_in(tmp_path)
    if after == "no shard":
        assert left == []
    else:
        (name,) = left
        assert name.endswith(".building")
    monkeypatch.setattr(made, "read_list", read)
    built = build(tmp_path, TEXTS, BYTES, **options)
    assert texts_of(built) == TEXTS
    words = "Going on with" if after == "a shard" else "Building"
    assert say[1] == f"{words} a token store in {built.path}"
    assert left_in(tmp_path) == [built.path.name]
    whole = build(tmp_path / "other", TEXTS, BYTES, sizes=sizes)
    assert contents(built) == contents(whole)


# Ends a process at its n-th call of what changes or settles files, for all n; after
# each, another process builds to the end.
DIER = """
    import os, shutil, sys
    from pathlib import Path
    from fm_jax.data.lanes import Sizes
    from fm_jax.tokenizers.plain import ByteTokenizer
    from tests.data import made
    folder = Path(sys.argv[1])
    sizes = Sizes(lane_bytes=1, shard_tokens=1000, batch_bytes=400)
    options = {"tokenizer": ByteTokenizer(), "split": "eval", "deduplicate": True}
    options |= {"sizes": sizes, "num_workers": 1}
    def build(cache):
        return made.build_files(cache, folder / "corpus", **options)
    def dying(calls):
        left = [calls]
        def wrap(function):
            def call(*args, **kwargs):
                left[0] -= 1
                if left[0] < 0:
                    os._exit(9)
                return function(*args, **kwargs)
            return call
        for name in ("replace", "rename", "fsync", "unlink", "rmdir"):
            setattr(os, name, wrap(getattr(os, name)))
    os.fsync = lambda file: None  # what is killed is a process, and no machine
    whole = made.contents(build(folder / "whole"))
    for calls in range(10_000):
        cache = folder / "cache"
        if not (pid := os.fork()):
            dying(calls)
            build(cache)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status == 0:
            break
        assert status == 9, status
        assert made.contents(build(cache)) == whole, calls
        names = [path.name for path in (cache / "stores").iterdir()]
        assert len(names) == 2, names
        shutil.rmtree(cache)
    print(calls, len(whole))
"""


def test_a_build_killed_at_any_change_of_a_file_is_gone_on_with(tmp_path):
    made.write_corpus(tmp_path / "corpus", num_files=2, num_documents=40)
    with start(DIER, tmp_path) as process:
        said, _ = process.communicate(timeout=100)
    assert process.returncode == 0
    calls, num_files = map(int, said.split())
    assert calls > 50
    assert num_files == 2 + 8  # shards, and the others


BUILDER = """
    import json, sys
    from pathlib import Path
    from fm_jax.data.lanes import Sizes
    from fm_jax.tokenizers.plain import ByteTokenizer
    from tests.data import made
    cache, corpus, options = sys.argv[1:]
    options = json.loads(options)
    sizes = Sizes(**options.pop("sizes"))
    say = lambda line: print(line, flush=True)
    built = made.build_files(Path(cache), Path(corpus), tokenizer=ByteTokenizer(),
                             sizes=sizes, say=say, **options)
    print(built.path, flush=True)
"""


def children_of(pid):
    return [
        int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    ]


def are_gone(pids):
    """Return whether processes end within ten seconds."""
    deadline = time.monotonic() + 10
    while pids and time.monotonic() < deadline:
        pids = [pid for pid in pids if made.is_alive(pid)]
        time.sleep(0.01)
    return not pids


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="needs Linux's /proc"
)


@pytest.mark.slow
@needs_proc
def test_a_build_of_processes_killed_at_random_ends_as_if_it_never_was(tmp_path):
    """A dozen kills, each after some more files were made, or right at the start."""
    corpus, cache = tmp_path / "corpus", tmp_path / "cache"
    made.write_corpus(corpus, num_files=12, num_documents=3000)
    sizes = {"lane_bytes": 200_000, "shard_tokens": 12_000, "batch_bytes": 2_000}
    options = {"num_workers": 2, "sizes": sizes | {"process_bytes": 0}}
    options |= {"deduplicate": True}
    rng = random.Random(5)

    def begin(cache):
        return start(BUILDER, cache, corpus, json.dumps(options))

    def num_files():
        return sum(1 for _ in cache.rglob("parts/[0-9]*"))

    with begin(tmp_path / "whole") as process:
        *_, path = process.communicate(timeout=60)[0].split()
    whole = {file.name: file.read_bytes() for file in Path(path).iterdir()}
    assert len(whole) > 100
    num_begun = 0
    for _ in range(12):
        enough = num_files() + rng.randrange(35)
        with begin(cache) as process:
            num_begun += process.stdout.readline().startswith("Going on with")
            while num_files() < enough and process.poll() is None:
                time.sleep(0.002)
            time.sleep(rng.uniform(0.0, 0.02))
            assert process.poll() is None
            children = children_of(process.pid)
            process.kill()
        assert are_gone(children)
    with begin(cache) as process:
        *_, path = process.communicate(timeout=60)[0].split()
    found = {file.name: file.read_bytes() for file in Path(path).iterdir()}
    assert found == whole
    assert num_begun >= 8
    assert left_in(cache) == [Path(path).name]


@needs_proc
def test_of_a_build_whose_process_dies_none_is_left_and_the_next_goes_on(tmp_path):
    """Fault 42, data: kill -9 of a process that prepares data.

    Promise: no process is left, and the next start goes on from the shards that are
    finished, to the same texts.
    """
    corpus, of = corpus_of(tmp_path, num_files=8, num_documents=3000)
    sizes = {"lane_bytes": 50_000, "shard_tokens": 5_000, "batch_bytes": 1_000}
    options = {"num_workers": 2, "sizes": sizes | {"process_bytes": 0}}
    arguments = (tmp_path / "cache", corpus, json.dumps(options))
    with start(BUILDER, *arguments, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        while len(children := children_of(process.pid)) < 2:
            time.sleep(0.001)
        while not list((tmp_path / "cache").rglob("parts/*.json")):
            time.sleep(0.001)
        os.kill(children[1], signal.SIGKILL)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    last = said.strip().splitlines()[-1]
    assert last.startswith(
        "fm_jax.errors.OutOfMemoryError: a process that builds a token store must "
        "live; it ended with status -9 while it read "
    )
    assert are_gone(children)
    with start(BUILDER, *arguments) as process:
        first, *_, path = process.communicate(timeout=60)[0].splitlines()
    assert first == f"Going on with a token store in {path}"
    built = made.build_files(tmp_path / "cache", corpus, tokenizer=BYTES)
    assert built.path == Path(path)
    assert texts_of(built) == of("train")


def test_a_users_mistake_is_the_same_line_from_a_process(tmp_path):
    corpus, _ = corpus_of(tmp_path)
    with open(corpus / "3.jsonl", "a") as stream:
        stream.write('{"text": \n')
    options = {"tokenizer": BYTES, "sizes": SIZES}
    said = [
        refusal(made.build_files, tmp_path / str(n), corpus, num_workers=n, **options)
        for n in (1, 2)
    ]
    assert said[0] == said[1]
    assert f"{corpus}/3.jsonl line 44" in said[0]


def test_a_file_that_changes_during_the_build_is_refused_and_then_read_anew(tmp_path):
    """Fault 40, data: a text file changes while it is prepared.

    Promise: the build stops with its name, and the next start reads it anew.
    """
    corpus, _ = corpus_of(tmp_path)
    source = made.source_of(corpus)

    def change(line):
        if line.startswith("Building"):
            with open(corpus / "4.jsonl", "a") as stream:
                stream.write('{"text": "a late line"}\n')

    options = {"tokenizer": BYTES, "sizes": SIZES}
    said = refusal(
        made.build_files, tmp_path, source=source, say=change, num_workers=1, **options
    )
    assert f"{corpus}/4.jsonl" in said
    assert "\n" not in said
    stores = {
        split: made.build_files(tmp_path, corpus, split=split, **options)
        for split in ("train", "eval")
    }
    assert "a late line" in texts_of(stores["train"]) + texts_of(stores["eval"])


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize(
    "limit", [700, 6000], ids=["the first shard", "where shards are joined"]
)
def test_a_full_disk_is_one_line_and_the_next_try_goes_on(limit, num_workers, tmp_path):
    """Fault 17, checkpoints: the disk is full while data is prepared.

    Promise: one line names the folder, exit 2, and the next start goes on from the
    shards that are finished.
    """
    corpus, of = corpus_of(tmp_path, num_documents=200)
    options = {"num_workers": num_workers, "tokenizer": BYTES, "sizes": SIZES}
    cache = tmp_path / "cache"
    # The limit of a file stands for a disk that is full.
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        said = refusal(made.build_files, cache, corpus, **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, ignored)
    assert said.startswith(
        f"data.cache_dir must be writable and have room; got {cache}/stores/"
    )
    assert said.endswith(
        " (File too large). Free space or set --config.data.cache_dir."
    )
    assert bool(left_in(cache)) == (limit == 6000)
    lines = []
    built = made.build_files(cache, corpus, say=lines.append, **options)
    words = "Going on with" if limit == 6000 else "Building"
    assert lines[0] == f"{words} a token store in {built.path}"
    assert texts_of(built) == of("train")


def test_a_cache_that_is_a_file_is_refused(tmp_path):
    cache = tmp_path / "cache"
    cache.write_text("")
    said = refusal(build, cache, TEXTS, BYTES)
    assert said.startswith(
        f"data.cache_dir must be writable and have room; got {cache}/stores/"
    )
    assert said.endswith(
        " (Not a directory). Free space or set --config.data.cache_dir."
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_may_not_be_written_is_refused(tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o500)
    said = refusal(build, cache, TEXTS, BYTES)
    assert said.startswith(
        f"data.cache_dir must be writable and have room; got {cache}/stores/"
    )
    assert said.endswith(
        " (Permission denied). Free space or set --config.data.cache_dir."
    )


# Several builds.


def test_the_store_of_a_process_that_was_first_is_taken(tmp_path, monkeypatch):
    first = build(tmp_path / "other", TEXTS, BYTES)
    read = made.read_list

    def be_second(spec):
        shutil.copytree(first.path, tmp_path / "stores" / first.path.name)
        (tmp_path / "stores" / first.path.name / "first").touch()
        return read(spec)

    monkeypatch.setattr(made, "read_list", be_second)
    built = build(tmp_path, TEXTS, BYTES)
    assert (built.path / "first").exists()
    assert texts_of(built) == TEXTS
    assert left_in(tmp_path) == [first.path.name]


# Reads its documents, once it has said so, for as long as the other has not asked.
WAITER = """
    import sys, time
    from pathlib import Path
    from fm_jax.tokenizers.plain import ByteTokenizer
    from tests.data import made
    name, cache = sys.argv[1], Path(sys.argv[2])
    read = made.read_list
    def wait(spec):
        print("reads", flush=True)
        while not (cache / "asked").exists():
            time.sleep(0.01)
        time.sleep(0.3)
        return read(spec)
    made.read_list = wait
    if name == "second":
        (cache / "asked").touch()
    say = lambda line: print(line, flush=True)
    built = made.build(cache, ["text"], ByteTokenizer(), say=say)
    print(*made.texts_of(built))
"""


def test_of_two_processes_one_builds_and_the_other_finds(tmp_path):
    with start(WAITER, "first", tmp_path) as first:
        said = [first.stdout.readline(), first.stdout.readline()]
        with start(WAITER, "second", tmp_path) as second:
            found, _ = second.communicate(timeout=60)
        said += first.communicate(timeout=60)[0].splitlines(keepends=True)
    (name,) = [name for name in left_in(tmp_path) if name != "asked"]
    assert said == [
        f"Building a token store in {tmp_path / 'stores' / name}\n",
        "reads\n",
        "  1 documents, 4 bytes, 6 tokens\n",
        "text\n",
    ]
    assert found == "text\n"
