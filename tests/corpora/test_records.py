"""Tests of ArrayRecord: its records, its pieces, damage."""

import sys

import numpy as np
import pytest

from fm_jax.corpora import documents, records
from tests.corpora.made import met, over, refusal, texts, write_records

SKIP = "--config.data.on_bad_text=skip"
ROWS = [b"a", b"", "é\n\U0001f642".encode(), b"b" * 50, b"c"]
GOOD = [(f"a.array_record row {n}", t.decode()) for n, t in enumerate(ROWS) if t]


def write(folder, rows=tuple(ROWS), name="a.array_record"):
    write_records(folder / name, rows)
    return folder / name


def random_rows(count):
    return [np.random.default_rng(n).bytes(2500).hex().encode() for n in range(count)]


@pytest.mark.parametrize("together", [1, 2, 1024])
def test_each_record_with_text_is_a_document_known_by_its_number(
    together, tmp_path, monkeypatch
):
    monkeypatch.setattr(records, "BATCH_RECORDS", together)
    found, counted = met(over(write(tmp_path)))
    assert found == GOOD
    assert counted == {"skipped": {}, "replaced": {}, "empty": 1, "examples": {}}


def test_the_suffix_may_be_one_word(tmp_path):
    assert texts(write(tmp_path, [b"a"], "a.arrayrecord")) == ["a"]


def test_bad_utf8_in_a_record_is_named(tmp_path):
    path = write(tmp_path, [b"a", b"b\xffc"])
    assert refusal(texts, path) == (
        f"text must be UTF-8; got {path} row 1 (a bad byte at offset 1). Mend it, or "
        f"set {SKIP} or =replace."
    )
    assert texts(path, on_bad_text="replace") == ["a", "b\ufffdc"]


@pytest.mark.parametrize("piece_bytes", [1, 1 << 16, 3 << 16, 1 << 30])
def test_a_large_file_is_cut_into_pieces_that_cover_it_once(
    piece_bytes, tmp_path, monkeypatch
):
    rows = random_rows(37)
    path = write(tmp_path, rows)
    whole = met(over(path))
    assert [text.encode() for _, text in whole[0]] == rows
    monkeypatch.setattr(documents, "PIECE_BYTES", piece_bytes)
    pieces = over(path).pieces("train")
    count = -(-path.stat().st_size // piece_bytes)
    assert len(pieces) == min(37, count)
    if count > 1:
        assert [p.stop for p in pieces] == [p.start for p in pieces[1:]] + [37]
        assert [p.first for p in pieces] == [p.start for p in pieces]
    assert met(over(path)) == whole


def cut(raw):
    return raw[: len(raw) // 2]


def cut_at_a_block(raw):
    return raw[: 1 << 16]  # opens without a word and seems to have no records


def foreign(raw):
    return b"plain text that someone renamed " * 9000


def tiny(raw):
    return b"hello"


@pytest.mark.parametrize(
    "damage", [cut, cut_at_a_block, foreign, tiny, lambda raw: b""]
)
@pytest.mark.parametrize("piece_bytes", [1, 1 << 30])
def test_a_file_that_is_damaged_or_foreign_is_refused_or_counted(
    piece_bytes, damage, tmp_path, monkeypatch
):
    """Fault 35, data: an ArrayRecord file is cut, empty or no such file.

    Promise: preparation names it, exit 2, or leaves it out under on_bad_text=skip and
    counts it.
    """
    monkeypatch.setattr(documents, "PIECE_BYTES", piece_bytes)
    path = write(tmp_path, random_rows(40))
    path.write_bytes(damage(path.read_bytes()))
    text = refusal(texts, path)
    assert text.startswith(f"data file must be whole; got {path} (")
    assert text.endswith(f", or set {SKIP} to leave out what is damaged.")
    assert "\n" not in text
    for policy in ("skip", "replace"):
        found, counted = met(over(path), on_bad_text=policy)
        assert (found, counted["skipped"]) == ([], {"cut short": 1})
        assert counted["examples"] == {"cut short": ["a.array_record"]}


@pytest.mark.parametrize("together", [1, 7, 1024])
def test_a_damaged_record_is_named_and_alone_left_out(together, tmp_path, monkeypatch):
    """Fault 36, data: bits flip inside a record of ArrayRecord.

    Promise: preparation names the file and the row, exit 2, or leaves out that row
    alone under on_bad_text=skip.
    """
    monkeypatch.setattr(records, "BATCH_RECORDS", together)
    rows = random_rows(40)
    path = write(tmp_path, rows)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    path.write_bytes(raw)
    found, counted = met(over(path), on_bad_text="skip")
    assert counted["skipped"] == {"cut short": 1}
    [place] = counted["examples"]["cut short"]
    assert place.startswith("a.array_record row ")
    bad = int(place.removeprefix("a.array_record row "))
    assert [text.encode() for _, text in found] == rows[:bad] + rows[bad + 1 :]
    text = refusal(texts, path)
    assert text.startswith(f"data file must be whole; got {path} row {bad} (")


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    path = write(tmp_path)
    monkeypatch.setitem(sys.modules, "array_record.python", None)
    assert refusal(texts, path) == (
        f".array_record must have its library installed; got {path}. "
        "pip install array_record."
    )


def test_a_file_without_records_is_one_piece_however_small_those_are(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(documents, "PIECE_BYTES", 1)
    path = tmp_path / "a.array_record"
    write_records(path, [])
    found, counted = met(over(path), on_bad_text="skip")
    assert (found, counted["skipped"]) == ([], {"empty file": 1})
