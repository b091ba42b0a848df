"""Tests of Parquet: the text of a column, its rows, its pieces, damage."""

import itertools

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fm_jax.corpora import columns, documents
from tests.corpora.made import met, over, refusal, texts

SKIP = "--config.data.on_bad_text=skip"
ROWS = ["a", "", "é\n\U0001f642", None, "b" * 50, "c", "d"]
GOOD = [(f"a.parquet row {n}", text) for n, text in enumerate(ROWS) if text]


def write(path, rows=tuple(ROWS), held=None, **options):
    text = pa.array(rows, held or pa.string())
    numbers = pa.array(range(len(rows)))
    table = pa.table({"n": numbers, "text": text, "texts": text})
    pq.write_table(table, path, **{"row_group_size": 2} | options)
    return path


HELD = [
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.binary(),
    pa.large_binary(),
    pa.dictionary(pa.int32(), pa.string()),
]


@pytest.mark.parametrize("held", HELD, ids=str)
@pytest.mark.parametrize("together", [1, 3, 1 << 23])
def test_each_row_with_text_is_a_document_known_by_its_number(
    held, together, tmp_path, monkeypatch
):
    monkeypatch.setattr(columns, "BATCH_BYTES", together)
    path = write(tmp_path / "a.parquet", held=held, row_group_size=5)
    found, counted = met(over(path), on_bad_text="skip")
    assert found == GOOD
    assert counted == {
        "skipped": {"missing text": 1},
        "replaced": {},
        "empty": 1,
        "examples": {"missing text": ["a.parquet row 3"]},
    }


@pytest.mark.parametrize("packing", ["none", "snappy", "gzip", "zstd", "lz4", "brotli"])
def test_columns_are_read_however_they_are_packed(packing, tmp_path):
    path = write(tmp_path / "a.parquet", compression=packing)
    assert met(over(path), on_bad_text="skip")[0] == GOOD


def test_a_row_without_text_is_refused(tmp_path):
    path = write(tmp_path / "a.parquet")
    assert refusal(texts, path) == (
        f"document must have text under data.text_field; got {path} row 3 (null in its "
        f"place). Set --config.data.text_field (of examples: data.fields) or {SKIP}."
    )


@pytest.mark.parametrize("policy", documents.ON_BAD_TEXT)
def test_a_missing_column_is_refused_under_every_policy(policy, tmp_path):
    path = write(tmp_path / "a.parquet")
    assert refusal(texts, path, text_field="txt", on_bad_text=policy) == (
        f"data.text_field of {path} must be one of the known names; got 'txt'. "
        "Did you mean 'text'? Known: text, texts, n"
    )
    assert refusal(texts, path, text_field="n", on_bad_text=policy) == (
        f"data.text_field must name text; got 'n' of {path}, which holds int64."
    )


def test_bad_utf8_in_a_column_is_named(tmp_path):
    raw = pa.py_buffer(b"abc\xffd")
    offsets = pa.py_buffer(b"".join(n.to_bytes(4, "little") for n in (0, 3, 5)))
    text = pa.Array.from_buffers(pa.string(), 2, [None, offsets, raw])
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": text}), path)
    assert refusal(texts, path) == (
        f"text must be UTF-8; got {path} row 1 (a bad byte at offset 0). Mend it, or "
        f"set {SKIP} or =replace."
    )
    assert texts(path, on_bad_text="replace") == ["abc", "\ufffdd"]


# Pieces.


def test_small_row_groups_stand_together_and_large_ones_alone(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", compression="none", use_dictionary=False)
    whole = met(over(path), on_bad_text="skip")
    groups = pq.ParquetFile(path).metadata
    sizes = [groups.row_group(g).total_byte_size for g in range(4)]
    for limit in (1, sizes[0] + sizes[1], sum(sizes)):
        monkeypatch.setattr(documents, "PIECE_BYTES", limit)
        pieces = over(path).pieces("train")
        assert [p.stop for p in pieces[:-1]] == [p.start for p in pieces[1:]]
        assert [p.first for p in pieces] == [2 * p.start for p in pieces]
        assert [p.size for p in pieces] == [
            sum(sizes[p.start : p.stop]) for p in pieces
        ]
        assert (pieces[0].start, pieces[-1].stop) == (0, 4)
        for piece, after in itertools.pairwise(pieces):
            assert piece.size + sizes[after.start] > limit
            assert piece.size <= limit or piece.stop == piece.start + 1
        assert met(over(path), on_bad_text="skip") == whole
    assert len(pieces) == 1


def test_only_the_one_column_is_read(tmp_path):
    path = write(tmp_path / "a.parquet", ["a", "b"], compression="none")
    column = pq.ParquetFile(path).metadata.row_group(0).column(0)
    raw = bytearray(path.read_bytes())
    at = column.data_page_offset
    raw[at : at + 10] = b"\xff" * 10
    path.write_bytes(raw)
    assert texts(path) == ["a", "b"]


# Damage.


def cut(raw):
    return raw[: len(raw) // 2]


def cut_footer(raw):
    return raw[:-6]


def foreign(raw):
    return b"PAR1 is not all that it takes"


def tiny(raw):
    return b"PA"


@pytest.mark.parametrize("damage", [cut, cut_footer, foreign, tiny, lambda raw: b""])
def test_a_file_that_is_damaged_or_foreign_is_refused_or_counted(damage, tmp_path):
    path = write(tmp_path / "a.parquet")
    path.write_bytes(damage(path.read_bytes()))
    text = refusal(texts, path)
    assert text.startswith(f"data file must be whole; got {path} (")
    assert text.endswith(f", or set {SKIP} to leave out what is damaged.")
    assert "\n" not in text
    for policy in ("skip", "replace"):
        found, counted = met(over(path), on_bad_text=policy)
        assert (found, counted["skipped"]) == ([], {"cut short": 1})
        assert counted["examples"] == {"cut short": ["a.parquet"]}


@pytest.mark.parametrize("limit", [1, 1 << 26])
def test_a_damaged_row_group_is_left_out_and_its_rows_are_counted(
    limit, tmp_path, monkeypatch
):
    monkeypatch.setattr(documents, "PIECE_BYTES", limit)
    rows = [f"{n}" * 400 for n in range(7)]
    options = {"write_page_checksum": True, "use_dictionary": False}
    path = write(
        tmp_path / "a.parquet", rows, row_group_size=3, compression="none", **options
    )
    column = pq.ParquetFile(path).metadata.row_group(1).column(1)
    raw = bytearray(path.read_bytes())
    raw[column.data_page_offset + column.total_compressed_size - 5] ^= 0xFF
    path.write_bytes(raw)
    text = refusal(texts, path)
    assert text.startswith(f"data file must be whole; got {path} row 3 (")
    for policy in ("skip", "replace"):
        found, counted = met(over(path), on_bad_text=policy)
        kept = [0, 1, 2, 6]
        assert found == [(f"a.parquet row {n}", rows[n]) for n in kept]
        assert counted["skipped"] == {"cut short": 3}
        assert counted["examples"] == {"cut short": ["a.parquet row 3"]}


def test_a_column_is_not_taken_for_one_whose_path_is_its_name(tmp_path):
    nested = pa.array([{"text": "nested"}])
    table = pa.table({"a": nested, "a.text": ["flat"], "a.text.more": ["more"]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet", text_field="a.text") == ["flat"]


def test_a_name_that_two_columns_have_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    text = pa.array(["a"])
    pq.write_table(pa.Table.from_arrays([text, text], ["text", "text"]), path)
    assert refusal(texts, path) == (
        f"data.text_field must name one column; got 'text' of {path}, which has 2 of "
        "that name. Rename all but one."
    )
