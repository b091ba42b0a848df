"""Tests of a store's summary: what its header says, in lines and for JSON."""

import json

import pytest

from fm_jax.data import summary

PLAIN = {
    "format": 2,
    "name": "3f2a90bc11223344",
    "split": "train",
    "tokenizer": "9ab0c1d2e3f40516",
    "dtype": "<u4",
    "vocab_size": 80_000,
    "num_documents": 3,
    "num_bytes": 812,
    "num_tokens": 207,
    "gzip_bytes": 0,
    "gzip_of": 0,
    "shards": [{}],
    "quantiles": {"0": 0, "5": 0, "25": 0, "50": 7, "75": 7, "95": 7, "100": 196},
    "vocabulary_used": 100,
    "unknown_ids": 0,
    "duplicates": 0,
    "held_out_elsewhere": 0,
    "met": {"skipped": {}, "replaced": {}, "empty": 0, "examples": {}},
}
MET = PLAIN | {
    "dtype": "<u2",
    "split": "eval",
    "num_documents": 12_345,
    "num_bytes": 58_123_456,
    "num_tokens": 14_532_110,
    "gzip_bytes": 15_000_000,
    "gzip_of": 50_000_000,
    "shards": [{}, {}],
    "quantiles": {"0": 1, "5": 12, "25": 103, "50": 310, "75": 700, "95": 3012,
                  "100": 98_765},
    "vocab_size": 32_768,
    "vocabulary_used": 31_022,
    "unknown_ids": 17,
    "duplicates": 1,
    "held_out_elsewhere": 2_003,
    "met": {
        "skipped": {"bad UTF-8": 12, "broken JSON": 1},
        "replaced": {"NUL bytes": 2},
        "empty": 4,
        "examples": {
            "bad UTF-8": ["c/a.jsonl line 7", "c/a.jsonl line 19", "b.txt"],
            "broken JSON": ["c/a.jsonl line 8"],
            "NUL bytes": ["x\x1b[31m.txt", "y.txt"],
        },
    },
}  # fmt: skip


def test_a_store_of_clean_text_takes_eight_lines():
    assert summary.lines(PLAIN) == [
        "store       3f2a90bc11223344, train, tokenizer 9ab0c1d2e3f40516",
        "documents   3",
        "text        812 bytes",
        "tokens      207, end ids among them: 828 bytes of uint32 in 1 shard",
        "            4.00 bytes of text each, end ids apart",
        "length      0 to 196 tokens a document, mean 67.7",
        "            5% up to 0, 25% up to 0, 50% up to 7, 75% up to 7, 95% up to 7",
        "vocabulary  100 of 80,000 ids used (0.1%)",
    ]


def test_what_was_met_and_left_out_has_a_line_each():
    assert summary.lines(MET) == [
        "store       3f2a90bc11223344, eval, tokenizer 9ab0c1d2e3f40516",
        "documents   12,345",
        "text        58.1 MB; gzip -9 takes 2.400 bits per byte",
        "tokens      14,532,110, end ids among them: 29.1 MB of uint16 in 2 shards",
        "            4.00 bytes of text each, end ids apart",
        "length      1 to 98,765 tokens a document, mean 1,176.2",
        "            5% up to 12, 25% up to 103, 50% up to 310, 75% up to 700, "
        "95% up to 3,012",
        "vocabulary  31,022 of 32,768 ids used (94.7%); 17 tokens unknown",
        "left out    1 repeated (they stand earlier)",
        "            2,003 held out",
        "            4 without text",
        "skipped     12 bad UTF-8: c/a.jsonl line 7, c/a.jsonl line 19, b.txt, ...",
        "            1 broken JSON: c/a.jsonl line 8",
        "replaced    2 NUL bytes: x␛[31m.txt, y.txt",
    ]


@pytest.mark.parametrize(
    "size, said",
    [(0, "0 bytes"), (1, "1 byte"), (1_500, "1.5 kB"), (2 * 10**9, "2 GB"),
     (3_210 * 10**9, "3.21 TB")],
)  # fmt: skip
def test_sizes_have_units(size, said):
    assert summary.lines(PLAIN | {"num_bytes": size})[2] == f"text        {said}"


def test_numbers_are_those_of_the_lines_for_json():
    found = summary.numbers(MET)
    assert json.loads(json.dumps(found)) == found
    assert found == {
        "name": "3f2a90bc11223344",
        "split": "eval",
        "tokenizer": "9ab0c1d2e3f40516",
        "documents": 12_345,
        "bytes": 58_123_456,
        "gzip_bits_per_byte": 2.4,
        "tokens": 14_532_110,
        "bytes_per_token": 58_123_456 / (14_532_110 - 12_346),
        "dtype": "uint16",
        "shards": 2,
        "mean_length": (14_532_110 - 12_346) / 12_345,
        "lengths": MET["quantiles"],
        "vocab_size": 32_768,
        "vocabulary_used": 31_022,
        "unknown_ids": 17,
        "duplicates": 1,
        "held_out_elsewhere": 2_003,
        **MET["met"],
    }


def test_documents_without_ids_have_no_bytes_per_token():
    found = summary.numbers(PLAIN | {"num_tokens": 4, "num_bytes": 0})
    assert (found["bytes_per_token"], found["mean_length"]) == (0.0, 0.0)
    assert found["gzip_bits_per_byte"] is None
