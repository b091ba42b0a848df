"""Tests of several fields as one text: JSON, what is missing, what is bad, by whom."""

import datetime
import decimal
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fm_jax.corpora import arrow, documents, fields
from tests.corpora.made import make, met, over, read, refusal, write_records

BOTH = ("prompt", "answer")
MESSAGES = [
    {"role": "user", "content": "Où?"},
    {"role": "assistant", "content": "là \U0001f642\n"},
]


def found_in(text):
    """Return what a text of fields holds; what is there twice would be an error."""
    return json.loads(text, object_pairs_hook=_once)


def _once(pairs):
    assert len({key for key, _ in pairs}) == len(pairs)
    return dict(pairs)


# As text.


def test_the_text_is_the_json_object_of_the_fields_that_are_there():
    row = {"b": "é", "a": [1, 2.5, True, {"x": None}], "c": None, "other": "no"}
    taken = fields.taken(row, ("b", "c", "a", "d"))
    assert taken == {"b": "é", "c": None, "a": row["a"], "d": None}
    assert fields.as_text(taken) == (
        '{"a": [1, 2.5, true, {"x": null}], "b": "é"}'.encode()
    )
    assert fields.as_text({"a": None}) is None
    assert fields.as_text(fields.taken(["no", "object"], BOTH)) is None


def test_one_field_is_its_value_alone():
    assert fields.taken({"a": "x"}, "a") == "x"
    assert fields.taken({"a": "x"}, "b") is fields.taken(["x"], "a") is None


def test_values_of_libraries_become_plain_ones():
    day = datetime.date(2020, 2, 3)
    assert fields.plain(
        {
            b"key": np.array([[1, 2]]),
            "text": (b"\xc3\xa9", np.str_("s"), np.float32(0.5)),
            "day": day,
            "price": decimal.Decimal("1.50"),
        }
    ) == {
        "key": [[1, 2]],
        "text": ["é", "s", 0.5],
        "day": "2020-02-03",
        "price": "1.50",
    }


def test_what_is_no_text_stands_in_the_json_as_it_is_so_that_reading_meets_it():
    assert fields.as_text({"a": [b"x\xff"]}) == b'{"a": ["x\xff"]}'
    assert fields.as_text({"a": "x\0", "b": r"\u0000"}) == (
        '{"a": "x\0", "b": "\\\\u0000"}'
    )
    assert fields.as_text({"a": "\\\0"}) == '{"a": "\\\\\0"}'
    assert fields.as_text({"a": "\ud800"}) == '{"a": "\ud800"}'


# Of .jsonl.


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_each_line_with_one_of_the_fields_is_a_document(tmp_path):
    rows = [
        {"prompt": "p", "answer": "a", "id": 3},
        {"answer": MESSAGES},
        {"id": 4},
        ["prompt"],
        {"prompt": None, "answer": 5},
    ]
    path = write_lines(tmp_path / "a.jsonl", rows)
    texts, seen = met(over(path, text_field=BOTH), on_bad_text="skip")
    assert [(place, found_in(text)) for place, text in texts] == [
        ("a.jsonl line 1", {"prompt": "p", "answer": "a"}),
        ("a.jsonl line 2", {"answer": MESSAGES}),
        ("a.jsonl line 5", {"answer": 5}),
    ]
    assert seen["skipped"] == {"missing text": 2}
    assert refusal(read, over(path, text_field=("x", "y"))) == (
        f"document must have text under data.text_field; got {path} line 1 (none of "
        "the fields 'x', 'y'). Set --config.data.text_field (of examples: data.fields) "
        "or --config.data.on_bad_text=skip."
    )


def test_bad_text_in_a_field_follows_the_policy(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'{"prompt": "a\\u0000"}\n{"prompt": "\\ud800"}\n{"prompt": "a\xff"}\n'
        b'{"prompt": "ok"}\n'
    )
    source = over(path, text_field=BOTH)
    texts, seen = met(source, on_bad_text="replace")
    assert [found_in(text)["prompt"] for _, text in texts] == [
        "a\ufffd",
        "?",
        "a\ufffd",
        "ok",
    ]
    assert seen["replaced"] == {"NUL bytes": 1, "bad UTF-8": 2}
    assert read(source, on_bad_text="skip") == ['{"prompt": "ok"}']


def test_a_row_that_is_too_long_is_left_out_and_never_cut(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": "x" * 90}, {"prompt": "y"}])
    source = over(path, text_field=BOTH)
    texts, seen = met(source, on_bad_text="replace", max_document_bytes=80)
    assert texts == [("a.jsonl line 2", '{"prompt": "y"}')]
    assert seen["skipped"] == {"too long": 1}


# Of Parquet.


def write_table(path, columns, **options):
    pq.write_table(pa.table(columns), path, **options)
    return path


def test_nested_columns_are_lists_and_objects(tmp_path):
    chats = [MESSAGES, None, [], MESSAGES[:1]]
    path = write_table(
        tmp_path / "a.parquet",
        {"messages": chats, "label": [1, None, 3, 4], "id": range(4)},
        row_group_size=3,
    )
    source = over(path, text_field=("messages", "label"))
    texts, seen = met(source, on_bad_text="skip")
    assert [(place, found_in(text)) for place, text in texts] == [
        ("a.parquet row 0", {"messages": MESSAGES, "label": 1}),
        ("a.parquet row 2", {"messages": [], "label": 3}),
        ("a.parquet row 3", {"messages": MESSAGES[:1], "label": 4}),
    ]
    assert seen["skipped"] == {"missing text": 1}


@pytest.mark.parametrize("together", [1, 3, 1 << 23])
def test_rows_are_the_same_however_many_are_held(together, tmp_path, monkeypatch):
    monkeypatch.setattr("fm_jax.corpora.columns.BATCH_BYTES", together)
    rows = [{"prompt": f"{n}", "answer": [n] * n} for n in range(11)]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=4)
    assert [found_in(t) for t in read(over(path, text_field=BOTH))] == rows


def test_bytes_of_columns_are_text_and_met_as_such(tmp_path):
    texts = pa.array([[b"a\xc3\xa9"], [b"\xff"]], pa.list_(pa.binary()))
    path = write_table(tmp_path / "a.parquet", {"prompt": texts})
    source = over(path, text_field=BOTH)
    assert read(source, on_bad_text="skip") == ['{"prompt": ["aé"]}']
    assert read(source, on_bad_text="replace")[1] == '{"prompt": ["\ufffd"]}'


def test_a_table_with_none_of_the_columns_is_refused(tmp_path):
    path = write_table(tmp_path / "a.parquet", {"question": ["q"], "id": [1]})
    assert refusal(read, over(path, text_field=BOTH), on_bad_text="skip") == (
        f"data.fields must name fields of the data; got prompt, answer, none of which "
        f"is in {path}: question, id. Say where each stands: "
        '--config.data.fields=\'(("name", "its field"), ...)\'.'
    )


def labelled(names, codes):
    """Return a table whose column `label` has names, as the library `datasets` says."""
    features = {
        "label": {"names": names, "_type": "ClassLabel"},
        "text": {"dtype": "string"},
    }
    told = json.dumps({"info": {"features": features}}).encode()
    table = pa.table({"text": ["t"] * len(codes), "label": codes})
    return table.replace_schema_metadata({b"huggingface": told})


def test_labels_with_names_are_given_by_name_and_unknown_ones_are_missing(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(labelled(["bad", "good"], [1, 0, -1, 2, None]), path)
    texts = read(over(path, text_field=("text", "label")))
    assert [found_in(text).get("label") for text in texts] == [
        "good",
        "bad",
        None,
        None,
        None,
    ]


@pytest.mark.parametrize(
    "told", [b"{", b"[]", b'{"info": 3}', b'{"info": {"features": {"label": 3}}}']
)
def test_what_others_write_under_the_librarys_key_is_no_name(told):
    schema = pa.schema([("label", pa.int64())], metadata={b"huggingface": told})
    assert arrow.names_of(schema) == {}


NESTED = [
    pa.list_(pa.struct([("s", pa.string())])),
    pa.large_list(pa.struct([("s", pa.large_string())])),
    pa.list_(pa.struct([("s", pa.dictionary(pa.int8(), pa.string()))])),
]


@pytest.mark.parametrize("held", NESTED, ids=str)
def test_text_in_nested_columns_is_bytes_whatever_its_type(held):
    rows = [[{"s": "é"}, {"s": None}], [], None]
    column = pa.array(rows, pa.list_(pa.struct([("s", pa.string())])))
    if column.type != held:
        column = pa.array(rows, held)
    found = arrow.values(column)
    assert found == [[{"s": "é".encode()}, {"s": None}], [], None]


# Of what has none.


@pytest.mark.parametrize("name", ["notes.txt", "a.py", "a.array_record"])
def test_files_without_fields_are_refused_with_the_way_out(name, tmp_path):
    path = tmp_path / name
    if name.endswith("record"):
        write_records(path, [b"{}"])
    else:
        path.write_text("x")
    assert refusal(read, over(path, text_field=BOTH)) == (
        "files of examples must have fields, as .jsonl and .parquet do; got "
        f"{path}. Write its examples as .jsonl, an object a line, or set "
        "--config.data.examples=text."
    )


def test_synthetic_documents_have_no_fields():
    assert refusal(make, source="synthetic", text_field=BOTH) == (
        "data.source of examples must be one of text, tfds and hf; got synthetic, "
        "whose documents have no fields. fm data toy makes examples."
    )


# What it is known by.


def test_the_identity_of_one_field_is_as_it_ever_was_and_of_several_another(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "t"}])
    one, two = (
        over(path, text_field=field).identity("train") for field in ("text", ("text",))
    )
    assert one == {
        "files": {"a.jsonl": documents_digest(path)},
        "split": "all",
        "split_by": "blake2b of texts",
        "eval_fraction": 0.0,
        "text_field": "text",
    }
    assert two == one | {"text_field": ["text"]}
    assert json.loads(json.dumps(two)) == two


def documents_digest(path):
    import hashlib

    return hashlib.blake2b(path.read_bytes()).hexdigest()[:32]


def test_a_spec_of_several_fields_reads_the_same_after_json(tmp_path):
    from fm_jax.corpora import sources

    path = write_lines(tmp_path / "a.jsonl", [{"prompt": "p", "answer": "a"}])
    source = over(path, text_field=BOTH)
    told = json.loads(json.dumps(source.spec("train")))
    reading = documents.Reading(on_bad_text="error", max_document_bytes=99)
    (piece,) = source.pieces("train")
    assert [text for _, text in sources.open_reader(told)(piece, reading)] == [
        '{"answer": "a", "prompt": "p"}'
    ]
