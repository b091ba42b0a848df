"""Tests of digests: what they are of, when they are kept, when they are not."""

import contextlib
import hashlib
import os
import pathlib
import sqlite3
import time

import pytest

from fm_jax.corpora import digests, streams
from fm_jax.corpora.digests import Known

UNREADABLE = Known("unreadable", "unreadable", 0)


def blake2b(raw):
    return hashlib.blake2b(raw).hexdigest()[:32]


def write(folder, *, age=10, **texts):
    """Write files of an age in seconds and return their paths."""
    paths = []
    for name, text in texts.items():
        path = folder / f"{name}.txt"
        path.write_text(text)
        when = time.time_ns() - int(age * 1e9)
        os.utime(path, ns=(when, when))
        paths.append(str(path))
    return paths


@pytest.fixture
def hashed(monkeypatch):
    """Return the list of the paths that are hashed from now on."""
    seen, real = [], digests._digest

    def digest(path):
        seen.append(path)
        return real(path)

    monkeypatch.setattr(digests, "_digest", digest)
    return seen


@pytest.mark.parametrize("size", [0, 1, 3_000_000])
def test_a_digest_is_blake2b_of_the_bytes(size, tmp_path):
    raw = b"ab" * size
    path = tmp_path / "a.gz"
    path.write_bytes(raw)
    os.utime(path, ns=(7, 1234567890123456789))
    assert digests.known([str(path)], None) == {
        str(path): Known(
            blake2b(raw), f"{2 * size} bytes, mtime 1234567890123456789", 2 * size
        )
    }


def test_every_file_is_known_however_many(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "FILES_TOGETHER", 3)
    paths = write(tmp_path, **{f"f{n}": str(n) for n in range(11)})
    found = digests.known(paths, tmp_path / "cache")
    assert {path: known.digest for path, known in found.items()} == {
        path: blake2b(str(n).encode()) for n, path in enumerate(paths)
    }


def test_a_file_is_hashed_once_as_long_as_it_is_the_same(tmp_path, hashed):
    cache = tmp_path / "new" / "cache"
    paths = write(tmp_path, a="one", b="two")
    first = digests.known(paths, cache)
    assert sorted(hashed) == paths
    assert digests.known(paths, cache) == first
    assert len(hashed) == 2
    assert (cache / "digests.sqlite").is_file()
    assert digests.known(paths, None) == first
    assert len(hashed) == 4


def test_a_file_of_another_size_time_or_inode_is_hashed_again(tmp_path, hashed):
    cache = tmp_path / "cache"
    [path] = write(tmp_path, a="one")
    digests.known([path], cache)
    status = os.stat(path)

    def touch():
        os.utime(path, ns=(5, 10**18))

    def grow():
        write(tmp_path, a="four")
        os.utime(path, ns=(5, 10**18))

    def replace():
        beside = write(tmp_path, beside="five")[0]
        os.utime(beside, ns=(5, 10**18))
        os.replace(beside, path)
        assert os.stat(path).st_ino != status.st_ino

    for count, change in enumerate([touch, grow, replace], start=2):
        change()
        raw = pathlib.Path(path).read_bytes()
        for _ in range(2):
            assert digests.known([path], cache)[path].digest == blake2b(raw)
            assert len(hashed) == count


@pytest.mark.parametrize("age", [0, 1.5, -100])
def test_the_digest_of_a_file_that_may_still_be_written_is_not_kept(
    age, tmp_path, hashed
):
    [path] = write(tmp_path, age=age, a="one")
    for count in (1, 2):
        digests.known([path], tmp_path / "cache")
        assert len(hashed) == count
    write(tmp_path, a="one")
    for _ in range(2):
        digests.known([path], tmp_path / "cache")
        assert len(hashed) == 3


def test_the_digest_of_a_file_that_changes_under_it_is_not_kept(tmp_path, hashed):
    [path] = write(tmp_path, a="one")
    files = {path: os.stat(path)}

    def slow(path):
        os.utime(path, ns=(5, 10**18))
        return "between"

    assert digests.facts(files, "word", slow, tmp_path) == {path: "between"}
    assert digests.facts(files, "word", lambda path: "anew", tmp_path) == {path: "anew"}
    assert digests.facts(files, "other", os.unlink, tmp_path) == {}


def test_what_cannot_be_read_is_unreadable_and_asked_for_again(tmp_path, hashed):
    cache = tmp_path / "cache"
    link, pipe = tmp_path / "link.txt", tmp_path / "pipe.txt"
    link.symlink_to(tmp_path / "nowhere")
    os.mkfifo(pipe)
    [good] = write(tmp_path, good="one")
    found = digests.known([str(link), str(pipe), good], cache)
    assert found[str(link)] == found[str(pipe)] == UNREADABLE
    assert found[good].digest == blake2b(b"one")
    write(tmp_path, nowhere="two")
    os.replace(tmp_path / "nowhere.txt", tmp_path / "nowhere")
    assert digests.known([str(link)], cache)[str(link)].digest == blake2b(b"two")


def test_a_file_that_may_not_be_read_any_more_is_unreadable_though_it_was_kept(
    tmp_path, monkeypatch
):
    cache = tmp_path / "cache"
    [path] = write(tmp_path, a="one")
    digests.known([path], cache)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert digests.known([path], cache) == {path: UNREADABLE}


def test_a_file_whose_reading_fails_is_unreadable(tmp_path, monkeypatch):
    [path] = write(tmp_path, a="one")

    def failing(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(streams, "open_raw", failing)
    assert digests.known([path], None) == {path: UNREADABLE}


def test_a_name_that_is_not_utf8_is_kept_too(tmp_path, hashed):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.txt")
    with open(path, "w") as stream:
        stream.write("one")
    os.utime(path, ns=(5, 5))
    for _ in range(2):
        assert digests.known([path], tmp_path)[path].digest == blake2b(b"one")
    assert hashed == [path]


# Where they are kept.


@pytest.mark.parametrize("damage", ["head", "middle", "folder"])
def test_a_broken_database_is_made_anew(damage, tmp_path, hashed):
    file = tmp_path / "digests.sqlite"
    paths = write(tmp_path, **{f"file{n}": str(n) for n in range(300)})
    first = digests.known(paths, tmp_path)
    raw = bytearray(file.read_bytes())
    if damage == "head":
        raw[:100] = b"not a database" * 7 + b"  "
    elif damage == "middle":
        raw[4096:] = b"\xff" * len(raw[4096:])
    file.write_bytes(raw)
    if damage == "folder":  # which cannot be deleted as a file is
        file.unlink()
        file.mkdir()
    hashed.clear()
    assert digests.known(paths, tmp_path) == first
    assert sorted(hashed) == sorted(paths)
    if damage != "folder":
        digests.known(paths, tmp_path)  # what was broken in the middle is remade here
        hashed.clear()
        assert digests.known(paths, tmp_path) == first
        assert hashed == []


def test_a_cache_that_cannot_be_written_is_read_and_no_error(
    tmp_path, hashed, monkeypatch
):
    one, two = write(tmp_path, a="one", b="two")
    first = digests.known([one], tmp_path)
    real = sqlite3.connect

    def read_only(file, **options):
        return real(f"file:{file}?mode=ro", uri=True, **options)

    monkeypatch.setattr(sqlite3, "connect", read_only)
    for _ in range(2):
        hashed.clear()
        assert digests.known([one, two], tmp_path) == first | digests.known([two], None)
        assert hashed == [two, two]


def test_a_cache_that_cannot_be_made_is_no_error(tmp_path):
    [path] = write(tmp_path, a="one")
    for cache in [tmp_path / "a.txt", tmp_path / "a.txt" / "cache"]:
        assert digests.known([path], cache)[path].digest == blake2b(b"one")


def test_a_database_that_another_process_writes_for_long_is_no_error(
    tmp_path, monkeypatch, hashed
):
    one, two = write(tmp_path, a="one", b="two")
    digests.known([one], tmp_path)
    hashed.clear()
    monkeypatch.setattr(digests, "LOCKED_SECONDS", 0.05)
    with contextlib.closing(sqlite3.connect(tmp_path / "digests.sqlite")) as other:
        other.execute("begin immediate")
        found = digests.known([one, two], tmp_path)
    assert hashed == [two]
    assert found[two].digest == blake2b(b"two")


def test_facts_are_written_while_others_are_made(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "WRITE_SECONDS", -1)
    paths = write(tmp_path, a="one", b="two")

    def killed(path):
        if path == paths[1]:
            raise KeyboardInterrupt
        return "one"

    files = {path: os.stat(path) for path in paths}
    monkeypatch.setattr(digests, "FILES_TOGETHER", 1)
    with pytest.raises(KeyboardInterrupt):
        digests.facts(files, "word", killed, tmp_path)
    assert digests.facts(files, "word", {paths[1]: "two"}.get, tmp_path) == {
        paths[0]: "one",
        paths[1]: "two",
    }


def test_facts_of_another_kind_are_others(tmp_path):
    [path] = write(tmp_path, a="one")
    files = {path: os.stat(path)}
    for what, value in [("ends", [[1, 2], [3, 4]]), ("rows", 0)]:
        for _ in range(2):
            found = digests.facts(files, what, lambda path, v=value: v, tmp_path)
            assert found == {path: value}
    kept = digests.facts(files, "ends", lambda path: 1 / 0, tmp_path)
    assert kept == {path: [[1, 2], [3, 4]]}


def test_other_content_under_the_old_size_and_mtime_is_hashed_again(tmp_path):
    [path] = write(tmp_path, a="one")
    cache, status = tmp_path / "cache", os.stat(path)
    digests.known([path], cache)
    with open(path, "r+") as stream:
        stream.write("two")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert os.stat(path).st_ino == status.st_ino
    assert digests.known([path], cache)[path].digest == blake2b(b"two")


def test_a_kept_fact_that_is_no_json_is_made_anew(tmp_path, hashed):
    [path] = write(tmp_path, a="one")
    first = digests.known([path], tmp_path)
    with contextlib.closing(sqlite3.connect(tmp_path / "digests.sqlite")) as base, base:
        base.execute("update facts set value = 'x'")
    hashed.clear()
    for _ in range(3):
        assert digests.known([path], tmp_path) == first
    assert hashed == [path, path]  # it is known to be broken, remade, and kept
