"""Tests that the order of data is a function: of seed, epoch and index alone."""

import collections
import tracemalloc

import numpy as np
import pytest

from fm_jax.data import batches, store
from fm_jax.data.batches import EvalBatches, TrainBatches, permute
from fm_jax.data.examples import Windows
from fm_jax.tokenizers import all as tokenizers


class Indices:
    """Windows that give back which of them were asked for."""

    def __init__(self, num_windows):
        self.num_windows = num_windows

    def __len__(self):
        return self.num_windows

    def rows(self, indices):
        return {"index": np.asarray(indices)}


@pytest.fixture(scope="module")
def windows(tmp_path_factory):
    """Return real windows, 23 of them."""
    tokenizer = tokenizers.ByteTokenizer()
    texts = [f"document {n}, " * (n % 4) for n in range(1, 13)] + ["the last of them"]
    built = store.find_or_build(
        tmp_path_factory.mktemp("cache"),
        lambda: texts,
        tokenizer,
        identity={"split": "train"},
        say=lambda line: None,
    )
    made = Windows(built, tokenizer, 11, True)
    assert len(made) == 23
    return made


def all_indices(plan, start=0):
    return np.concatenate([plan[step]["index"] for step in range(start, len(plan))])


def train_plan(windows, batch_size, seed, num_steps):
    """Return the plan of whoever reads all the rows of a batch."""
    return TrainBatches(windows, batch_size, seed, num_steps, np.arange(batch_size))


def eval_plan(windows, batch_size, max_batches=0):
    return EvalBatches(windows, batch_size, np.arange(batch_size), max_batches)


def assert_same(one, two):
    assert one.keys() == two.keys()
    for key in one:
        np.testing.assert_array_equal(one[key], two[key], err_msg=key)


# The permutation.


@pytest.mark.parametrize("seed", [0, 1, 2**63 + 11])
def test_permute_is_a_bijection_of_every_small_size(seed):
    for size in range(1, 201):
        found = permute(np.arange(size), size, seed, size % 5)
        np.testing.assert_array_equal(np.sort(found), np.arange(size))


@pytest.mark.parametrize("size", [4095, 4096, 4097, 65_536, 65_537, 300_007])
def test_permute_is_a_bijection_of_large_sizes(size):
    found = permute(np.arange(size), size, 5, 1)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(np.sort(found), np.arange(size))


def test_the_order_is_the_one_of_all_earlier_versions():
    def order(size, seed, epoch, count=10):
        return permute(np.arange(count), size, seed, epoch).tolist()

    assert order(1, 0, 0, 1) == [0]
    assert order(10, 0, 0) == [1, 0, 9, 8, 5, 2, 7, 4, 6, 3]
    assert order(10, 0, 1) == [0, 9, 7, 1, 8, 4, 2, 5, 3, 6]
    assert order(10, 1, 0) == [3, 7, 6, 9, 0, 8, 1, 4, 2, 5]
    assert order(257, 12345, 3) == [179, 65, 95, 208, 124, 37, 26, 225, 250, 115]
    far = np.array([0, 1, 2, 10**12 - 1])
    assert permute(far, 10**12, 7, 2).tolist() == [
        351050314124,
        448556247580,
        399257677648,
        210369403339,
    ]


def test_the_mixing_function_is_that_of_splitmix64():
    # The first outputs for these seeds, from the authors' and Rosetta Code's programs.
    assert int(batches._mix(np.uint64(0))) == 0xE220A8397B1DCDAF
    assert int(batches._mix(np.uint64(1234567))) == 6457827717110365317


def test_orders_differ_by_seed_and_by_epoch():
    size = 50
    orders = {
        tuple(permute(np.arange(size), size, seed, epoch))
        for seed in range(-3, 20)
        for epoch in range(20)
    }
    assert len(orders) == 23 * 20
    assert tuple(range(size)) not in orders


def test_an_epoch_of_one_seed_is_not_the_epoch_of_the_next():
    # The seed and the epoch are mixed, not added.
    one = permute(np.arange(50), 50, 3, 4)
    for seed, epoch in [(4, 3), (2, 5), (7, 0), (0, 7)]:
        assert np.any(one != permute(np.arange(50), 50, seed, epoch))


def test_every_place_is_equally_likely():
    size, trials = 7, 2000
    counts = np.zeros((size, size))
    for seed in range(trials):
        counts[np.arange(size), permute(np.arange(size), size, seed, 0)] += 1
    # Six standard deviations of a count that is binomial.
    expected = trials / size
    assert np.abs(counts - expected).max() < 6 * np.sqrt(expected * (1 - 1 / size))


def test_an_index_goes_where_it_goes_whoever_asks_with_it():
    whole = permute(np.arange(101), 101, 9, 2)
    for index in range(101):
        assert permute(np.array([index]), 101, 9, 2)[0] == whole[index]
    back = permute(np.arange(101)[::-1], 101, 9, 2)
    np.testing.assert_array_equal(back[::-1], whole)


def test_permute_takes_memory_for_the_indices_and_not_the_size():
    size = 10**12
    indices = np.arange(size - 1000, size)
    tracemalloc.start()
    found = permute(indices, size, 0, 0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200_000
    assert len(np.unique(found)) == 1000
    assert found.min() >= 0 and found.max() < size


# Training batches.


# What a reader may hold of twelve rows: all, a part, one, and such as do not touch.
ROWS = [range(12), range(6, 12), [5], [0, 1, 2, 6, 7, 8], [11, 0]]


@pytest.mark.parametrize("rows", ROWS)
def test_a_reader_gets_its_rows_of_the_batch_of_all(windows, rows):
    whole = train_plan(windows, 12, 3, 10)
    plan = TrainBatches(windows, 12, 3, 10, np.array(rows))
    for step in range(10):
        expected = {name: x[np.array(rows)] for name, x in whole[step].items()}
        assert_same(plan[step], expected)
        assert_same(whole[step], windows.rows(whole.indices(step)))


@pytest.mark.parametrize("batch_size", [1, 4, 7, 30])
def test_each_epoch_has_each_window_once(batch_size):
    size = 23
    plan = train_plan(Indices(size), batch_size, 5, 200)
    taken = all_indices(plan)
    for epoch in range(len(taken) // size):
        once = taken[epoch * size : (epoch + 1) * size]
        np.testing.assert_array_equal(once, permute(np.arange(size), size, 5, epoch))
        assert len(set(once.tolist())) == size


def test_a_batch_across_two_epochs_ends_one_and_begins_the_next():
    plan = train_plan(Indices(10), 4, 0, 5)
    # The golden orders of ten, above.
    assert plan[2]["index"].tolist() == [6, 3, 0, 9]
    assert plan[3]["index"].tolist() == [7, 1, 8, 4]


def test_a_batch_larger_than_the_corpus_takes_whole_epochs():
    plan = train_plan(Indices(3), 10, 0, 2)
    counts = collections.Counter(all_indices(plan).tolist())
    assert sorted(counts.values()) == [6, 7, 7]


def test_steps_do_not_depend_on_how_many_there_are_or_on_the_batch_size():
    small = all_indices(train_plan(Indices(23), 3, 8, 40))
    large = all_indices(train_plan(Indices(23), 12, 8, 10))
    np.testing.assert_array_equal(small, large)


def test_another_seed_gives_other_batches():
    one, two = (all_indices(train_plan(Indices(23), 5, s, 10)) for s in (0, 1))
    assert np.any(one != two)


def test_steps_beyond_the_last_are_refused(windows):
    plan = train_plan(windows, 4, 0, 6)
    assert len(plan) == 6
    assert len(list(plan)) == 6
    for step in (-1, 6):
        with pytest.raises(IndexError):
            plan[step]


# Held-out batches.


@pytest.mark.parametrize("num_windows", [1, 8, 23, 24, 25])
@pytest.mark.parametrize("batch_size", [1, 4, 6])
def test_evaluation_has_each_window_once_and_in_order(num_windows, batch_size):
    plan = eval_plan(Indices(num_windows), batch_size)
    taken = all_indices(plan)
    assert taken[taken >= 0].tolist() == list(range(num_windows))
    assert len(taken) == len(plan) * batch_size < num_windows + batch_size
    # Padding is at the very end.
    assert np.all(taken[num_windows:] == -1)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("max_batches", [0, 1])
def test_a_reader_evaluates_its_rows_of_the_batch_of_all(windows, max_batches, rows):
    whole = eval_plan(windows, 12, max_batches)
    plan = EvalBatches(windows, 12, np.array(rows), max_batches)
    assert len(plan) == len(whole) == (max_batches or 2)
    for index in range(len(whole)):
        expected = {name: x[np.array(rows)] for name, x in whole[index].items()}
        assert_same(plan[index], expected)


@pytest.mark.parametrize("num_windows", [31, 59, 60, 61, 97, 1000])
@pytest.mark.parametrize(("batch_size", "max_batches"), [(1, 30), (6, 5), (10, 3)])
def test_max_batches_are_full_and_evenly_spread(num_windows, batch_size, max_batches):
    plan = eval_plan(Indices(num_windows), batch_size, max_batches)
    assert len(plan) == max_batches
    taken = all_indices(plan)
    gaps = np.diff(np.append(taken, num_windows + taken[0]))
    assert taken[0] == 0
    assert gaps.min() == num_windows // 30
    assert gaps.max() == -(-num_windows // 30)


def test_more_batches_than_there_are_is_all_of_them():
    plan = eval_plan(Indices(23), 4, 100)
    assert len(plan) == 6
    assert all_indices(plan).tolist() == [*range(23), -1]


def test_held_out_targets_are_each_counted_once(windows):
    plan = eval_plan(windows, 4)
    total = sum(batch["loss_weights"].sum() for batch in plan)
    assert total == len(windows.store) - 1
    size = sum(batch["target_bytes"].sum() for batch in plan)
    assert size == windows.store.num_bytes


def test_evaluation_beyond_the_last_batch_is_refused():
    plan = eval_plan(Indices(23), 4)
    for index in (-1, 6):
        with pytest.raises(IndexError):
            plan[index]


# Reading ahead.


@pytest.mark.parametrize("start", [0, 1, 17, 39, 40])
def test_reading_ahead_gives_the_batches_of_the_plan_from_any_start(windows, start):
    plan = train_plan(windows, 5, 3, 40)
    read = list(batches.prefetch(plan, start))
    assert len(read) == 40 - start
    for step, batch in enumerate(read, start):
        assert_same(batch, plan[step])


def test_reading_ahead_keeps_the_order_of_evaluation(windows):
    plan = eval_plan(windows, 3)
    for batch, expected in zip(batches.prefetch(plan), plan, strict=True):
        assert_same(batch, expected)


def test_an_error_while_reading_ahead_comes_out(windows):
    class Broken(TrainBatches):
        def __getitem__(self, step):
            if step == 3:
                raise OSError("the disk has gone")
            return super().__getitem__(step)

    with pytest.raises(Exception, match="the disk has gone"):
        list(batches.prefetch(Broken(windows, 5, 3, 6, np.arange(5))))
