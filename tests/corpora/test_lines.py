"""Tests of JSON lines: their texts, their numbers, what is bad, how they are cut."""

import itertools
import json

import numpy as np
import pytest

from fm_jax.corpora import digests, documents, lines, sources
from fm_jax.corpora.documents import Reading
from tests.corpora.made import PACK, POLICY, met, over, refusal, texts

SKIP = "--config.data.on_bad_text=skip"


@pytest.mark.parametrize("packing", PACK)
def test_each_line_with_text_is_a_document_known_by_its_number(packing, tmp_path):
    path = tmp_path / f"rows.jsonl{packing}"
    rows = ['{"text": "a\\nb", "n": 1}', "", '{"text": ""}', ' {"text": "\\u00e9"}\r']
    path.write_bytes(PACK[packing]("\n".join(rows).encode()))
    found, counted = met(over(path))
    assert found == [(f"{path.name} line 1", "a\nb"), (f"{path.name} line 4", "é")]
    assert counted == {"skipped": {}, "replaced": {}, "empty": 2, "examples": {}}


def test_text_field_names_the_field(tmp_path):
    path = tmp_path / "rows.ndjson"
    path.write_text('{"text": "no", "body": "yes"}\n')
    assert texts(path, text_field="body") == ["yes"]


def test_a_mark_of_byte_order_is_no_part_of_the_first_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n')
    assert texts(path) == ["a"]


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("line", "kind", "problem"),
    [
        (
            "{'text': 1}",
            "broken JSON",
            "Expecting property name enclosed in double quotes: character 1",
        ),
        ('{"text": "a', "broken JSON", "Invalid control character at: character 11"),
        ('\ufeff{"text": "a"}', "broken JSON", "Unexpected UTF-8 BOM"),
        ("1" * 5000, "broken JSON", "Exceeds the limit"),
        (DEEP, "broken JSON", "maximum recursion depth exceeded"),
        ('{"txt": "a"}', "missing text", "no text under 'text'"),
        ('{"text": 3}', "missing text", "no text under 'text'"),
        ('{"text": null}', "missing text", "no text under 'text'"),
        ('["text"]', "missing text", "no text under 'text'"),
        ('{"text": "\\ud83d"}', "bad UTF-8", "half a surrogate pair at character 0"),
        ('{"text": "a\\u0000"}', "NUL bytes", "one at character 1"),
    ],
)
def test_a_bad_line_is_refused_with_its_number_or_counted(
    line, kind, problem, tmp_path
):
    """Fault 38, data: lines of JSON are broken, have no text, NUL bytes or half a
    character.

    Promise: exit 2 with the file and the line, or left out under on_bad_text=skip and
    counted in the store's header.
    """
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n\n' + line + '\n{"text": "z"}')
    demand, way_out = documents.BAD[kind]
    text = refusal(texts, path)
    assert text.startswith(f"{demand}; got {path} line 3 ({problem}")
    assert text.endswith(f"). {way_out}")
    assert "\n" not in text
    found, counted = met(over(path), on_bad_text="skip")
    assert found == [("rows.jsonl line 1", "a"), ("rows.jsonl line 4", "z")]
    assert counted["skipped"] == {kind: 1}
    assert counted["examples"] == {kind: ["rows.jsonl line 3"]}
    if kind in ("broken JSON", "missing text"):
        assert met(over(path), on_bad_text="replace") == (found, counted)


def test_a_bad_byte_is_refused_with_line_and_place_in_the_file(tmp_path):
    path = tmp_path / "a.jsonl"
    raw = '{"text": "é"}\n\n'.encode() + b'{"text": "a\xfe"}\n'
    path.write_bytes(raw)
    assert refusal(texts, path) == (
        f"text must be UTF-8; got {path} line 3 (a bad byte at offset "
        f"{raw.index(0xFE)}). Mend it, or set {SKIP} or =replace."
    )
    assert met(over(path), on_bad_text="replace") == (
        [("a.jsonl line 1", "é"), ("a.jsonl line 3", "a\ufffd")],
        {
            "skipped": {},
            "replaced": {"bad UTF-8": 1},
            "empty": 1,
            "examples": {"bad UTF-8": ["a.jsonl line 3"]},
        },
    )


def test_a_long_text_in_a_line_is_refused_left_out_or_cut(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "ab\\ncdefgh"}\n{"text": "b", "more": "0123456789"}\n')
    assert refusal(texts, path, max_document_bytes=5) == (
        f"document must have at most data.max_document_bytes; got {path} line 1 (over "
        f"5 bytes). Raise that, or set {SKIP} or =replace."
    )
    policy = {"max_document_bytes": 5}
    found, counted = met(over(path), on_bad_text="skip", **policy)
    assert found == [("a.jsonl line 2", "b")]
    assert counted["skipped"] == {"too long": 1}
    found, counted = met(over(path), on_bad_text="replace", **policy)
    one, two = "a.jsonl line 1", "a.jsonl line 2"
    assert found == [(one, "ab\n"), (one, "cdefg"), (one, "h"), (two, "b")]
    assert counted["replaced"] == {"too long": 1}


@pytest.mark.parametrize("policy", ["skip", "replace"])
@pytest.mark.parametrize("packing", PACK)
def test_a_line_that_is_too_long_to_hold_is_passed_by(
    packing, policy, tmp_path, monkeypatch
):
    monkeypatch.setattr(lines, "LINE_BYTES", 30)
    monkeypatch.setattr(lines, "BLOCK_BYTES", 7)
    path = tmp_path / f"a.jsonl{packing}"
    rows = [json.dumps({"text": c * n}) for n, c in ((18, "a"), (19, "b"), (99, "c"))]
    assert [len(row) for row in rows] == [30, 31, 111]
    raw = "\n".join([rows[0], rows[1], rows[0], rows[2], rows[0], rows[2]])
    for end in ("", "\n"):
        path.write_bytes(PACK[packing](f"{raw}{end}".encode()))
        options = {"on_bad_text": policy, "max_document_bytes": 25}
        found, counted = met(over(path), **options)
        assert found == [(f"{path.name} line {n}", "a" * 18) for n in (1, 3, 5)]
        assert counted["skipped"] == {"too long": 3}
        places = [f"{path.name} line {n}" for n in (2, 4, 6)]
        assert counted["examples"] == {"too long": places}
    assert refusal(texts, path, max_document_bytes=25) == (
        f"document must have at most data.max_document_bytes; got {path} line 2 (over "
        f"30 bytes in a line). Raise that, or set {SKIP} or =replace."
    )


# How files are cut.


def random_lines(folder, seed):
    rng = np.random.default_rng(seed)
    rows = [json.dumps({"text": "x" * n}) if n else "" for n in rng.integers(0, 60, 40)]
    path = folder / "a.jsonl"
    path.write_text("\n".join(rows) + "\n" * int(rng.integers(2)))
    return path


@pytest.mark.parametrize("piece_bytes", [1, 20, 64, 300, 10_000])
@pytest.mark.parametrize("block_bytes", [1, 17, 64, 1 << 20])
def test_pieces_are_cut_at_line_ends_and_know_their_lines(
    piece_bytes, block_bytes, tmp_path, monkeypatch
):
    path = random_lines(tmp_path, piece_bytes + block_bytes)
    raw, whole = path.read_bytes(), met(over(path))
    monkeypatch.setattr(documents, "PIECE_BYTES", piece_bytes)
    monkeypatch.setattr(lines, "BLOCK_BYTES", block_bytes)
    pieces = over(path).pieces("train")
    if piece_bytes == 10_000:
        assert [(p.start, p.stop, p.first) for p in pieces] == [(0, -1, 1)]
    else:
        edges = [piece.start for piece in pieces] + [len(raw)]
        assert [(p.start, p.stop) for p in pieces] == [*itertools.pairwise(edges)]
        for piece in pieces:
            assert piece.size == piece.stop - piece.start
            assert piece.first == 1 + raw.count(b"\n", 0, piece.start)
            # No line fewer would have been enough.
            last = raw.rfind(b"\n", piece.start, piece.stop - 1) + 1 or piece.start
            assert max(last, piece.start) - piece.start < piece_bytes
        for piece in pieces[:-1]:
            assert raw[piece.stop - 1 : piece.stop] == b"\n"
            assert piece.size >= piece_bytes
    assert met(over(path)) == whole


def test_cuts_are_kept_and_found_again(tmp_path, monkeypatch):
    path = random_lines(tmp_path, 5)
    monkeypatch.setattr(documents, "PIECE_BYTES", 100)
    monkeypatch.setattr(digests, "SETTLED_SECONDS", -1)
    cache = tmp_path / "cache"
    pieces = over(path, cache=cache).pieces("train")
    assert len(pieces) > 3
    monkeypatch.setattr(lines, "line_ends", lambda path: 1 / 0)
    assert over(path, cache=cache).pieces("train") == pieces
    monkeypatch.setattr(documents, "PIECE_BYTES", 101)  # are others
    with pytest.raises(ZeroDivisionError):
        over(path, cache=cache).pieces("train")


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_a_packed_file_is_one_piece(packing, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PIECE_BYTES", 1)
    path = tmp_path / f"a.jsonl{packing}"
    path.write_bytes(PACK[packing](b'{"text": "a"}\n{"text": "b"}\n'))
    [piece] = over(path).pieces("train")
    assert (piece.start, piece.stop, piece.first) == (0, -1, 1)
    assert piece.size == path.stat().st_size


def test_a_piece_reads_its_own_lines_alone_and_numbers_them(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"t{n}"}) + "\n" for n in range(1, 8)))
    monkeypatch.setattr(documents, "PIECE_BYTES", 20)
    source = over(path)
    read = sources.open_reader(source.spec("train"))
    pieces = source.pieces("train")
    found = [list(read(piece, Reading(**POLICY))) for piece in reversed(pieces)]
    assert found == [
        [(7, "t7")],
        [(5, "t5"), (6, "t6")],
        [(3, "t3"), (4, "t4")],
        [(1, "t1"), (2, "t2")],
    ]


def test_a_large_file_that_is_blank_is_empty(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PIECE_BYTES", 2)
    path = tmp_path / "a.jsonl"
    path.write_text(" " * 50)
    found, counted = met(over(path), on_bad_text="skip")
    assert (found, counted["skipped"]) == ([], {"empty file": 1})


@pytest.mark.parametrize("piece_bytes", [1, 8, 1 << 26])
def test_a_large_file_that_begins_with_blank_lines_is_not_empty(
    piece_bytes, tmp_path, monkeypatch
):
    monkeypatch.setattr(documents, "PIECE_BYTES", piece_bytes)
    path = tmp_path / "a.jsonl"
    path.write_text("\n" * 20 + '{"text": "a"}\n')
    found, counted = met(over(path))
    assert found == [("a.jsonl line 21", "a")]
    assert counted == {"skipped": {}, "replaced": {}, "empty": 20, "examples": {}}


def test_a_mark_of_byte_order_alone_is_a_blank_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf\n{"text": "a"}\n')
    found, counted = met(over(path))
    assert (found, counted["empty"]) == ([("a.jsonl line 2", "a")], 1)
    path.write_bytes(b"\xef\xbb\xbf")
    found, counted = met(over(path), on_bad_text="skip")
    assert (found, counted["skipped"]) == ([], {"empty file": 1})


def test_a_mark_of_byte_order_counts_in_the_place_of_a_bad_byte(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "\xff"}\n')
    assert " line 1 (a bad byte at offset 13). " in refusal(texts, path)


def test_only_a_line_feed_ends_a_line(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = ['{"text": "a\u2028b"}\r\n', '{"text":\r"c\x85d"}\n', '{"text": "e"}\r']
    path.write_text("".join(rows), newline="")
    found, _ = met(over(path))
    assert found == [
        ("a.jsonl line 1", "a\u2028b"),
        ("a.jsonl line 2", "c\x85d"),
        ("a.jsonl line 3", "e"),
    ]


def test_what_else_a_row_holds_does_not_matter(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"x": [{"text": 1}], "n": NaN, "text": "a", "text": "b"}')
    assert texts(path) == ["b"]  # of a key that is there twice, the last


PARTS = [
    *(b"\n", b"\r\n", b"\r", b"\n\n\n", b" ", b"\0", b"nope", b"\xef\xbb\xbf"),
    *(b'{"text": "a"}', b'{"text": "\xc3\xa9\xff"}', b'{"text": ""}', b'{"text":null}'),
    *(b'{"text": "\\ud800b"}', "\u2028".encode(), b'{"text": "%s"}' % (b"x\\n" * 20)),
]


@pytest.mark.parametrize("policy", documents.ON_BAD_TEXT)
@pytest.mark.parametrize("seed", range(25))
def test_what_is_met_does_not_depend_on_the_pieces(seed, policy, tmp_path, monkeypatch):
    rng = np.random.default_rng(seed)
    monkeypatch.setattr(lines, "LINE_BYTES", int(rng.choice([30, 1 << 20])))
    path = tmp_path / "a.jsonl"
    raw = b"".join(PARTS[n] for n in rng.integers(0, len(PARTS), 30))
    path.write_bytes(b'{"text": "first"}\n' + raw)

    def read():
        try:
            return met(over(path), on_bad_text=policy, max_document_bytes=30)
        except documents.UserError as error:
            return str(error)

    whole = read()
    for piece_bytes, block_bytes in rng.integers(1, 60, (5, 2)).tolist():
        monkeypatch.setattr(documents, "PIECE_BYTES", piece_bytes)
        monkeypatch.setattr(lines, "BLOCK_BYTES", block_bytes)
        assert read() == whole
