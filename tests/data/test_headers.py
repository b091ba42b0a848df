"""Tests of a store's header: sealed, and read as if a stranger had written it."""

import hashlib
import json
import os

import pytest

from fm_jax.data import headers
from tests.data import written

TEXTS = ["abc", "", "é\U0001f642", "d"]


@pytest.fixture
def folder(tmp_path):
    return written.write(tmp_path / "store", TEXTS, cuts=(2,))


def refusal(folder):
    with pytest.raises(headers.Unsound) as error:
        headers.read(folder)
    return str(error.value)


def test_a_sealed_header_is_read_as_it_was_given(folder):
    given = json.loads((folder / "header.json").read_text())
    given["name"] = 'é "digest": ""'
    del given["digest"]
    text = headers.seal(given)
    (folder / "header.json").write_text(text)
    found = headers.read(folder)
    assert {k: v for k, v in found.items() if k != "digest"} == given
    empty = text.replace(found["digest"], "")
    assert (
        found["digest"] == hashlib.blake2b(empty.encode(), digest_size=16).hexdigest()
    )


def test_a_header_sealed_by_hand_is_read(folder):
    assert headers.read(folder)["num_documents"] == 4


def test_each_flipped_bit_of_a_header_is_refused(tmp_path):
    folder = written.write(tmp_path / "store", TEXTS, source={"é": 1e-5})
    raw = (folder / "header.json").read_bytes()
    for place in range(len(raw)):
        for bit in (place % 8, 5):  # the fifth turns small letters into capitals
            other = bytearray(raw)
            other[place] ^= 1 << bit
            (folder / "header.json").write_bytes(other)
            assert refusal(folder)


def test_a_header_changed_by_hand_is_refused(folder):
    text = (folder / "header.json").read_text()
    (folder / "header.json").write_text(
        text.replace('"split": "train"', '"split": "t"')
    )
    assert refusal(folder) == "was changed after it was written: its digest is another"


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("format", 3, "format must be 2; got 3"),
        ("num_tokens", -1, "num_tokens must be a count; got -1"),
        ("num_tokens", True, "num_tokens must be a count; got True"),
        ("num_tokens", 1e3, "num_tokens must be a count; got 1000.0"),
        ("num_tokens", 2**63, "num_tokens must be a count; got 9223372036854775808"),
        ("num_bytes", None, "num_bytes must be a count; got None"),
        ("num_tokens", 14, "num_tokens must be the shards' 15 together; got 14"),
        ("num_documents", 5, "num_documents must be the shards' 4 together; got 5"),
        ("num_documents", 0, "num_documents must be 1 or more; got 0"),
        ("vocab_size", 0, "vocab_size must be from 1 to 16777216; got 0"),
        (
            "vocab_size",
            2**40,
            "vocab_size must be from 1 to 16777216; got 1099511627776",
        ),
        ("end_id", 257, "end_id must be below 257; got 257"),
        ("dtype", "|O", "dtype must be <u2; got '|O'"),
        ("tokenizer", ["x"], "tokenizer must be a str; got ['x']"),
        ("has_leftover", 0, "has_leftover must be a bool; got 0"),
        ("shards", [], "shards must be a list of one or more; got []"),
        ("shards", {"0": 1}, "shards must be a list of one or more; got {'0': 1}"),
        ("shards", [7], "shards[0] must be an object; got 7"),
        ("digest", "zz", "digest must be a blake2b in hex; got 'zz'"),
    ],
)
def test_a_hostile_header_is_refused(folder, field, value, message):
    written.reseal(folder, **{field: value})
    if field == "digest":
        text = (folder / "header.json").read_text()
        held = json.loads(text)["digest"]
        (folder / "header.json").write_text(text.replace(held, value))
    assert refusal(folder) == message


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("file", "../x", "shards[1]['file'] must be tokens-00001.bin; got '../x'"),
        ("file", "/etc/passwd",
         "shards[1]['file'] must be tokens-00001.bin; got '/etc/passwd'"),
        ("file", "tokens-00000.bin",
         "shards[1]['file'] must be tokens-00001.bin; got 'tokens-00000.bin'"),
        ("file", None, "shards[1]['file'] must be tokens-00001.bin; got None"),
        ("tokens", -(2**20),
         "shards[1]['tokens'] must be a count, at least 1; got -1048576"),
        ("documents", "2",
         "shards[1]['documents'] must be a count, at least 1; got '2'"),
        ("blake2b", "A" * 32,
         f"shards[1]['blake2b'] must be a blake2b in hex; got '{'A' * 32}'"),
    ],
)  # fmt: skip
def test_a_hostile_shard_is_refused(folder, field, value, message):
    shards = json.loads((folder / "header.json").read_text())["shards"]
    shards[1][field] = value
    written.reseal(folder, shards=shards)
    assert refusal(folder) == message


@pytest.mark.parametrize("name", ["../offsets.npy", "/tmp/x.npy", "header.json"])
def test_only_the_formats_own_files_may_be_named(folder, name):
    arrays = json.loads((folder / "header.json").read_text())["arrays"]
    written.reseal(folder, arrays={**arrays, name: "0" * 32})
    start = "arrays must be digests of offsets.npy, leftover.npy, hashes.npy, "
    assert refusal(folder).startswith(start)
    written.reseal(folder, arrays={**arrays, "counts.npy": "0" * 31})
    message = f"arrays['counts.npy'] must be a blake2b in hex; got '{'0' * 31}'"
    assert refusal(folder) == message
    written.reseal(folder, arrays=None)
    assert refusal(folder).endswith("pieces.json, tokenizer.json; got None")


@pytest.mark.parametrize(
    "raw, message",
    [
        (b"[" * 200_000, "is not JSON (maximum recursion depth exceeded while "),
        (b"\xff\xfe\x00", "is not JSON ("),
        (b'{"format": 2', "is not JSON (Expecting ',' delimiter"),
        (b'{"num_tokens": ' + b"9" * 5000 + b"}", "is not JSON (Exceeds the limit "),
        (b"[2]", "is not an object of JSON"),
        (b"{}", "format must be 2; got None"),
        (b" " * ((1 << 26) + 1), "must have at most 67,108,864 bytes"),
    ],
)
def test_what_is_no_header_is_refused(folder, raw, message):
    (folder / "header.json").write_bytes(raw)
    assert refusal(folder).startswith(message)


def test_a_header_that_is_no_plain_file_is_not_opened(folder):
    (folder / "header.json").unlink()
    assert refusal(folder) == "is missing"
    os.mkfifo(folder / "header.json")  # to open it would wait for ever
    assert refusal(folder) == "is not a plain file"
