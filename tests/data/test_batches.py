"""Tests that the order of data is a function: of seed, epoch and index alone."""

import collections
import concurrent.futures
import hashlib
import time
import tracemalloc

import grain
import numpy as np
import pytest

from fm_jax.data import batches
from fm_jax.data.batches import permute
from fm_jax.data.windows import PACKINGS
from tests.data import plans
from tests.data.plans import MIXED, assert_same, digest, eval_plan, train_plan


class Indices:
    """Windows that give back which of them were asked for."""

    length = 1

    def __init__(self, num_windows):
        self.num_windows = num_windows

    def __len__(self):
        return self.num_windows

    def rows(self, indices):
        return {"index": np.asarray(indices)}


@pytest.fixture(scope="module")
def windows(tmp_path_factory):
    """Return the windows of a real store."""
    return plans.real_windows(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def components():
    """Return the windows of three stores, packed in the three ways."""
    return plans.three_packings()


def all_indices(plan, start=0):
    return np.concatenate([plan[step]["index"] for step in range(start, len(plan))])


def order_of(plan):
    """Return the components and the windows of all rows of a plan."""
    found = [plan.indices(number) for number in range(len(plan))]
    return [np.concatenate([pair[k] for pair in found]) for k in range(2)]


def joined(parts):
    """Return the batch of which these are the rows, one after the other."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


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


# What a reader may hold of twelve rows: all, a part, one, such as do not touch, none.
ROWS = [range(12), range(6, 12), [5], [0, 1, 2, 6, 7, 8], [11, 0], []]


@pytest.mark.parametrize("rows", ROWS)
def test_a_reader_gets_its_rows_of_the_batch_of_all(windows, rows):
    whole = train_plan(windows, 12, 3, 10)
    plan = train_plan(windows, 12, 3, 10, rows)
    for step in range(10):
        expected = {name: x[np.array(rows, int)] for name, x in whole[step].items()}
        assert_same(plan[step], expected)
        components, chosen = whole.indices(step)
        assert_same(whole[step], windows.rows(chosen))
        assert not components.any()


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
    """Fault 37, data: the corpus has fewer rows than a batch.

    Promise: the batch takes whole epochs of it, each row as often as any other to
    within one.
    """
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


@pytest.mark.parametrize("num_kept", [1, 7, 64])
def test_the_order_does_not_depend_on_how_much_of_it_is_found_at_a_time(
    monkeypatch, num_kept
):
    expected = all_indices(train_plan(Indices(23), 5, 8, 40))
    monkeypatch.setattr(batches, "ORDER_ROWS", num_kept)
    plan = train_plan(Indices(23), 5, 8, 40)
    for steps in (range(40), reversed(range(40)), [3, 39, 3, 0, 17]):
        for step in steps:
            found = plan[step]["index"]
            np.testing.assert_array_equal(found, expected[step * 5 : step * 5 + 5])


def test_an_epoch_may_be_said_for_each_index():
    rng = np.random.default_rng(0)
    for size in (1, 5, 64, 1000):
        index, epochs = rng.integers(0, size, 200), rng.integers(0, 9, 200)
        found = permute(index, size, 3, epochs)
        for epoch in range(9):
            here = epochs == epoch
            expected = permute(index[here], size, 3, epoch)
            np.testing.assert_array_equal(found[here], expected)


def test_a_corpus_of_a_few_windows_is_gone_through_many_times_without_delay():
    started = time.perf_counter()
    plan = train_plan(Indices(3), 8, 0, 10_000)
    counts = np.bincount(all_indices(plan))
    assert counts.max() - counts.min() <= 1
    assert time.perf_counter() - started < 2


# Mixtures.


@pytest.mark.parametrize("batch_size", [1, 5, 12])
def test_each_component_has_its_own_epochs(components, batch_size):
    plan = train_plan(components, batch_size, 5, 900 // batch_size)
    rows = np.arange(900 // batch_size * batch_size)
    expected, numbers = MIXED.components(rows)
    found, chosen = order_of(plan)
    np.testing.assert_array_equal(found, expected)
    assert (found.dtype, chosen.dtype) == (np.int32, np.int64)
    for component, windows in enumerate(components):
        of_it = chosen[found == component]
        size, seed = len(windows), batches.seed_of(5, component)
        order = [permute(np.arange(size), size, seed, e) for e in range(60)]
        np.testing.assert_array_equal(of_it, np.concatenate(order)[: len(of_it)])
        assert numbers[found == component].tolist() == list(range(len(of_it)))


def test_a_row_is_that_of_its_component(components):
    plan = train_plan(components, 12, 3, 10)
    seen = set()
    for step in range(10):
        batch, (found, chosen) = plan[step], plan.indices(step)
        assert batch["components"].tolist() == found.tolist()
        for row in range(12):
            expected = components[found[row]].rows(chosen[row : row + 1])
            assert_same(
                {name: batch[name][row : row + 1] for name in expected}, expected
            )
            seen.add(int(found[row]))
        for name, array in batch.items():
            assert array.flags.c_contiguous, name
    assert seen == {0, 1, 2}


def test_the_first_component_has_the_order_of_a_run_of_it_alone(components):
    alone = all_indices(train_plan(Indices(len(components[0])), 7, 9, 90))
    plan = train_plan(components, 7, 9, 90)
    found, chosen = order_of(plan)
    first = chosen[found == 0]
    np.testing.assert_array_equal(first, alone[: len(first)])


def test_components_of_one_size_have_orders_of_their_own():
    size = 40
    orders = {
        tuple(permute(np.arange(size), size, batches.seed_of(seed, component), epoch))
        for seed in range(4)
        for component in range(5)
        for epoch in range(5)
    }
    assert len(orders) == 4 * 5 * 5


def test_one_component_is_not_named(windows):
    assert "components" not in train_plan(windows, 4, 0, 3)[0]
    assert "components" not in eval_plan(windows, 4)[0]


@pytest.mark.parametrize("rows", ROWS)
def test_a_reader_gets_its_rows_of_a_mixed_batch(components, rows):
    for whole, plan in (
        (train_plan(components, 12, 3, 10), train_plan(components, 12, 3, 10, rows)),
        (eval_plan(components, 12), eval_plan(components, 12, rows=rows)),
    ):
        for step in range(len(whole)):
            expected = {name: x[np.array(rows, int)] for name, x in whole[step].items()}
            assert_same(plan[step], expected)


# Whoever asks, and whenever.


GOLDEN = {
    "split": "a732cbe672cdfe27",
    "best_fit": "88b1117ae54d80be",
    "single": "7a007bf5bd3ca88a",
    "mixed": "836d4375db6d834c",
}


def plans_of(components, name, batch_size=12, rows=None):
    """Return the training and held-out plan of a packing, or of all mixed."""
    several = components if name == "mixed" else components[PACKINGS.index(name)]
    return (
        train_plan(several, batch_size, 3, 40, rows),
        eval_plan(several, batch_size, rows=rows),
    )


@pytest.mark.parametrize("name", GOLDEN)
def test_batches_are_those_of_all_earlier_versions(components, name):
    found = hashlib.sha256()
    for plan in plans_of(components, name):
        for batch in plan:
            found.update(digest(batch).encode())
    assert found.hexdigest()[:16] == GOLDEN[name]


@pytest.mark.parametrize("num_readers", [1, 2, 4])
@pytest.mark.parametrize("name", GOLDEN)
def test_a_batch_is_the_same_however_many_read_it(components, name, num_readers):
    """Fault 41, data: a run goes on with other hosts, devices, accumulation or workers.

    Promise: packed and mixed batches too are the same bytes for 1, 2 and 4 readers.
    """
    parts = np.split(np.arange(12), num_readers)
    readers = [plans_of(components, name, rows=rows) for rows in parts]
    for number, whole in enumerate(plans_of(components, name)):
        for step in range(len(whole)):
            batch = joined([plans[number][step] for plans in readers])
            assert digest(batch) == digest(whole[step])


def digests(plan, steps):
    """Return the digests of steps, asked for by eight threads that share a plan."""
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda step: digest(plan[step]), steps))


@pytest.mark.parametrize("name", GOLDEN)
def test_a_batch_is_the_same_in_any_order_of_asking_and_from_threads(components, name):
    for number, plan in enumerate(plans_of(components, name)):
        expected = [digest(batch) for batch in plan]
        shared = plans_of(components, name)[number]
        steps = np.random.default_rng(0).integers(0, len(plan), 200).tolist()
        assert digests(shared, steps) == [expected[step] for step in steps]


@pytest.mark.parametrize("name", GOLDEN)
def test_grain_reads_the_batches_as_a_source_of_its_own(components, name):
    for plan in plans_of(components, name):
        source = grain.MapDataset.source(plan)
        assert len(source) == len(plan)
        assert_same(source[len(plan) - 1], plan[len(plan) - 1])
        # By its own threads, more than one.
        for batch, expected in zip(source.to_iter_dataset(), plan, strict=True):
            assert_same(batch, expected)


def test_plans_can_be_kept_in_sets(components):
    for plan in plans_of(components, "mixed"):
        assert {plan, *plan.windows} == {*plan.windows, plan}


def test_the_order_that_is_kept_is_not_written_to(components):
    plan = train_plan(components, 12, 3, 40)
    for array in plan.indices(7):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


@pytest.mark.parametrize("name", ["best_fit", "mixed"])
def test_far_batches_have_the_rows_that_their_places_say(components, name):
    # Of a mixture the last rows there are, of one component beyond 2**60.
    several = components if name == "mixed" else components[1]
    step = (2**39 - 1) // 12 - 1 if name == "mixed" else 2**57
    plan = train_plan(several, 12, 3, step + 1)
    rows = step * 12 + np.arange(12)
    found, chosen = plan.indices(step)
    expected, numbers = plan.mixture.components(rows)
    np.testing.assert_array_equal(found, expected)
    for row in range(12):
        component, number = int(found[row]), int(numbers[row])
        size, seed = len(plan.windows[component]), batches.seed_of(3, component)
        epoch, place = divmod(number, size)
        assert chosen[row] == permute(np.array([place]), size, seed, epoch)[0]


def test_threads_share_what_was_found_of_the_order(components, monkeypatch):
    monkeypatch.setattr(batches, "ORDER_ROWS", 24)
    expected = [digest(batch) for batch in train_plan(components, 12, 3, 40)]
    plan = train_plan(components, 12, 3, 40)
    steps = np.random.default_rng(0).integers(0, 40, 400).tolist()
    assert digests(plan, steps) == [expected[step] for step in steps]


@pytest.mark.parametrize("name", GOLDEN)
def test_batches_read_at_once_are_those_read_one_by_one(components, name):
    for plan in plans_of(components, name):
        whole = plan.read(0, len(plan))
        assert len(whole) == len(plan)
        for step, batch in enumerate(whole):
            assert_same(batch, plan[step])
            assert all(array.flags.c_contiguous for array in batch.values())


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
    plan = eval_plan(windows, 12, max_batches, rows)
    assert len(plan) == len(whole) == (max_batches or 2)
    for index in range(len(whole)):
        expected = {name: x[np.array(rows, int)] for name, x in whole[index].items()}
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


@pytest.mark.parametrize("batch_size", [1, 4, 6])
def test_held_out_components_come_one_after_the_other(components, batch_size):
    plan = eval_plan(components, batch_size)
    found, chosen = order_of(plan)
    expected = [(c, i) for c, held in enumerate(components) for i in range(len(held))]
    expected += [(0, -1)] * (len(found) - len(expected))
    assert [*zip(found.tolist(), chosen.tolist(), strict=True)] == expected
    assert (found.dtype, chosen.dtype) == (np.int32, np.int64)
    assert len(found) - sum(map(len, components)) < batch_size
    total = sum(batch["loss_weights"].sum() for batch in plan)
    assert total == sum(windows.num_targets for windows in components)


def test_some_held_out_batches_are_spread_over_all_components(components):
    plan = eval_plan(components, 5, 3)
    assert len(plan) == 3
    found, chosen = order_of(plan)
    firsts = np.cumsum([0, *map(len, components)])
    gaps = np.diff(np.append(firsts[found] + chosen, firsts[-1]))
    assert firsts[-1] // 15 <= gaps.min() and gaps.max() <= -(-firsts[-1] // 15)
