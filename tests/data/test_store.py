"""Tests of the token store: its layout, what is read of it, and what is refused."""

import gzip
import hashlib
import json
import shutil
import textwrap

import numpy as np
import pytest
import tokenizers as library
from tokenizers import models, normalizers, pre_tokenizers

from fm_jax.data import store
from fm_jax.data.lanes import Sizes
from fm_jax.tokenizers import jsonfile, plain
from tests.data import made
from tests.data.made import CodePoints, build, refusal

BYTES = plain.ByteTokenizer()
TEXTS = ["abc", "d", "", "é\U0001f642", "fg\x00h"]
END = 256


def again(path):
    return f"Delete {path} and build it again, as the same command does."


def stream_of(texts):
    """Return the ids of a store of bytes by its definition."""
    return [i for text in texts for i in (END, *text.encode())] + [END]


# Layout.


def test_the_stream_is_an_end_before_each_document_and_after_the_last(tmp_path):
    built = build(tmp_path, TEXTS, BYTES)
    expected = [END, 97, 98, 99, END, 100, END, END, 0xC3, 0xA9, 0xF0, 0x9F, 0x99, 0x82]
    expected += [END, 102, 103, 0, 104, END]
    assert built.read(0, len(built)).tolist() == expected == stream_of(TEXTS)
    assert built.offsets.tolist() == [0, 4, 6, 7, 14]
    assert built.leftover.tolist() == [0] * 5
    assert built.offsets.dtype == np.int64


def blake2b(raw):
    return hashlib.blake2b(raw, digest_size=16).hexdigest()


def test_the_header_tells_what_is_there(tmp_path):
    built = build(tmp_path, TEXTS, BYTES, name="five", split="eval")
    files = made.contents(built)
    header = json.loads(files.pop("header.json"))
    assert header == built.header
    assert len(header.pop("digest")) == 32
    assert header == {
        "format": 2,
        "name": built.path.name,
        "split": "eval",
        "dtype": "<u2",
        "tokenizer": BYTES.fingerprint,
        "vocab_size": 257,
        "end_id": 256,
        "num_documents": 5,
        "num_tokens": 20,
        "num_bytes": 14,
        "gzip_bytes": len(gzip.compress("".join(TEXTS).encode(), 9)),
        "gzip_of": 14,
        "has_leftover": False,
        "quantiles": dict(
            zip(["0", "5", "25", "50", "75", "95", "100"], [0, 0, 1, 3, 4, 4, 6],
                strict=True)
        ),
        "vocabulary_used": 15,
        "unknown_ids": 0,
        "shards": [
            {
                "file": "tokens-00000.bin",
                "tokens": 20,
                "documents": 5,
                "blake2b": blake2b(files.pop("tokens-00000.bin")),
            }
        ],
        "arrays": {name: blake2b(raw) for name, raw in files.items()},
        "options": made.OPTIONS,
        "met": {"skipped": {}, "replaced": {}, "empty": 0, "examples": {}},
        "duplicates": 0,
        "held_out_elsewhere": 0,
        "source": {"name": "five", "texts": TEXTS},
    }  # fmt: skip
    assert sorted(files) == [
        "counts.npy",
        "hashes.npy",
        "leftover.npy",
        "offsets.npy",
        "origins.npy",
        "pieces.json",
        "tokenizer.json",
    ]
    assert (len(built), built.num_bytes, built.tokenizer) == (20, 14, BYTES.fingerprint)


def test_arrays_tell_of_each_document_and_each_id(tmp_path):
    built = build(tmp_path, TEXTS, BYTES, name="five")
    stream = stream_of(TEXTS)
    digests = [hashlib.blake2b(t.encode(), digest_size=16).digest() for t in TEXTS]
    assert built.hashes.astype("<u8").tobytes() == b"".join(digests)
    assert built.origins.tolist() == [[0, k] for k in range(5)]
    assert built.pieces == [["five", ""]]
    counts = np.load(built.path / "counts.npy")
    assert counts.tolist() == [stream.count(i) for i in range(257)]
    assert (built.path / "tokenizer.json").read_text() == BYTES.to_json()


def test_the_three_lines_of_numpy_in_the_docstring_read_a_store(tmp_path, monkeypatch):
    built = build(tmp_path, TEXTS, BYTES)
    lines = [line for line in store.__doc__.splitlines() if line.startswith("    ")]
    assert len(lines) == 3
    found = {"json": json, "np": np}
    monkeypatch.chdir(built.path)
    exec(textwrap.dedent("\n".join(lines)), found)
    assert found["tokens"].tolist() == stream_of(TEXTS)
    assert found["offsets"].tolist() == [0, 4, 6, 7, 14]
    assert found["header"]["num_documents"] == 5


def test_shards_read_as_one_stream(tmp_path):
    texts = ["abcdefghijklmnopqrstuvwxyz", *TEXTS, "z" * 6]
    stream = stream_of(texts)
    sizes = Sizes(shard_tokens=7, batch_bytes=1)
    built = build(tmp_path, texts, BYTES, sizes=sizes)
    assert len(stream) == 54
    told = [(s["tokens"], s["documents"]) for s in built.header["shards"]]
    assert told == [(27, 1), (14, 4), (13, 2)]
    assert built.starts.tolist() == [0, 27, 41]
    assert built.starts.dtype == np.int64
    assert [len(shard) for shard in built.shards] == [27, 14, 13]
    for start in range(len(stream)):
        for stop in range(start + 1, len(stream) + 1):
            assert built.read(start, stop).tolist() == stream[start:stop]


def test_a_place_of_the_stream_is_of_the_document_whose_end_id_came_last(tmp_path):
    built = build(tmp_path, TEXTS, BYTES)
    found = built.documents_of(np.arange(20))
    assert found.tolist() == [0] * 4 + [1] * 2 + [2] + [3] * 7 + [4] * 6


@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [(1 << 16, "<u2"), ((1 << 16) + 1, "<u4"), (0x110001, "<u4")],
)
def test_ids_take_two_bytes_where_they_fit_and_four_where_not(
    vocab_size, dtype, tmp_path
):
    """Fault 39, data: ids do not fit the type that they are stored in.

    Promise: the type follows the vocabulary, so that none wraps.
    """
    tokenizer = CodePoints(vocab_size)
    text = "aé\u20ac\ufffd" + ("\U0010ffff" if vocab_size > 1 << 20 else "")
    built = build(tmp_path, [text], tokenizer)
    assert built.header["dtype"] == dtype
    end = tokenizer.end_id
    assert built.read(0, len(built)).tolist() == [end, *map(ord, text), end]
    size = (built.path / "tokens-00000.bin").stat().st_size
    assert size == len(built) * int(dtype[-1])


def word_piece():
    """Return a tokenizer whose ids lose case, spaces, and what it does not know."""
    pieces = ["[UNK]", "[SEP]", "ab", "c"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    inner = library.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.add_special_tokens(["[UNK]", "[SEP]"])
    return jsonfile.JsonTokenizer(inner.to_str())


def test_bytes_that_ids_do_not_stand_for_are_kept_by_document(tmp_path):
    built = build(tmp_path, ["ab c", "Ab  c", "\U0001f642 c", "ab"], word_piece())
    assert built.read(0, len(built)).tolist() == [1, 2, 3, 1, 2, 3, 1, 0, 3, 1, 2, 1]
    assert built.leftover.tolist() == [1, 2, 5, 0]
    assert built.header["has_leftover"]
    assert built.header["unknown_ids"] == 1


# Where documents stood.


def test_a_documents_origin_is_its_file_and_its_place_in_it(tmp_path):
    (tmp_path / "texts" / "in").mkdir(parents=True)
    rows = tmp_path / "texts" / "in" / "b.jsonl.gz"
    rows.write_bytes(gzip.compress(b'{"text": "one"}\n\n{"text": "two"}\n'))
    (tmp_path / "texts" / "a.txt").write_text("three\nfour\n")
    (tmp_path / "c.txt").write_text("held out")
    apart = (str(tmp_path / "c.txt"),)
    source = made.source_of(tmp_path / "texts", eval_paths=apart)
    options = {"on_bad_text": "replace", "max_document_bytes": 7}
    built = made.build_files(tmp_path, tokenizer=BYTES, source=source, **options)
    assert made.texts_of(built) == ["three\n", "four\n", "one", "two"]
    found = [built.origin(document) for document in range(4)]
    assert found[:2] == ["a.txt", "a.txt part 2"]
    assert found[2:] == ["in/b.jsonl.gz line 1", "in/b.jsonl.gz line 3"]


# What is refused.


def test_opening_with_another_tokenizer_is_refused(tmp_path):
    """Fault 39, data: a store was made with another tokenizer.

    Promise: both fingerprints are told, exit 2.
    """
    built = build(tmp_path, TEXTS, BYTES)
    other = CodePoints(300)
    assert refusal(store.open_store, built.path, other) == (
        f"token store must be made with the tokenizer in use; got {built.path} made "
        f"with {BYTES.fingerprint}, in use {other.fingerprint}."
    )
    assert store.open_store(built.path).tokenizer == BYTES.fingerprint


@pytest.mark.parametrize("text", [None, "", "[1]", '{"format": '])
def test_a_header_that_is_missing_or_damaged_is_refused(text, tmp_path):
    file = tmp_path / "header.json"
    if text is not None:
        file.write_text(text)
    said = refusal(store.open_store, tmp_path)
    assert said.startswith(f"token store must be whole; got {file} (")
    assert said.endswith(
        f"). Delete {tmp_path} and build it again, as the same command does."
    )
    assert "\n" not in said


@pytest.mark.parametrize("damage", ["cut", "grown", "gone"])
def test_a_shard_of_the_wrong_size_is_refused(damage, tmp_path):
    built = build(tmp_path, TEXTS, BYTES)
    file = built.path / "tokens-00000.bin"
    raw = file.read_bytes()
    if damage == "gone":
        file.unlink()
        got = ", which is missing"
    else:
        file.write_bytes(raw[:-3] if damage == "cut" else raw + b"\0")
        got = f" with {file.stat().st_size} bytes"
    assert refusal(build, tmp_path, TEXTS, BYTES) == (
        f"token store must be whole; got {file}{got}. "
        f"Delete {built.path} and build it again, as the same command does."
    )
    shutil.rmtree(built.path)
    again = build(tmp_path, TEXTS, BYTES)
    assert again.read(0, 20).tolist() == stream_of(TEXTS)


@pytest.mark.parametrize("name", ["offsets", "leftover"])
@pytest.mark.parametrize("damage", ["cut", "empty", "gone"])
def test_a_damaged_array_is_refused(damage, name, tmp_path):
    built = build(tmp_path, TEXTS, BYTES)
    file = built.path / f"{name}.npy"
    raw = file.read_bytes()
    file.unlink()
    if damage != "gone":
        file.write_bytes(raw[:-1] if damage == "cut" else b"")
    said = refusal(build, tmp_path, TEXTS, BYTES)
    assert said.startswith(f"token store must be whole; got {file} (")
    assert said.endswith(
        f"). Delete {built.path} and build it again, as the same command does."
    )
    assert "\n" not in said


def test_an_array_of_another_store_is_refused(tmp_path):
    built, other = (build(tmp_path, texts, BYTES) for texts in (TEXTS, TEXTS[1:]))
    shutil.copy(other.path / "offsets.npy", built.path)
    assert refusal(build, tmp_path, TEXTS, BYTES) == (
        f"token store must be whole; got {built.path}/offsets.npy of int64 [4]. "
        f"Delete {built.path} and build it again, as the same command does."
    )
    shutil.copy(other.path / "hashes.npy", built.path)
    opened = store.open_store(other.path)
    shutil.rmtree(other.path)
    assert opened.read(0, 3).tolist() == [END, 100, END]
