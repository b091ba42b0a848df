"""Tests of what a header says of all shards together."""

import gzip

import numpy as np
import pytest

from fm_jax.data import joined
from fm_jax.data.lanes import Sizes
from fm_jax.tokenizers import plain
from tests.data.made import build

BYTES = plain.ByteTokenizer()
CUT = Sizes(shard_tokens=40, batch_bytes=10)


@pytest.mark.parametrize("count", [1, 2, 3, 19, 20, 21, 100, 101, 257])
def test_quantiles_are_the_lower_ones_of_tokens_per_document(count, tmp_path):
    lengths = np.random.default_rng(count).integers(0, 30, count)
    built = build(tmp_path, ["a" * n for n in lengths], BYTES, sizes=CUT)
    expected = {
        str(q): int(np.percentile(lengths, q, method="lower"))
        for q in (0, 5, 25, 50, 75, 95, 100)
    }
    assert built.header["quantiles"] == expected


def test_rows_of_many_shards_are_strung_in_bounded_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(joined.shards, "CHUNK_DOCUMENTS", 3)
    texts = [f"text {n} " * (n % 5) for n in range(60)]
    built = build(tmp_path, texts, BYTES, sizes=CUT)
    assert len(built.shards) > 10
    lengths = [len(text) + 1 for text in texts]
    assert built.offsets.tolist() == np.cumsum([0, *lengths[:-1]]).tolist()
    ids = built.read(0, len(built))
    counts = np.load(built.path / "counts.npy")
    assert counts.tolist() == np.bincount(ids, minlength=257).tolist()
    assert built.header["vocabulary_used"] == len(set(ids.tolist()))
    assert built.header["num_bytes"] == sum(map(len, texts))


@pytest.mark.parametrize("limit", [1, 50, 2000, 1 << 20])
def test_gzip_is_asked_of_the_first_held_out_text_only(limit, tmp_path, monkeypatch):
    monkeypatch.setattr(joined, "GZIP_BYTES", limit)
    texts = [f"é text {n} " * (n % 5) for n in range(60)]
    options = {"sizes": CUT, "piece_texts": 7}
    text = "".join(texts).encode()
    held_out = build(tmp_path, texts, BYTES, split="eval", **options)
    first = min(limit, len(text))
    assert held_out.header["gzip_of"] == first
    packed = len(gzip.compress(text[:first], 9))
    assert held_out.header["gzip_bytes"] == packed
    train = build(tmp_path, texts, BYTES, **options)
    assert (train.header["gzip_of"], train.header["gzip_bytes"]) == (0, 0)
