"""Tests of finding repeated documents: against a dict, whatever memory is allowed."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fm_jax.data import dedup

# Few words, so that rows repeat, agree in one word alone, and lie on the range's ends.
WORDS = st.sampled_from([0, 1, 2, 2**63 - 1, 2**63, 2**64 - 2, 2**64 - 1])
PARTS = st.lists(st.lists(st.tuples(WORDS, WORDS), max_size=12), max_size=5)


def arrays(parts):
    return [np.array(part, np.uint64).reshape(-1, 2) for part in parts]


def reference(parts):
    """Return the masks by a dict from row to its first place."""
    first = {}
    for number, part in enumerate(parts):
        for place, row in enumerate(part):
            first.setdefault(tuple(map(int, row)), (number, place))
    return [
        [
            first[tuple(map(int, row))] == (number, place)
            for place, row in enumerate(part)
        ]
        for number, part in enumerate(parts)
    ]


@settings(max_examples=300, deadline=None)
@given(PARTS, st.integers(1, 70))
def test_the_first_of_equal_rows_stays_at_any_memory(parts, memory_rows):
    found = dedup.first_seen(arrays(parts), memory_rows=memory_rows)
    assert [mask.tolist() for mask in found] == reference(parts)
    assert all(mask.dtype == bool for mask in found)


@pytest.mark.parametrize("memory_rows", [11, 37, 999, 1000, 5000, 1 << 24])
def test_uniform_hashes_are_found_over_many_pieces(memory_rows):
    rng = np.random.default_rng(3)
    texts = rng.integers(0, 2**64, (700, 2), np.uint64)
    drawn = texts[rng.integers(0, 700, 1999)]
    parts = [drawn[:1], drawn[1:1], drawn[1:800], drawn[800:]]
    found = dedup.first_seen(parts, memory_rows=memory_rows)
    assert [mask.tolist() for mask in found] == reference(parts)


def test_rows_that_agree_in_one_word_alone_are_different_documents():
    parts = arrays([[(7, 1), (7, 2), (8, 1), (7, 1)], [(7, 2), (7, 3)]])
    assert [mask.tolist() for mask in dedup.first_seen(parts)] == [
        [True, True, True, False],
        [False, True],
    ]


def test_no_parts_and_empty_parts_have_nothing():
    assert dedup.first_seen([]) == []
    (mask,) = dedup.first_seen(arrays([[]]))
    assert mask.tolist() == []


def test_mapped_files_are_read_as_arrays_are(tmp_path):
    rows = np.random.default_rng(5).integers(0, 9, (313, 2), np.uint64)
    np.save(tmp_path / "hashes.npy", rows)
    mapped = np.load(tmp_path / "hashes.npy", mmap_mode="r")
    (found,) = dedup.first_seen([mapped], memory_rows=50)
    assert found.tolist() == reference([rows])[0]


@pytest.mark.parametrize("num_texts", [1, 200_000])
def test_memory_follows_the_rows_allowed_not_the_documents(num_texts):
    rng = np.random.default_rng(4)
    texts = rng.integers(0, 2**64, (num_texts, 2), np.uint64)
    parts = [texts[rng.integers(0, num_texts, 50_000)] for _ in range(4)]
    tracemalloc.start()
    found = dedup.first_seen(parts, memory_rows=5_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(mask.sum() for mask in found) == len(
        np.unique(np.concatenate(parts), axis=0)
    )
    assert peak < 200_000 + 5_000 * 150  # the masks, and so much a row
