"""Tests of plans that pack whole documents into rows."""

import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fm_jax.data import packing
from fm_jax.data.packing import best_fit, plan
from tests.data import streams
from tests.data.made import refusal


def slow_best_fit(sizes, length):
    """Return how full bins are by best-fit-decreasing, one size at a time; sorted."""
    bins = []
    for size in sorted(sizes, reverse=True):
        fitting = [held for held in bins if held + size <= length]
        if fitting:
            bins[bins.index(max(fitting))] += size
        else:
            bins.append(size)
    return sorted(bins)


def fill(sizes, bins):
    """Return how full bins are, sorted."""
    return sorted(np.bincount(bins, sizes).astype(int).tolist())


def rows_of(made):
    """Return the pieces (start, count) of each row of a plan."""
    pieces = list(zip(made.starts.tolist(), made.counts.tolist(), strict=True))
    return [pieces[a:b] for a, b in itertools.pairwise(made.rows.tolist())]


# Bins.


@settings(max_examples=300, deadline=None)
@given(data=st.data(), length=st.sampled_from([1, 2, 5, 7, 12, 64]))
def test_bins_are_those_of_best_fit_decreasing_one_size_at_a_time(data, length):
    # Few sizes that differ, so that many are equal, or any.
    some = st.lists(st.integers(1, length), min_size=1, max_size=4)
    size = st.sampled_from(data.draw(some)) | st.integers(1, length)
    sizes = np.array(data.draw(st.lists(size, max_size=150)), np.int32)
    bins = best_fit(sizes, length)
    assert fill(sizes, bins) == slow_best_fit(sizes.tolist(), length)


@pytest.mark.parametrize("length", [100, 300])
@pytest.mark.parametrize("seed", range(3))
def test_bins_of_thousands_are_those_of_best_fit_decreasing(seed, length):
    rng = np.random.default_rng(seed)
    sizes = np.clip(rng.lognormal(3.5, 1, 2000), 1, length).astype(np.int32)
    bins = best_fit(sizes, length)
    expected = slow_best_fit(sizes.tolist(), length)
    assert fill(sizes, bins) == expected
    assert len(expected) <= 1.02 * sizes.sum() / length + 1


def test_no_sizes_take_no_bins():
    assert best_fit(np.zeros(0, np.int32), 7).tolist() == []


def test_bins_by_hand():
    # 8 opens bin 0, 6 bin 1, 5 and 5 fill bin 2. 4 goes to bin 1 and 2 to bin 0, which
    # are full then; for 3, 3 and 3 there is room nowhere else.
    sizes = np.array([3, 5, 8, 3, 6, 2, 5, 3, 4], np.int32)
    assert best_fit(sizes, 10).tolist() == [3, 2, 0, 3, 1, 0, 2, 3, 1]


def test_sizes_that_are_equal_are_placed_in_the_order_of_the_stream():
    assert best_fit(np.array([2] * 7, np.int32), 5).tolist() == [0, 0, 1, 1, 2, 2, 3]


# Plans.


@pytest.mark.parametrize("name", ["best_fit", "single"])
def test_plans_have_the_types_of_their_files(name):
    found = plan(streams.store_of([3, 0, 9, 1, 1, 25]), name, 7)
    types = [array.dtype for array in (found.starts, found.counts, found.rows)]
    assert types == [np.int64, np.int32, np.int64]


def test_a_long_document_is_rows_and_what_is_left_of_it_is_packed():
    # 26, 4 and 3 targets, and rows of 8: three rows, of the first 2 are left.
    found = plan(streams.store_of([25, 3, 2]), "best_fit", 8)
    assert rows_of(found) == [
        [(0, 8)],
        [(8, 8)],
        [(16, 8)],
        [(24, 2)],
        [(26, 4), (30, 3)],
    ]


def test_rows_are_of_one_shard():
    store = streams.store_of([1] * 12, cuts=(5, 7))
    found = plan(store, "best_fit", 8)
    # 2 targets a document, so four would go into a row: 5, 2 and 5 documents.
    assert [len(row) for row in rows_of(found)] == [4, 1, 2, 4, 1]
    shards = [
        {int(np.searchsorted(store.starts, start, "right")) for start, _ in row}
        for row in rows_of(found)
    ]
    assert shards == [{1}, {1}, {2}, {3}, {3}]


def test_a_shard_without_documents_has_no_rows():
    store = streams.store_of([1] * 12, cuts=(5, 5, 7))
    assert [len(shard) for shard in store.shards] == [10, 0, 4, 11]
    whole = streams.store_of([1] * 12, cuts=(5, 7))
    assert rows_of(plan(store, "best_fit", 8)) == rows_of(plan(whole, "best_fit", 8))


def test_rows_and_their_pieces_are_in_the_order_of_the_stream():
    rng = np.random.default_rng(0)
    store = streams.store_of(rng.integers(0, 90, 500), cuts=(100, 320))
    rows = rows_of(plan(store, "best_fit", 64))
    assert rows == sorted(rows)
    assert all(row == sorted(row) for row in rows)


def test_packing_leaves_little_padding():
    rng = np.random.default_rng(0)
    store = streams.store_of(rng.lognormal(4.5, 1, 5000).astype(int), cuts=(2500,))
    targets = len(store) - 1
    filled = {
        name: targets / (256 * len(plan(store, name, 256)))
        for name in ("best_fit", "single")
    }
    assert filled["best_fit"] > 0.995
    assert filled["single"] < 0.6


def test_planning_takes_memory_for_a_shard_at_a_time(tmp_path):
    def peak_of(num_shards):
        lengths = np.arange(4000 * num_shards) % 97
        cuts = tuple(range(4000, 4000 * num_shards, 4000))
        store = streams.store_of(lengths, cuts=cuts, name=f"of {num_shards}")
        tracemalloc.start()
        plan(store, "best_fit", 64, folder=tmp_path)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return peak

    assert peak_of(8) < 1.5 * peak_of(1)


# Plans that are kept.


@pytest.mark.parametrize("name", ["best_fit", "single"])
def test_a_plan_that_is_kept_is_the_one_in_memory(tmp_path, name):
    store = streams.store_of(np.arange(300) * 7 % 61, cuts=(100, 299))
    inside = plan(store, name, 16)
    for _ in range(2):
        kept = plan(store, name, 16, folder=tmp_path / "plans")
        for array in ("starts", "counts", "rows"):
            one, two = getattr(inside, array), getattr(kept, array)
            assert one.dtype == two.dtype
            np.testing.assert_array_equal(one, two)
    (folder,) = (p for p in (tmp_path / "plans").iterdir() if p.is_dir())
    assert folder.name.startswith(f"made-{name}-16-")
    files = {file.name for file in folder.iterdir()}
    assert files == {"starts.npy", "counts.npy", "rows.npy"}
    assert np.load(folder / "rows.npy").tolist() == inside.rows.tolist()


def test_a_plan_is_made_once(tmp_path, monkeypatch):
    store = streams.store_of([5, 3, 9, 2])
    first = plan(store, "best_fit", 4, folder=tmp_path)
    monkeypatch.setattr(packing, "_packed", None)
    again = plan(store, "best_fit", 4, folder=tmp_path)
    assert rows_of(again) == rows_of(first)


def test_stores_cut_otherwise_have_plans_of_their_own(tmp_path):
    for cuts in ((), (3,), (2, 4)):
        for length in (4, 5):
            for name in ("best_fit", "single"):
                store = streams.store_of([5, 3, 9, 2, 1], cuts=cuts)
                kept = plan(store, name, length, folder=tmp_path)
                assert rows_of(kept) == rows_of(plan(store, name, length))
    assert len([p for p in tmp_path.iterdir() if p.is_dir()]) == 12


def test_a_name_is_no_way_out_of_the_folder(tmp_path):
    store = streams.store_of([5, 3, 9], name="../../elsewhere")
    plan(store, "best_fit", 4, folder=tmp_path / "a" / "plans")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["plans"]


def test_planning_that_is_stopped_leaves_nothing_to_be_read(tmp_path, monkeypatch):
    store = streams.store_of([5, 3, 9, 2], cuts=(2,))
    packed, calls = packing._packed, []

    def stopping(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return packed(*args)

    monkeypatch.setattr(packing, "_packed", stopping)
    with pytest.raises(KeyboardInterrupt):
        plan(store, "best_fit", 4, folder=tmp_path)
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]
    found = plan(store, "best_fit", 4, folder=tmp_path)
    assert rows_of(found) == rows_of(plan(store, "best_fit", 4))


def test_a_plan_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "plans").write_text("a file, not a folder")
    store = streams.store_of([5, 3, 9, 2])
    found = refusal(plan, store, "best_fit", 4, folder=tmp_path / "plans")
    path = tmp_path / "plans" / packing._name(store, "best_fit", 4)
    assert found == (
        f"data.cache_dir must be writable and have room; got {path} (File exists). "
        "Free space or set --config.data.cache_dir."
    )


def test_a_full_disk_is_refused_and_nothing_half_written_is_left(tmp_path, monkeypatch):
    class Full(packing.Growing):
        def finish(self):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(packing, "Growing", Full)
    store = streams.store_of([5, 3, 9, 2])
    found = refusal(plan, store, "best_fit", 4, folder=tmp_path)
    path = tmp_path / packing._name(store, "best_fit", 4)
    assert found == (
        f"data.cache_dir must be writable and have room; got {path} (No space left on "
        "device). Free space or set --config.data.cache_dir."
    )
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]


@pytest.mark.parametrize(
    ("file", "array", "got"),
    [
        ("rows", np.array([0, 1, 2]), "2 pieces of 5"),
        ("starts", np.arange(4), "5 pieces of 4"),
        ("rows", np.zeros(0, np.int64), "0 pieces of 5"),
        ("counts", np.zeros(5, np.int32), "0 targets for a store of 23"),
    ],
)
def test_a_plan_of_another_store_is_refused(tmp_path, file, array, got):
    store = streams.store_of([5, 3, 9, 2])
    plan(store, "single", 6, folder=tmp_path)
    path = tmp_path / packing._name(store, "single", 6)
    np.save(path / f"{file}.npy", array)
    assert refusal(plan, store, "single", 6, folder=tmp_path) == (
        f"plan of rows must be whole; got {path} ({got}). Delete it and start again: "
        "it will be made again."
    )


def test_a_plan_with_a_file_missing_is_refused(tmp_path):
    store = streams.store_of([5, 3, 9, 2])
    plan(store, "single", 6, folder=tmp_path)
    path = tmp_path / packing._name(store, "single", 6)
    (path / "counts.npy").unlink()
    assert refusal(plan, store, "single", 6, folder=tmp_path) == (
        f"plan of rows must be whole; got {path} ([Errno 2] No such file or directory: "
        f"'{path}/counts.npy'). Delete it and start again: it will be made again."
    )
