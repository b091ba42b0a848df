"""Tests of files under URLs, in fsspec's own memory and by file://."""

import gzip
import io
import json
import sys

import fsspec
import pytest
from fsspec.spec import AbstractBufferedFile

from fm_jax.corpora import digests, documents, files, remote, sources
from fm_jax.corpora.documents import Reading
from tests.corpora.made import (
    PACK,
    POLICY,
    make,
    met,
    over,
    read,
    refusal,
    texts,
    write_corpus,
)
from tests.corpora.test_columns import write as write_columns
from tests.corpora.test_records import write as write_records


@pytest.fixture
def memory():
    """Return `memory(name, bytes)`, which writes a file; all are gone afterwards."""
    system = fsspec.filesystem("memory")

    def write(name, raw):
        system.pipe_file(f"/fm/{name}", raw)

    yield write
    system.rm("/fm", recursive=True)


def named(*urls):
    return files.matching(urls, "data.paths")


def test_a_folder_a_glob_and_a_name_are_found_by_url(memory):
    for name in ["a.txt", "in/b.jsonl.gz", "in/deep/c.md", "in/no.png"]:
        memory(name, b"x")
    url = "memory://fm"
    every = {"a.txt", "in/b.jsonl.gz", "in/deep/c.md"}
    assert set(named(url)) == set(named(f"{url}/")) == set(named(f"{url}/**")) == every
    assert named(f"{url}/*.txt") == {"a.txt": "memory:///fm/a.txt"}
    assert set(named(f"{url}/in/*")) == {"b.jsonl.gz", "deep/c.md"}
    assert set(named(f"{url}/in/deep/c.md", f"{url}/*.txt")) == {
        "a.txt",
        "in/deep/c.md",
    }


def test_what_is_hidden_in_a_remote_folder_is_left_out_unless_it_is_named(memory):
    for name in ["a.txt", ".b.txt", ".git/c.txt", "in/.d/e.txt"]:
        memory(name, b"x")
    assert list(named("memory://fm")) == list(named("memory://fm/**")) == ["a.txt"]
    assert list(named("memory://fm/.git")) == ["c.txt"]
    assert list(named("memory://fm/.*.txt")) == [".b.txt"]


class Stream(AbstractBufferedFile):
    """A remote file that gives a few bytes at a time, as one read by HTTP may."""

    def __init__(self, raw, fails_at):
        super().__init__(None, "/fm/a", size=len(raw))
        self._raw, self._fails_at = io.BytesIO(raw), fails_at

    def read(self, length=-1):
        if self._raw.tell() >= self._fails_at:
            raise Lost("connection lost\nat last")
        return self._raw.read(min(length, 7) if length >= 0 else 7)


class Lost(Exception):
    """What a system of its own raises."""


@pytest.fixture
def slow(memory, monkeypatch):
    """Return `slow(name, bytes, fails_at)`: a file that is read by a Stream."""

    def write(name, raw, fails_at=1 << 30):
        memory(name, raw)
        system = type(fsspec.filesystem("memory"))
        monkeypatch.setattr(system, "open", lambda *args: Stream(raw, fails_at))

    return write


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_a_file_that_comes_in_small_parts_is_read_whole(suffix, packing, slow):
    rows = [f"row {n}" for n in range(9)]
    raw = "".join(json.dumps({"text": row}) + "\n" for row in rows)
    slow(f"a{suffix}{packing}", PACK[packing](raw.encode()))
    expected = rows if suffix == ".jsonl" else [raw]
    assert texts(f"memory://fm/a{suffix}{packing}") == expected


@pytest.mark.parametrize("policy", documents.ON_BAD_TEXT)
@pytest.mark.parametrize("suffix", [".txt", ".jsonl.gz", ".parquet"])
def test_a_connection_that_is_lost_is_refused_under_every_policy(suffix, policy, slow):
    slow(f"a{suffix}", b'{"text": "a"}\n' * 9, fails_at=0)
    source = over(f"memory://fm/a{suffix}")
    assert refusal(met, source, on_bad_text=policy) == (
        f"data file must be readable to its end; got memory:///fm/a{suffix} "
        "(connection lost). Restore it."
    )


def test_a_url_that_exists_as_it_is_spelt_is_no_glob(memory):
    memory("a[1].txt", b"a")
    memory("a1.txt", b"b")
    assert list(named("memory://fm/a[1].txt")) == ["a[1].txt"]


def test_files_under_urls_are_read_as_those_here_are(memory, tmp_path):
    write_columns(tmp_path / "a.parquet")
    write_records(tmp_path)
    (tmp_path / "a.txt").write_text("ab\n" * 4)
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n\n{"text": "b"}')
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n{}'))
    (tmp_path / "z.txt.zst").write_bytes(b"not it")
    for path in tmp_path.iterdir():
        memory(path.name, path.read_bytes())
    policy = {"on_bad_text": "replace", "max_document_bytes": 6}
    here = met(over(tmp_path), **policy)
    assert len(here[0]) > 12
    assert set(here[1]["skipped"]) == {"missing text", "cut short"}
    assert met(over("memory://fm"), **policy) == here
    assert met(over(f"file://{tmp_path}"), **policy) == here


def test_a_large_file_under_a_url_is_one_piece(memory, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PIECE_BYTES", 1)
    path = write_records(tmp_path)
    memory("a.jsonl", b'{"text": "a"}\n{"text": "b"}')
    memory(path.name, path.read_bytes())
    pieces = over("memory://fm").pieces("train")
    sizes = [("a.array_record", path.stat().st_size), ("a.jsonl", 27)]
    assert [(p.name, p.size) for p in pieces] == sizes
    assert {(p.start, p.stop) for p in pieces} == {(0, -1)}
    path = write_columns(tmp_path / "b.parquet")
    memory("b.parquet", path.read_bytes())
    pieces = over("memory://fm").pieces("train")
    assert [p.stop for p in pieces] == [-1, -1, 1, 2, 3, 4]


def test_an_archive_is_refused():
    url = "zip://in/*::file:///c.zip"
    assert refusal(named, url) == (
        f"data.paths must hold plain URLs; got {url!r}. Unpack the archive, or name "
        "what lies under the cache."
    )


# Identities, and what changes.


def test_the_identity_of_a_remote_file_follows_what_is_written(memory):
    memory("a.txt", b"one")
    first = make(paths=("memory://fm/a.txt",)).identity("train")
    assert make(paths=("memory://fm/a.txt",)).identity("train") == first
    memory("a.txt", b"two")
    assert make(paths=("memory://fm/a.txt",)).identity("train") != first


ENTRIES = [
    ({"size": 3, "ETag": '"a1"', "LastModified": "x"}, 'ETag "a1", 3 bytes'),
    ({"size": 3, "generation": 7, "mtime": "x"}, "generation 7, 3 bytes"),
    ({"size": 0, "mtime": 5.0}, "mtime 5.0, 0 bytes"),
    ({"size": None, "etag": None}, "ukey 0f, None bytes"),
]


@pytest.mark.parametrize(("entry", "version"), ENTRIES)
def test_the_surest_thing_told_of_a_remote_file_stands_for_its_content(
    entry, version, monkeypatch
):
    system = type(fsspec.filesystem("memory"))
    monkeypatch.setattr(system, "info", lambda self, path: entry)
    monkeypatch.setattr(system, "ukey", lambda self, path: "0f")
    assert remote.version("memory://fm/a.txt") == (version, entry["size"] or 0)
    [known] = digests.known(["memory://fm/a.txt"], None).values()
    assert known == digests.Known(version, version, entry["size"] or 0)


@pytest.mark.parametrize("policy", documents.ON_BAD_TEXT)
def test_a_remote_file_that_changes_is_refused_under_every_policy(policy, memory):
    rows = b"".join(json.dumps({"text": f"{n}"}).encode() + b"\n" for n in range(3))
    for when in ("before", "while"):
        memory("a.jsonl", rows)
        source = over("memory://fm/a.jsonl")
        [piece] = source.pieces("train")
        reading = Reading(**POLICY | {"on_bad_text": policy})
        found = sources.open_reader(source.spec("train"))(piece, reading)
        if when == "while":
            assert next(found) == (1, "0")
        memory("a.jsonl", rows * 2)
        text = refusal(lambda found=found: list(found))
        assert text.startswith(
            "data file must not change until it is read; got memory:///fm/a.jsonl "
            f"({piece.stamp} then, created "
        )
        assert text.endswith(
            f", {len(rows) * 2} bytes now). Start again when nothing writes to it."
        )


@pytest.mark.parametrize("policy", documents.ON_BAD_TEXT)
def test_a_remote_file_that_has_gone_since_is_refused(policy, memory):
    memory("a.txt", b"one")
    source = over("memory://fm/a.txt")
    source.identity("train")
    fsspec.filesystem("memory").rm("/fm/a.txt")
    memory("b.txt", b"left")
    assert refusal(met, source, on_bad_text=policy).startswith(
        "data file must not change until it is read; got memory:///fm/a.txt ("
    )


def test_a_remote_file_of_which_nothing_is_told_is_unreadable(memory, monkeypatch):
    memory("a.txt", b"one")
    source = over("memory://fm/a.txt")
    system = type(fsspec.filesystem("memory"))

    class Odd(Exception):
        """What a system of its own raises."""

    def forbidden(*args, **kwargs):
        raise Odd("403 Forbidden\nand a page of it")

    monkeypatch.setattr(system, "info", forbidden)
    monkeypatch.setattr(system, "open", forbidden)
    assert source.identity("train")["files"] == {"a.txt": "unreadable"}
    found, counted = met(source, on_bad_text="skip")
    assert (found, counted["skipped"]) == ([], {"unreadable": 1})
    assert refusal(read, source) == (
        "data file must be readable; got memory:///fm/a.txt (403 Forbidden). Restore "
        "it, take it out of data.paths, or set --config.data.on_bad_text=skip."
    )


# What is refused.


def test_urls_that_match_nothing_are_refused(memory):
    memory("a.png", b"x")
    for url in ["memory://fm/b.txt", "memory://fm/*.txt", "memory://fx"]:
        assert (
            refusal(named, url) == f"data.paths must match files; got none for {url!r}."
        )
    assert refusal(named, "memory://fm/a.png") == (
        "data.paths must name text (.txt, .md, .py and the like), .jsonl, each also "
        ".gz or .zst, .parquet or .array_record; got memory:///fm/a.png. Name it .txt "
        "if it is text."
    )


def test_an_unknown_protocol_is_refused():
    text = refusal(named, "memroy://fm/a.txt")
    assert text.startswith(
        "the protocol in data.paths must be one of the known names; got 'memroy'. "
        "Did you mean 'memory'? Known: memory, "
    )


@pytest.mark.parametrize(("protocol", "package"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_a_protocol_whose_library_is_missing_names_it(protocol, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    text = refusal(named, f"{protocol}://bucket/a.txt")
    assert text.startswith(
        f"data.paths with {protocol}:// must have its library installed; got "
        f"'{protocol}://bucket/a.txt' ("
    )
    assert text.endswith(f"). pip install {package}.")


def test_without_fsspec_a_url_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    assert refusal(named, "memory://fm/a.txt") == (
        "data.paths with a URL must have fsspec installed; got 'memory://fm/a.txt'. "
        "pip install fsspec."
    )


def test_a_place_that_cannot_be_reached_is_refused(memory, monkeypatch):
    def down(*args, **kwargs):
        raise TimeoutError("no answer\nat all")

    memory("a.txt", b"x")
    monkeypatch.setattr(type(fsspec.filesystem("memory")), "info", down)
    assert refusal(named, "memory://fm/a.md") == (
        "data.paths must be reachable; got 'memory://fm/a.md' (no answer)."
    )


def test_what_a_corpus_here_is_called_is_not_what_a_remote_one_is(memory, tmp_path):
    write_corpus(tmp_path, 1)
    memory("part0/0.txt", b"far")
    assert list(named("memory://fm", str(tmp_path))) == [
        f"{tmp_path}/part0/0.txt",
        "memory:///fm/part0/0.txt",
    ]
