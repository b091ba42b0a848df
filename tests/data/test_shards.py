"""Tests of shards in the making: whole with their record, and not there before it."""

import hashlib
import itertools

import numpy as np
import pytest

from fm_jax.data import shards
from fm_jax.tokenizers import plain

BYTES = plain.ByteTokenizer()
END = 256


def add(shard, *texts):
    """Add texts, whose hashes and places are some numbers."""
    rows = np.arange(2 * len(texts)).reshape(-1, 2) + 10 * shard.num_documents
    shard.add(
        BYTES.encode_batch(texts),
        raws=[text.encode() for text in texts],
        hashes=rows.astype(np.uint64),
        origins=rows + 5,
    )


def open_shard(folder, number=0, room=0):
    return shards.Shard(folder, lane=3, shard=number, tokenizer=BYTES, room=room)


def test_a_closed_shard_has_ids_rows_counts_and_a_record(tmp_path):
    with open_shard(tmp_path) as shard:
        add(shard, "abc", "")
        add(shard)
        add(shard, "é")
        shard.close(next={"piece": 7})
    ids = [END, 97, 98, 99, END, END, 0xC3, 0xA9]
    raw = np.array(ids, "<u2").tobytes()
    assert (tmp_path / "00003-00000.tokens").read_bytes() == raw
    (record,) = shards.records(tmp_path, 3)
    closed = raw + np.array([END], "<u2").tobytes()
    assert record == {
        "name": "00003-00000",
        "documents": 3,
        "tokens": 8,
        "bytes": 5,
        "text": 0,
        "blake2b": hashlib.blake2b(raw, digest_size=16).hexdigest(),
        "blake2b_closed": hashlib.blake2b(closed, digest_size=16).hexdigest(),
        "next": {"piece": 7},
    }
    (rows,) = shards.rows(tmp_path, record)
    assert rows["offsets"].tolist() == [0, 4, 5]
    assert rows["leftover"].tolist() == [0, 0, 0]
    assert rows["hashes"].tolist() == [[0, 1], [2, 3], [20, 21]]
    assert rows["origins"].tolist() == [[5, 6], [7, 8], [25, 26]]
    assert shards.counts(tmp_path, record).tolist() == [
        ids.count(i) for i in range(257)
    ]


def test_rows_come_some_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "CHUNK_DOCUMENTS", 3)
    with open_shard(tmp_path) as shard:
        add(shard, *"abcdefgh")
        shard.close()
    (record,) = shards.records(tmp_path, 3)
    found = [rows["offsets"].tolist() for rows in shards.rows(tmp_path, record)]
    assert found == [[0, 2, 4], [6, 8, 10], [12, 14]]


def test_what_was_not_closed_leaves_no_file(tmp_path):
    for error in (KeyboardInterrupt, OSError):
        with pytest.raises(error), open_shard(tmp_path, room=9) as shard:
            add(shard, "abc")
            assert len(list(tmp_path.iterdir())) == 3
            raise error
        assert list(tmp_path.iterdir()) == []
    assert shards.records(tmp_path, 3) == []


def test_records_are_those_before_the_first_that_is_missing(tmp_path):
    for number in range(4):
        with open_shard(tmp_path, number) as shard:
            add(shard, "a" * number)
            shard.close()
    found = [record["tokens"] for record in shards.records(tmp_path, 3)]
    assert found == [1, 2, 3, 4]
    (tmp_path / "00003-00002.json").unlink()
    assert [record["tokens"] for record in shards.records(tmp_path, 3)] == [1, 2]
    assert shards.records(tmp_path, 4) == []


@pytest.mark.parametrize("room", [0, 1, 4, 5, 6, 100])
def test_the_first_bytes_of_text_are_kept(room, tmp_path):
    with open_shard(tmp_path, room=room) as shard:
        add(shard, "ab", "é")
        add(shard, "cd")
        shard.close()
    (record,) = shards.records(tmp_path, 3)
    assert record["text"] == shard.num_text == min(room, 6)
    file = tmp_path / "00003-00000.text"
    assert file.exists() == bool(room)
    if room:
        assert file.read_bytes() == "abécd".encode()[:room]


def test_a_shard_does_not_depend_on_how_its_documents_were_batched(tmp_path):
    texts = ["abc", "", "é", "a b", "", "x" * 50]
    found = []
    for way, cuts in enumerate(([0, 6], [0, 1, 2, 3, 4, 5, 6], [0, 4, 4, 6])):
        folder = tmp_path / str(way)
        folder.mkdir()
        with open_shard(folder) as shard:
            for start, stop in itertools.pairwise(cuts):
                some = texts[start:stop]
                words = np.zeros((len(some), 2), np.uint64)
                raws = [text.encode() for text in some]
                ids = BYTES.encode_batch(some)
                shard.add(ids, raws=raws, hashes=words, origins=words.astype(int))
            shard.close()
        found.append({file.name: file.read_bytes() for file in folder.iterdir()})
    assert found[0] == found[1] == found[2]
