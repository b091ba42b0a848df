"""Tests of examples on the disk: made once, whole, and what is said of them."""

import json

import numpy as np
import pytest

from fm_jax.corpora.documents import Piece
from fm_jax.data import example_store, sides
from fm_jax.data.examples import Maker
from fm_jax.data.sides import Reader
from fm_jax.errors import UserError
from fm_jax.tokenizers.plain import ByteTokenizer

FILE = Piece("a/rows.jsonl", "/x/a/rows.jsonl")
TABLE = Piece("b.parquet", "/x/b.parquet")
ROWS = [
    (FILE, 2, {"prompt": "ab", "completion": "c"}),
    (FILE, 5, {"prompt": "", "completion": "defg"}),
    (TABLE, 0, {"prompt": "h", "completion": "ij"}),
]


def _maker(kind="completion", max_length=6, on_long="error", labels=()):
    reader = Reader(kind, sides.fields(kind, ()))
    return Maker(reader, ByteTokenizer(), max_length, on_long, labels)


def _store(folder, rows=ROWS, maker=None, say=lambda line: None, **how):
    maker = maker or _maker()
    given = {"split": "train", "skips": False, "may_build": True} | how
    identity = given.pop("identity", {"files": "a"})
    return example_store.find_or_make(
        folder, identity, lambda: iter(rows), lambda: maker, kind=maker.kind, say=say,
        **given,
    )  # fmt: skip


def test_all_segments_stand_one_after_the_other(tmp_path):
    store = _store(tmp_path)
    assert store.offsets.tolist() == [0, 4, 9, 13]
    assert store.tokens.tolist() == [256, *b"abc", 256, *b"defg", 256, *b"hij"]
    assert store.targets.tolist() == [*b"abc", 256, *b"defg", 256, *b"hij", 256]
    assert store.weights.tolist() == [0, 0, 1, 1] + [1] * 5 + [0, 1, 1, 1]
    assert [store.where(example) for example in range(len(store))] == [
        "a/rows.jsonl line 2", "a/rows.jsonl line 5", "b.parquet row 0",
    ]  # fmt: skip
    assert store.num_segments == 1
    assert store.num_bytes == 1 + 4 + 2  # the end is no text
    assert store.header["end_ids"] == [256]


def test_a_pair_is_two_segments_of_one_example(tmp_path):
    rows = [(FILE, 1, {"prompt": "a", "chosen": "b", "rejected": "cd"})] * 2
    store = _store(tmp_path, rows, _maker("preference", 9))
    assert (len(store), store.num_segments) == (2, 2)
    assert store.offsets.tolist() == [0, 3, 7, 10, 14]
    assert store.where(1) == "a/rows.jsonl line 1"


def test_labels_are_no_text_and_are_kept(tmp_path):
    rows = [(FILE, 1, {"text": "ab", "label": "y"})]
    store = _store(tmp_path, rows, _maker("classify", labels=("x", "y")))
    assert store.labels == ("x", "y")
    assert (store.num_bytes, store.header["num_trained"]) == (0, 1)
    assert store.header["end_ids"] == []


def test_many_rows_are_as_few_at_a_time(tmp_path, monkeypatch):
    rows = [(FILE, n, {"prompt": "p" * (n % 3), "completion": "c"}) for n in range(9)]
    whole = _store(tmp_path / "a", rows)
    monkeypatch.setattr(example_store, "AT_ONCE", 2)
    parts = _store(tmp_path / "b", rows)
    for name in example_store.ARRAYS:
        np.testing.assert_array_equal(getattr(whole, name), getattr(parts, name))
    assert whole.header == parts.header


def test_what_is_made_is_found_again_without_reading_a_row(tmp_path):
    first = _store(tmp_path)

    def never():
        raise AssertionError

    again = example_store.find_or_make(
        tmp_path, {"files": "a"}, never, never, kind="completion", split="train",
        skips=False, say=lambda line: None, may_build=False,
    )  # fmt: skip
    assert again.path == first.path
    assert again.header == first.header
    np.testing.assert_array_equal(again.tokens, first.tokens)
    assert _store(tmp_path, identity={"files": "b"}).path != first.path
    assert not [path for path in tmp_path.iterdir() if path.name.endswith("building")]


def test_what_is_not_made_is_refused_where_it_may_not_be(tmp_path):
    with pytest.raises(UserError, match="must be prepared; got nothing there"):
        _store(tmp_path, may_build=False)


def test_bad_rows_are_refused_or_skipped_and_told(tmp_path):
    rows = [*ROWS, (FILE, 9, {"prompt": "a"})]
    with pytest.raises(UserError, match=r"^a/rows.jsonl line 9 must have a field"):
        _store(tmp_path, rows)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    said = []
    store = _store(tmp_path, rows, say=said.append, skips=True)
    assert len(store) == 3
    assert said[-1] == "WARNING: train: 1 examples bad, left out: a/rows.jsonl line 9"


def test_long_examples_are_counted_and_told(tmp_path):
    said = []
    store = _store(
        tmp_path / "a", maker=_maker("completion", 4, "drop"), say=said.append
    )
    assert [store.where(n) for n in range(len(store))] == [
        "a/rows.jsonl line 2", "b.parquet row 0",
    ]  # fmt: skip
    assert said[-1].endswith("1 examples longer than data.max_length, left out: "
                             "a/rows.jsonl line 5")  # fmt: skip
    said.clear()
    store = _store(tmp_path / "b", maker=_maker("completion", 4, "truncate"),
                   say=said.append)  # fmt: skip
    assert len(store) == 3
    assert said[-1].endswith("longer than data.max_length, cut: a/rows.jsonl line 5")
    _store(tmp_path / "b", say=said.append)
    assert said[-1] == said[2]  # a store that is found tells it too


def test_a_split_without_an_example_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"in its eval/x split; got none\. See"):
        _store(tmp_path, [], split="eval/x")
    with pytest.raises(UserError, match="got none, and 3 that were left out"):
        _store(tmp_path, maker=_maker("completion", 2, "drop"))


@pytest.mark.parametrize("broken", ["header.json", "tokens.npy", "offsets.npy"])
def test_a_store_that_is_not_whole_is_refused(broken, tmp_path):
    """Fault 35, data: a file of stored examples is shorter than it was.

    Promise: exit 2 with its folder, and what to do.
    """
    path = _store(tmp_path).path
    if broken == "header.json":
        header = json.loads((path / broken).read_text())
        (path / broken).write_text(json.dumps(header | {"num_tokens": 12}))
    else:
        np.save(path / broken, np.load(path / broken)[:-1])
    with pytest.raises(UserError, match=r"stored examples must be whole; got .*Delete"):
        _store(tmp_path)


@pytest.mark.parametrize("name", ["tokens", "targets", "weights", "offsets", "origins"])
def test_a_flipped_bit_of_stored_examples_is_named(name, tmp_path):
    """Fault 36, data: a bit flips in stored examples.

    Promise: the file is named at the start, exit 2; in a store above half a gigabyte
    only ids that there are not are seen.
    """
    file = _store(tmp_path).path / f"{name}.npy"
    raw = bytearray(file.read_bytes())
    start = raw.index(b"\n") + 1
    for place in range(start, len(raw)):
        other = bytearray(raw)
        other[place] ^= 1 << place % 8
        file.write_bytes(other)
        with pytest.raises(UserError, match=rf"{name}.npy is not as it was written"):
            _store(tmp_path)
    file.write_bytes(raw)
    _store(tmp_path)


def test_a_disk_that_is_full_is_refused_and_nothing_is_left(tmp_path, monkeypatch):
    class Full(example_store.Growing):
        def finish(self):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(example_store, "Growing", Full)
    with pytest.raises(
        UserError, match=r"must be writable and have room; got .*No space"
    ):
        _store(tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
