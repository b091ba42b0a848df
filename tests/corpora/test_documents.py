"""Tests of documents: how bad ones are met, how long ones are cut, what names them."""

import io
import json

import numpy as np
import pytest

from fm_jax.corpora import documents
from fm_jax.corpora.documents import Piece, Reading
from tests.corpora.made import POLICY, refusal

ROWS = Piece(name="squad")
LINES = Piece(name="b/a.jsonl", path="/far/b/a.jsonl.gz", start=7, first=3, stamp="s")


def reading(**policy):
    return Reading(**POLICY | policy)


def test_a_piece_comes_back_from_its_json():
    assert Piece.from_json(json.loads(json.dumps(LINES.to_json()))) == LINES


@pytest.mark.parametrize(
    ("path", "place", "words"),
    [
        ("/c/a.jsonl", 7, "a line 7"),
        ("/c/a.ndjson.zst", 7, "a line 7"),
        ("/c/a.parquet", 0, "a row 0"),
        ("/c/a.array_record", 3, "a row 3"),
        ("", 3, "a row 3"),
        ("/c/a.txt", 0, "a"),
        ("/c/a.py.gz", 2, "a part 3"),
        ("s3://c/a.md", 2, "a part 3"),
    ],
)
def test_a_place_is_said_in_words(path, place, words):
    assert documents.where("a", place, path) == words
    piece = Piece(name="a", path=path)
    assert piece.where(place) == words
    assert piece.where(place, whole=True) == (path or "a") + words[1:]


# What is met.


@pytest.mark.parametrize("policy", documents.ON_BAD_TEXT)
def test_good_text_is_kept_as_it_is_under_every_policy(policy):
    met = reading(on_bad_text=policy, max_document_bytes=8)
    for text in ["a", " ", "\n", "é\r\n\t", "\ufffd", "\ufeffa", "\U0001f642é\x01\x7f"]:
        assert met.texts(text, ROWS, 5) == (text,)
        assert met.texts(text.encode(), ROWS, 5) == (text,)
    assert met.to_json() == reading().to_json()


def test_text_that_is_empty_is_counted_and_no_error():
    met = reading()
    assert met.texts("", ROWS, 0) == met.texts(b"", ROWS, 1) == ()
    assert met.to_json() == {"skipped": {}, "replaced": {}, "empty": 2, "examples": {}}


BAD = [
    # What was found, its kind, what mends it (None: nothing), what is said of it.
    (b"ab\xffc", "bad UTF-8", "ab\ufffdc", "a bad byte at offset 102"),
    ("e\ud800", "bad UTF-8", "e?", "half a surrogate pair at character 1"),
    (b"a\0b\0", "NUL bytes", "a\ufffdb\ufffd", "one at character 1"),
    ("a\0", "NUL bytes", "a\ufffd", "one at character 1"),
    (None, "missing text", None, "null in its place"),
    (3, "missing text", None, "int in its place"),
]


@pytest.mark.parametrize(("found", "kind", "mended", "problem"), BAD)
def test_bad_text_is_refused_skipped_or_mended_and_named(found, kind, mended, problem):
    demand, way_out = documents.BAD[kind]
    assert refusal(reading().texts, found, LINES, 7, offset=100) == (
        f"{demand}; got /far/b/a.jsonl.gz line 7 ({problem}). {way_out}"
    )
    skips, mends = reading(on_bad_text="skip"), reading(on_bad_text="replace")
    assert skips.texts(found, LINES, 7, offset=100) == ()
    gone = {"skipped": {kind: 1}, "examples": {kind: ["b/a.jsonl line 7"]}}
    assert skips.to_json() == reading().to_json() | gone
    assert mends.texts(found, LINES, 7) == (() if mended is None else (mended,))
    if mended is not None:
        gone = {"replaced": gone.pop("skipped")} | gone
    assert mends.to_json() == reading().to_json() | gone


SKIP = "--config.data.on_bad_text=skip"


@pytest.mark.parametrize(
    ("kind", "text"),
    {
        "bad UTF-8": "text must be UTF-8; got p row 1 (why). Mend it, or set "
        f"{SKIP} or =replace.",
        "broken JSON": "line must be a JSON object with text under data.text_field; "
        f"got p row 1 (why). Mend it, or set {SKIP}.",
        "missing text": "document must have text under data.text_field; got p row 1 "
        f"(why). Set --config.data.text_field (of examples: data.fields) or {SKIP}.",
        "NUL bytes": "text must hold no NUL; got p row 1 (why). Mend it, or set "
        f"{SKIP} or =replace.",
        "too long": "document must have at most data.max_document_bytes; got p row 1 "
        f"(why). Raise that, or set {SKIP} or =replace.",
        "cut short": "data file must be whole; got p row 1 (why). Restore it, take it "
        f"out of data.paths, or set {SKIP} to leave out what is damaged.",
        "empty file": "data file must hold a document; got p row 1 (why). Take it out "
        f"of data.paths or set {SKIP}.",
        "unreadable": "data file must be readable; got p row 1 (why). Restore it, take "
        f"it out of data.paths, or set {SKIP}.",
    }.items(),
)
def test_each_kind_of_bad_has_its_demand_and_its_way_out(kind, text):
    assert refusal(reading().bad, kind, Piece(name="p"), 1, "why") == text
    assert refusal(reading().bad, kind, Piece(name="p"), None, "why") == text.replace(
        "p row 1", "p"
    )


def test_every_kind_of_bad_is_known():
    kinds = test_each_kind_of_bad_has_its_demand_and_its_way_out.pytestmark[0].args[1]
    assert [kind for kind, _ in kinds] == list(documents.BAD)


def test_a_text_with_two_faults_is_mended_of_both():
    met = reading(on_bad_text="replace", max_document_bytes=5)
    assert met.texts(b"\0a\n\xffb", ROWS, 4) == ("\ufffda\n", "\ufffdb")
    assert met.to_json()["replaced"] == {"NUL bytes": 1, "bad UTF-8": 1, "too long": 1}


def test_too_long_is_of_bytes_and_not_of_characters():
    met = reading(max_document_bytes=6)
    assert met.texts("ééé", ROWS, 0) == ("ééé",)
    assert refusal(met.texts, "éééa", ROWS, 3) == (
        "document must have at most data.max_document_bytes; got squad row 3 (over 6 "
        f"bytes). Raise that, or set {SKIP} or =replace."
    )


def test_the_first_three_places_of_each_kind_are_kept_and_all_are_counted():
    met = reading(on_bad_text="skip")
    for row in range(5):
        met.texts(None, ROWS, row)
    met.bad("cut short", ROWS, 9, "why", count=20)
    met.bad("unreadable", ROWS, None, "why")
    assert met.to_json() == {
        "skipped": {"cut short": 20, "missing text": 5, "unreadable": 1},
        "replaced": {},
        "empty": 0,
        "examples": {
            "cut short": ["squad row 9"],
            "missing text": ["squad row 0", "squad row 1", "squad row 2"],
            "unreadable": ["squad"],
        },
    }


def test_what_readings_met_one_after_the_other_is_what_one_would_have_met():
    found = ["", None, b"\xff", "\0", "abcdefg", b"", 3, None, b"a\xff", None, "\ud800"]
    policy = {"on_bad_text": "replace", "max_document_bytes": 5}
    whole, parts = reading(**policy), reading(**policy)
    for row, text in enumerate(found):
        whole.texts(text, ROWS, row)
    for start in range(0, len(found), 4):
        part = reading(**policy)
        for row, text in list(enumerate(found))[start : start + 4]:
            part.texts(text, ROWS, row)
        parts.add(json.loads(json.dumps(part.to_json())))
    assert parts.to_json() == whole.to_json()
    assert whole.to_json()["examples"]["missing text"] == [
        "squad row 1",
        "squad row 6",
        "squad row 7",
    ]


def test_a_reading_refuses_what_it_cannot_do():
    assert refusal(reading, on_bad_text="skips") == (
        "data.on_bad_text must be one of the known names; got 'skips'. "
        "Did you mean 'skip'? Known: skip, error, replace"
    )
    assert refusal(reading, max_document_bytes=3) == (
        "data.max_document_bytes must be at least 4, what a character may take; got 3."
    )


# How long ones are cut.


@pytest.mark.parametrize("limit", [4, 5, 7, 30, 1000])
def test_parts_join_to_the_whole_end_at_line_ends_and_split_no_character(limit):
    rng = np.random.default_rng(limit)
    for alphabet in ["ab\n", "é\u20ac\U0001f642x", "é\n\U0001f642\r"]:
        text = "".join(rng.choice(list(alphabet), 201))
        stream = io.BytesIO(text.encode())
        parts = list(documents.cut(stream.read(limit + 1), stream.read, limit))
        assert b"".join(parts) == text.encode()
        for part, after in zip(parts, [*parts[1:], b""], strict=True):
            assert 0 < len(part) <= limit
            part.decode()
            if after and not part.endswith(b"\n"):
                assert b"\n" not in part
                assert len(part + after[:1].ljust(4)) > limit


def test_bytes_that_are_no_characters_are_cut_too():
    stream = io.BytesIO(b"\x80" * 11)
    parts = list(documents.cut(stream.read(6), stream.read, 5))
    assert parts == [b"\x80" * 5, b"\x80" * 5, b"\x80"]


def test_a_long_text_is_cut_where_it_is_to_be_mended():
    met = reading(on_bad_text="replace", max_document_bytes=6)
    assert met.texts("ab\ncdéfg\n\nhi", ROWS, 1) == ("ab\n", "cdéfg", "\n\nhi")
    assert met.to_json()["replaced"] == {"too long": 1}


# What names them.


def test_a_texts_hash_is_its_blake2b_of_128_bits():
    digest = "cf4ab791c62b8d2b2109c90275287816"  # printf abc | b2sum --length=128
    assert documents.text_hash("abc").hex() == digest
    assert documents.fraction(documents.text_hash("abc")) == 0xCF4AB791C62B8D2B / 2**64


def test_a_fraction_is_below_one():
    assert documents.fraction(b"\xff" * 16) < 1
    assert documents.fraction(bytes(16)) == 0


def test_shares_of_a_text_that_splits_share_cover_it_once():
    assert documents.share("eval", 0.25) == (0.0, 0.25)
    assert documents.share("train", 0.25) == (0.25, 1.0)
    assert documents.share("train", 0.0) == documents.share("eval", 0.0) == (0.0, 1.0)


def test_what_was_told_of_a_reading_stays_as_it_was_told():
    whole = Reading(on_bad_text="skip", max_document_bytes=99)
    part = {"skipped": {"NUL bytes": 1}, "replaced": {}, "empty": 0}
    whole.add(part | {"examples": {"NUL bytes": ["a.txt"]}})
    told = whole.to_json()
    whole.add(part | {"examples": {"NUL bytes": ["b.txt"]}})
    assert told["examples"] == {"NUL bytes": ["a.txt"]}
    assert whole.to_json()["examples"] == {"NUL bytes": ["a.txt", "b.txt"]}


def test_a_document_may_not_be_longer_than_its_leftover_can_count():
    fields = {"on_bad_text": "error", "max_document_bytes": 2**31}
    assert refusal(Reading, **fields) == (
        "data.max_document_bytes must be below 2**31; got 2147483648. Cut longer "
        "documents."
    )
