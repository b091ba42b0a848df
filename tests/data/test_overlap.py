"""Tests of shared n-grams: against sets of tuples, on streams small enough for them."""

import collections
import tracemalloc

import numpy as np
import pytest

from fm_jax.data import overlap
from fm_jax.data.lanes import Sizes
from fm_jax.errors import UserError
from fm_jax.tokenizers.plain import SymbolTokenizer
from tests.data import made

FOUR = SymbolTokenizer(4)


def stored(folder, rows, tokenizer=FOUR, *, name="made", shard_tokens=60):
    """Return a store of documents of ids, in several shards; its source has a name."""
    texts = [tokenizer.decode(row) for row in rows]
    small = Sizes(batch_bytes=1, shard_tokens=shard_tokens)
    return made.build(folder, texts, tokenizer, name=name, sizes=small)


def drawn(seed, num_documents, longest, num_symbols=4):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, longest, num_documents)
    return [rng.integers(0, num_symbols, length) for length in lengths]


def grams(row, n):
    row = tuple(map(int, row))
    return [row[i : i + n] for i in range(len(row) - n + 1)]


def reference(a, b, n):
    """Return the numbers of an overlap, by sets and loops."""
    first = {}
    for k, row in enumerate(a):
        for gram in grams(row, n):
            first.setdefault(gram, k)
    all_b = {gram for row in b for gram in grams(row, n)}
    told = []
    for k, row in enumerate(b):
        mine = grams(row, n)
        shared = [first[gram] for gram in mine if gram in first]
        times = collections.Counter(shared)
        most = min((-count, k) for k, count in times.items())[1] if times else None
        told.append((k, len(shared), len(mine), most))
    with_any = [t for t in told if t[1]]
    worst = sorted(with_any, key=lambda t: (-t[1] / t[2], -t[2], t[0]))[:10]
    return {
        "num_grams": sum(t[2] for t in told),
        "num_shared": sum(t[1] for t in told),
        "num_distinct": len(all_b),
        "num_distinct_shared": len(all_b & set(first)),
        "num_documents": len(b),
        "num_too_short": sum(len(row) < n for row in b),
        "num_with_any": len(with_any),
        "worst": tuple(
            overlap.Shared(f"b row {k}", shared / mine, mine, f"a row {most}")
            for k, shared, mine, most in worst
        ),
    }


@pytest.mark.parametrize("chunk", [1 << 14, 5, 1])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 13, 64])
def test_an_overlap_is_that_of_sets_of_tuples(tmp_path, monkeypatch, n, chunk):
    monkeypatch.setattr(overlap, "CHUNK", chunk)
    a, b = drawn(1, 37, 3 + 2 * n), drawn(2, 23, 3 + 3 * n)
    b[5], b[7] = a[3], np.concatenate([b[7], a[4], a[6], b[7]])
    stores = [stored(tmp_path, a, name="a"), stored(tmp_path, b, name="b")]
    assert len(stores[1].shards) > 1
    found, expected = overlap.overlap(*stores, n=n), reference(a, b, n)
    assert {name: getattr(found, name) for name in expected} == expected
    assert found.share == expected["num_shared"] / expected["num_grams"]
    paths = [str(held.path) for held in stores]
    assert (found.n, [found.within, found.of]) == (n, paths)


def test_no_gram_goes_across_documents(tmp_path):
    a = stored(tmp_path / "a", [[0, 1], [2, 3], [0, 1, 2, 3]])
    b = stored(tmp_path / "b", [[0], [1, 2], [3], [0, 1, 2], [3, 0]])
    found = overlap.overlap(a, b, n=3)
    assert (found.num_grams, found.num_shared, found.num_too_short) == (1, 1, 4)
    a = stored(tmp_path / "c", [[0, 1], [2, 3]])
    assert overlap.overlap(a, b, n=3).num_shared == 0


def test_documents_shorter_than_n_have_none(tmp_path):
    rows = [[0, 1, 2, 3], [], [1]]
    a, b = stored(tmp_path / "a", rows), stored(tmp_path / "b", rows)
    found = overlap.overlap(a, b, n=5)
    assert (found.num_grams, found.num_too_short, found.share) == (0, 3, 0.0)
    assert found.worst == ()
    short = overlap.overlap(a, b, n=64)  # longer than all of the stream
    assert (short.num_grams, short.num_too_short) == (0, 3)


def test_only_the_ten_worst_are_told_of_and_the_longer_first(tmp_path):
    rows = drawn(3, 15, 30)
    a, b = stored(tmp_path / "a", rows), stored(tmp_path / "b", rows)
    worst = overlap.overlap(a, b, n=2).worst
    assert len(worst) == 10
    lengths = sorted((len(row) - 1 for row in rows), reverse=True)
    assert [w.num_grams for w in worst] == lengths[:10]
    assert all(w.share == 1 for w in worst)


@pytest.mark.parametrize("n", [2, 3, 20])
def test_different_grams_have_different_words(n):
    # All rows of two symbols, or all pairs of many: one word in 2**64 should agree.
    if n == 20:
        ids = np.where((np.arange(1 << n)[:, None] >> np.arange(n)) & 1, 65_535, 7)
    else:
        first, *rest = np.meshgrid(*[np.arange(2**9 if n == 2 else 2**6)] * n)
        ids = np.stack([first.ravel(), *(r.ravel() for r in rest)], axis=1)
    ids = ids[: 1 << 18].astype(np.uint32)
    words = overlap._words(ids.ravel(), n)[::n]  # of rows one after the other
    assert len(np.unique(words)) == len(ids) == len(words)
    for shift in (0, 23, 46):  # and each run of bits is as even as chance makes it
        held = np.unique((words >> np.uint64(shift)) & np.uint64(2**18 - 1)).size
        assert held / 2**18 == pytest.approx(1 - np.exp(-1), abs=0.01)


def test_stores_of_two_tokenizers_are_refused(tmp_path):
    a = stored(tmp_path / "a", [[0, 1]])
    b = stored(tmp_path / "b", [[0, 1]], SymbolTokenizer(5))
    with pytest.raises(UserError) as error:
        overlap.overlap(a, b)
    assert str(error.value) == (
        "stores must share a tokenizer to share n-grams of ids; got "
        f"{a.path} made with {FOUR.fingerprint}, {b.path} with "
        f"{SymbolTokenizer(5).fingerprint}. Build them with one tokenizer."
    )


@pytest.mark.parametrize("n", [0, -1, 65])
def test_n_is_from_1_to_64(tmp_path, n):
    a = stored(tmp_path / "a", [[0, 1]])
    with pytest.raises(UserError) as error:
        overlap.overlap(a, a, n=n)
    assert str(error.value) == f"n must be from 1 to 64 ids; got {n}."


def test_memory_follows_the_held_out_store_alone(tmp_path):
    wide = SymbolTokenizer(60)
    small = stored(tmp_path / "b", drawn(5, 20, 1000, 60), wide)
    peaks = []
    for name, size in (("a", 80), ("c", 800)):
        rows = drawn(6, size, 1000, 60)
        other = stored(tmp_path / name, rows, wide, shard_tokens=9999)
        tracemalloc.start()
        overlap.overlap(other, small)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0] + 50_000


def test_lines_say_all_in_a_few_words(tmp_path):
    a = stored(tmp_path, [[0, 1, 2, 3, 0], [3, 2, 1]], name="a\x1b")
    b = stored(tmp_path, [[1, 2, 3], [1], [0, 0, 1, 2]], name="b")
    assert overlap.lines(overlap.overlap(a, b, n=3)) == [
        f"of         {b.path}",
        f"within     {a.path}",
        "3-grams    2 of 3 shared (66.67%); distinct: 2 of 3",
        "documents  2 of 2 have a shared one",
        "too short  1 documents, of fewer than 3 ids",
        "worst      share  its grams  document < where most of them stand",
        "            100%          1  b row 0 < a␛ row 0",
        "             50%          2  b row 2 < a␛ row 0",
    ]
    none = overlap.lines(overlap.overlap(b, a, n=5))
    assert none[2:] == [
        "5-grams    0 of 1 shared (0.00%); distinct: 0 of 1",
        "documents  0 of 1 have a shared one",
        "too short  1 documents, of fewer than 5 ids",
    ]
