"""Tests of files read by whatever format: packed, damaged, changed, unreadable."""

import builtins
import dataclasses
import gzip
import io
import json
import os
import tracemalloc

import numpy as np
import pytest
import zstandard

from fm_jax.corpora import documents, formats, lines, sources, streams
from fm_jax.corpora.documents import Piece, Reading
from tests.corpora.made import PACK, POLICY, met, over, refusal, texts, write_records

SKIP = "--config.data.on_bad_text=skip"


# What is read.


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("suffix", [".txt", ".md", ".py", ".rst"])
def test_a_text_file_is_one_document_however_it_is_packed(suffix, packing, tmp_path):
    path = tmp_path / f"one{suffix}{packing}"
    path.write_bytes(PACK[packing]("\ufeffété\r\n\x01 \U0001f642\n".encode()))
    assert met(over(path))[0] == [(path.name, "\ufeffété\r\n\x01 \U0001f642\n")]


@pytest.mark.parametrize("packing", [".gz", ".zst"])
@pytest.mark.parametrize("size", [3, 300_000])
def test_packed_files_joined_end_to_end_are_read_to_the_end(packing, size, tmp_path):
    one, two = (np.random.default_rng(s).bytes(size).hex() for s in (1, 2))
    path = tmp_path / f"joined.txt{packing}"
    path.write_bytes(PACK[packing](one.encode()) + PACK[packing](two.encode()))
    assert texts(path) == [one + two]


def test_what_a_zstd_file_skips_is_no_text(tmp_path):
    skipped = b"\x50\x2a\x4d\x18" + (3).to_bytes(4, "little") + b"abc"
    path = tmp_path / "a.txt.zst"
    path.write_bytes(skipped + PACK[".zst"](b"one ") + skipped + PACK[".zst"](b"two"))
    assert texts(path) == ["one two"]


def test_empty_text_files_are_no_documents_and_counted(tmp_path):
    """Fault 38, data: text files are empty.

    Promise: they are no documents, and counted in the store's header.
    """
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.txt").write_text("b")
    found, counted = met(over(tmp_path))
    assert found == [("b.txt", "b")]
    assert counted == {"skipped": {}, "replaced": {}, "empty": 1, "examples": {}}


def hold_nothing(folder):
    import pyarrow as pa
    import pyarrow.parquet as pq

    nothing = {
        "rows.jsonl": b"",
        "blank.jsonl": b"\n \n",
        "rows.jsonl.gz": gzip.compress(b""),
        "nothing.txt.gz": b"",
        "text.txt.zst": PACK[".zst"](b""),
    }
    for name, raw in nothing.items():
        (folder / name).write_bytes(raw)
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), folder / "a.parquet")
    write_records(folder / "a.array_record", [])
    return sorted([*nothing, "a.parquet", "a.array_record"])


def test_a_container_without_a_document_is_refused_or_counted(tmp_path):
    names = hold_nothing(tmp_path)
    (tmp_path / "z.txt").write_text("z")
    for name in names:
        what = {".parquet": "row", ".array_record": "record"}.get(name[1:])
        what = what or ("line" if "jsonl" in name else "thing")
        problem = "nothing in it" if what == "thing" else f"no {what} in it"
        assert refusal(texts, tmp_path / name) == (
            f"data file must hold a document; got {tmp_path / name} ({problem}). Take "
            f"it out of data.paths or set {SKIP}."
        )
    for policy in ("skip", "replace"):
        found, counted = met(over(tmp_path), on_bad_text=policy)
        assert found == [("z.txt", "z")]
        assert counted["skipped"] == {"empty file": len(names)}
        assert counted["empty"] == 2  # the lines of blank.jsonl
        assert counted["examples"] == {"empty file": names[:3]}


# What is damaged.


def cut(packed):
    return packed[: len(packed) // 2]


def cut_at_once(packed):
    return packed[:5]


def scratch(packed):
    middle = len(packed) // 2
    return packed[:middle] + b"\xff" * 50 + packed[middle + 50 :]


def scratch_the_first_block(packed):
    return packed[:10] + b"\xff" * 4 + packed[14:]  # of a kind that does not exist


def unpacked(packed):
    return b"plain text that someone renamed"


def random_rows():
    random = np.random.default_rng(0).bytes(150_000).hex()
    return [random[n : n + 1000] for n in range(0, len(random), 1000)]


@pytest.mark.parametrize(
    "damage", [cut, cut_at_once, scratch, scratch_the_first_block, unpacked]
)
@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_a_damaged_packed_file_is_refused_or_its_good_lines_kept(
    packing, damage, tmp_path
):
    path, rows = tmp_path / f"a.jsonl{packing}", random_rows()
    raw = "".join(json.dumps({"text": row}) + "\n" for row in rows).encode()
    path.write_bytes(damage(PACK[packing](raw)))
    text = refusal(texts, path)
    assert f"; got {path} " in text
    if damage != scratch:  # which may spoil a line first
        assert text.startswith(f"data file must be whole; got {path} (")
        assert text.endswith(
            "). Restore it, take it out of data.paths, or set "
            f"{SKIP} to leave out what is damaged."
        )
    for policy in ("skip", "replace"):
        found, counted = met(over(path), on_bad_text=policy)
        kept = [text for _, text in found]
        good = 0 if damage not in (cut, scratch) else int(0.4 * len(rows))
        assert kept[:good] == rows[:good]
        assert counted["skipped"]["cut short"] == 1
        assert counted["examples"]["cut short"] == [path.name]
        if damage != scratch:  # whose damage is known by the checksum at the end
            assert kept == rows[: len(kept)]
            assert len(kept) < 1.5 * good + 1
            assert counted["skipped"] == {"cut short": 1}


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_a_text_file_that_was_cut_short_is_left_out_whole(packing, tmp_path):
    path = tmp_path / f"a.txt{packing}"
    path.write_bytes(cut(PACK[packing]("\n".join(random_rows()).encode())))
    assert refusal(texts, path).startswith(f"data file must be whole; got {path} (")
    for policy in ("skip", "replace"):
        found, counted = met(over(path), on_bad_text=policy)
        assert found == []
        assert counted["skipped"] == {"cut short": 1}


def test_a_large_zstd_frame_is_not_unpacked_at_once():
    packed = zstandard.ZstdCompressor().compress(bytes(1 << 28))
    tracemalloc.start()
    stream = streams.unpacked(io.BytesIO(packed), "a.txt.zst")
    assert stream.read(1000) == bytes(1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(packed) < 1 << 16
    assert peak < 1 << 26


# What is too long.


def test_a_long_text_file_is_refused_left_out_or_cut(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("ab\ncd\nefghi" * 3)
    (tmp_path / "b.txt").write_text("b")
    assert refusal(texts, path, max_document_bytes=7) == (
        f"document must have at most data.max_document_bytes; got {path} (over 7 "
        f"bytes). Raise that, or set {SKIP} or =replace."
    )
    policy = {"max_document_bytes": 7}
    found, counted = met(over(tmp_path), on_bad_text="skip", **policy)
    assert found == [("b.txt", "b")]
    assert counted["skipped"] == {"too long": 1}
    found, counted = met(over(tmp_path), on_bad_text="replace", **policy)
    assert found == [
        ("a.txt", "ab\ncd\n"),
        ("a.txt part 2", "efghiab"),
        ("a.txt part 3", "\ncd\n"),
        ("a.txt part 4", "efghiab"),
        ("a.txt part 5", "\ncd\n"),
        ("a.txt part 6", "efghi"),
        ("b.txt", "b"),
    ]
    assert counted["replaced"] == {"too long": 1}
    assert counted["examples"] == {"too long": ["a.txt"]}


def test_the_place_of_a_bad_byte_in_a_part_is_counted_from_the_files_start(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"abc\ndef\n\xffgh")
    reading = Reading(on_bad_text="replace", max_document_bytes=4)
    parts = formats.reader("text")(Piece("a.txt", str(path)), reading)
    assert list(parts) == [(0, "abc\n"), (1, "def\n"), (2, "\ufffdg"), (2, "h")]
    reading.on_bad_text = "skip"  # as long as it takes to be cut
    reading.mends = lambda kind, *_: kind == "too long"
    parts = formats.reader("text")(Piece("a.txt", str(path)), reading)
    assert list(parts) == [(0, "abc\n"), (1, "def\n")]


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("policy", documents.ON_BAD_TEXT)
@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_a_huge_document_is_never_held_whole(
    suffix, policy, packing, tmp_path, monkeypatch
):
    """Fault 38, data: one document is huge.

    Promise: it is refused, left out or cut by data.max_document_bytes, and never held
    in memory whole.
    """
    monkeypatch.setattr(lines, "LINE_BYTES", 1 << 10)
    huge = 1 << 26
    raw = b"a" * huge if suffix == ".txt" else b'{"text": "%s"}' % (b"a" * huge)
    path = tmp_path / f"a{suffix}{packing}"
    path.write_bytes(PACK[packing](raw))
    del raw
    reading = Reading(on_bad_text=policy, max_document_bytes=1 << 16)
    read = formats.reader("text")
    tracemalloc.start()
    try:
        size = sum(len(t) for _, t in read(Piece("a", str(path)), reading))
        assert size == (huge if (suffix, policy) == (".txt", "replace") else 0)
        assert "too long" in reading.examples
    except documents.UserError:
        assert policy == "error"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # A block of zstd that is all one byte unpacks to 32 MiB.
    assert peak < (1 << 25) * 1.1 if packing == ".zst" else peak < 1 << 22


# What changes, and what cannot be read.


def write_rows(folder, suffix, rows):
    """Write rows as one file, or a text file of a line each."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / f"a{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table({"text": rows}), path, row_group_size=2)
    elif suffix == ".array_record":
        write_records(path, [row.encode() for row in rows])
    elif suffix.startswith(".jsonl"):
        raw = "".join(json.dumps({"text": row}) + "\n" for row in rows).encode()
        path.write_bytes(PACK[suffix.removeprefix(".jsonl")](raw))
    else:
        path.write_text("".join(f"{row}\n" for row in rows))
    return path


def append(path):
    with open(path, "ab") as stream:
        stream.write(b"more")


def shorten(path):
    os.truncate(path, os.path.getsize(path) // 2)


def touch(path):
    os.utime(path, ns=(5, 5))


def replace(path):
    beside = path.with_name("beside")
    beside.write_bytes(b"other")
    os.replace(beside, path)


SUFFIXES = [".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".array_record"]


@pytest.mark.parametrize("policy", documents.ON_BAD_TEXT)
@pytest.mark.parametrize("change", [append, shorten, touch])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_that_changes_while_it_is_read_is_refused_under_every_policy(
    suffix, change, policy, tmp_path
):
    if suffix == ".txt" and policy != "replace":
        pytest.skip("one document is read at once")
    path = write_rows(tmp_path, suffix, [f"{n:03}" * 30 for n in range(5)])
    source = over(path)
    [piece] = source.pieces("train")
    reading = Reading(on_bad_text=policy, max_document_bytes=91)
    rows = sources.open_reader(source.spec("train"))(piece, reading)
    assert next(rows)[1].strip() == "000" * 30
    change(path)
    status = path.stat()
    assert refusal(lambda: list(rows)) == (
        f"data file must not change until it is read; got {path} ({piece.stamp} then, "
        f"{status.st_size} bytes, mtime {status.st_mtime_ns} now). Start again when "
        "nothing writes to it."
    )


@pytest.mark.parametrize("policy", documents.ON_BAD_TEXT)
@pytest.mark.parametrize("change", [append, shorten, touch, replace])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_that_changed_before_it_is_read_is_refused_under_every_policy(
    suffix, change, policy, tmp_path
):
    path = write_rows(tmp_path, suffix, ["a", "b"])
    source = over(path)
    pieces = source.pieces("train")
    change(path)
    reading = Reading(**POLICY | {"on_bad_text": policy})
    rows = sources.open_reader(source.spec("train"))(pieces[0], reading)
    assert refusal(lambda: list(rows)).startswith(
        f"data file must not change until it is read; got {path} ({pieces[0].stamp}"
    )


@pytest.mark.parametrize("policy", documents.ON_BAD_TEXT)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_that_has_gone_since_is_refused_under_every_policy(
    suffix, policy, tmp_path
):
    path = write_rows(tmp_path, suffix, ["a", "b"])
    source = over(path)
    source.identity("train")
    path.unlink()
    assert refusal(met, source, on_bad_text=policy) == (
        f"data file must not change until it is read; got {path} (No such file or "
        "directory). Start again when nothing writes to it."
    )


def forbid(path, monkeypatch):
    path.write_text("secret")
    real_open, real_access = builtins.open, os.access

    def refusing(file, *args, **kwargs):
        if file == str(path):
            raise PermissionError(13, "Permission denied", file)
        return real_open(file, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", refusing)
    monkeypatch.setattr(
        os, "access", lambda file, mode: file != str(path) and real_access(file, mode)
    )


def dangle(path, monkeypatch):
    path.symlink_to(path.with_name("nowhere"))


def pipe(path, monkeypatch):
    os.mkfifo(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("hide", "reason"),
    [
        (forbid, "Permission denied"),
        (dangle, "No such file or directory"),
        (pipe, "not a plain file"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_or_counted(
    suffix, hide, reason, tmp_path, monkeypatch
):
    (tmp_path / "z.txt").write_text("z")
    path = tmp_path / f"a{suffix}"
    hide(path, monkeypatch)
    assert refusal(texts, tmp_path) == (
        f"data file must be readable; got {path} ({reason}). Restore it, take it out "
        f"of data.paths, or set {SKIP}."
    )
    for policy in ("skip", "replace"):
        source = over(tmp_path)
        assert source.identity("train")["files"][path.name] == "unreadable"
        found, counted = met(source, on_bad_text=policy)
        assert found == [("z.txt", "z")]
        assert counted["skipped"] == {"unreadable": 1}
        assert counted["examples"] == {"unreadable": [path.name]}


def test_a_file_that_could_not_be_read_and_now_can_is_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.symlink_to(tmp_path / "b")
    source = over(path)
    source.identity("train")
    (tmp_path / "b").write_text("b")
    assert refusal(met, source, on_bad_text="skip").startswith(
        f"data file must not change until it is read; got {path} (unreadable then, "
    )


def test_a_disk_that_fails_is_an_error_under_every_policy(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' * 3)

    class Failing(io.BufferedReader):
        def readline(self, *args):
            raise OSError(5, "Input/output error")

    source = over(path)
    source.identity("train")
    monkeypatch.setattr(streams, "open_raw", lambda p: Failing(io.FileIO(p)))
    for policy in documents.ON_BAD_TEXT:
        assert refusal(met, source, on_bad_text=policy) == (
            f"data file must be readable to its end; got {path} (Input/output error). "
            "Restore it."
        )


def test_a_reader_reads_a_piece_of_which_no_stamp_is_known(tmp_path):
    path = write_rows(tmp_path, ".jsonl", ["a", "b"])
    [piece] = over(path).pieces("train")
    read = formats.reader("text")
    bare = dataclasses.replace(piece, stamp="")
    assert list(read(bare, Reading(**POLICY))) == [(1, "a"), (2, "b")]


def test_a_zstd_file_that_looks_back_further_than_usual_is_read(tmp_path):
    long = zstandard.ZstdCompressionParameters(window_log=31)
    packer = zstandard.ZstdCompressor(compression_params=long).compressobj()
    path = tmp_path / "a.txt.zst"
    path.write_bytes(packer.compress(b"one") + packer.flush())
    assert texts(path) == ["one"]


def test_a_file_with_an_odd_name_is_read_and_shown_in_one_line(tmp_path):
    odd = os.fsdecode(b"a\n\xff\xe2\x80\xa8\xc3\xa9.jsonl")
    shown = "a\\n\\udcff\\u2028é.jsonl"
    (tmp_path / odd).write_text('{"text": "b"}\n{')
    assert refusal(texts, tmp_path).startswith(
        f"{documents.BAD['broken JSON'][0]}; got {tmp_path}/{shown} line 2 ("
    )
    found, counted = met(over(tmp_path), on_bad_text="skip")
    assert found == [(f"{shown} line 1", "b")]
    assert counted["examples"] == {"broken JSON": [f"{shown} line 2"]}
    [name] = over(tmp_path).identity("train")["files"]
    assert name == odd
    source = over(tmp_path)
    source.identity("train")
    (tmp_path / odd).unlink()
    assert refusal(texts_of, source) == (
        f"data file must not change until it is read; got {tmp_path}/{shown} (No such "
        "file or directory). Start again when nothing writes to it."
    )


def texts_of(source):
    return met(source)[0]
