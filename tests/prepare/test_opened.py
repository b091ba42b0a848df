"""The data of a config is what it says: splits apart, stores mixed, tokens counted."""

import dataclasses
import shutil

import numpy as np
import pytest

from fm_jax.errors import UserError
from fm_jax.prepare import opened


def say_nothing(line):
    """Keep quiet."""


def _texts(data, split):
    return {
        data.tokenizer.decode(found.read(start + 1, stop))
        for found in getattr(data, split).stores
        for start, stop in zip(
            found.offsets, [*found.offsets[1:], len(found) - 1], strict=True
        )
    }


def test_both_splits_together_are_the_corpus_and_apart(config_of, corpora):
    data = opened.open_data(config_of("animals"), say_nothing)
    train, held_out = _texts(data, "train"), _texts(data, "eval")
    assert not train & held_out
    assert train | held_out == {p.read_text() for p in corpora["animals"].iterdir()}


def test_a_text_that_stands_in_two_files_is_on_one_side(config_of, corpora, tmp_path):
    for index, path in enumerate(sorted(corpora["animals"].iterdir())):
        for copy in range(2):
            (tmp_path / f"{index}-{copy}.txt").write_text(path.read_text())
    config = config_of("animals", data__paths=(str(tmp_path),))
    data = opened.open_data(config, say_nothing)
    assert not _texts(data, "train") & _texts(data, "eval")


def test_what_is_held_out_elsewhere_is_left_out_of_training(
    config_of, corpora, tmp_path
):
    some = sorted(corpora["animals"].iterdir())[:7]
    for path in some:
        (tmp_path / path.name).write_text(path.read_text())
    given = {"data__eval_paths": (str(tmp_path),)}
    data = opened.open_data(config_of("animals", **given), say_nothing)
    assert _texts(data, "eval") == {path.read_text() for path in some}
    assert not _texts(data, "train") & _texts(data, "eval")
    (store,) = data.train.stores
    assert store.header["held_out_elsewhere"] == 7
    assert store.header["num_documents"] == 60 - 7


def test_what_is_not_built_is_refused_where_it_may_not_be(config_of, tmp_path):
    config = config_of("animals", data__cache_dir=str(tmp_path / "new"))
    with pytest.raises(UserError, match="must be prepared"):
        opened.open_data(config, say_nothing, may_build=False)
    data = opened.open_data(config, say_nothing)
    again = opened.open_data(config, say_nothing, may_build=False)
    assert again.train.name == data.train.name
    assert again.eval.num_targets == data.eval.num_targets


def test_gzip_is_measured_on_held_out_text_alone(config_of):
    data = opened.open_data(config_of("animals"), say_nothing)
    (held_out,) = data.eval.stores
    expected = 8 * held_out.header["gzip_bytes"] / held_out.num_bytes
    assert data.eval.gzip_bits_per_byte == expected > 0
    assert data.train.gzip_bits_per_byte is None


# ---- several stores


def test_stores_are_mixed_by_their_sizes_unless_weights_are_given(mixed):
    data = opened.open_data(mixed(), say_nothing)
    assert data.train.names == data.eval.names == ("animals", "numbers")
    sizes = [len(store) - 1 for store in data.train.stores]
    assert data.weights == tuple(sizes)
    given = opened.open_data(mixed(data__weights=(1.0, 3.0)), say_nothing)
    seen = given.tokens_by_store(10_000, 6)
    np.testing.assert_allclose(seen / seen.sum(), [0.25, 0.75], atol=1e-4)


def test_each_row_is_of_its_component(mixed, words):
    config = mixed(data__weights=(1.0, 1.0), data__packing="single")
    data = opened.open_data(config, say_nothing)
    plan = opened.train_plan(data, config, num_steps=20, rows=np.arange(6))
    counts = np.zeros(2, int)
    for step in range(20):
        batch = plan[step]
        texts = [data.tokenizer.decode(row) for row in batch["tokens"]]
        for text, component in zip(texts, batch["components"], strict=True):
            whole = text.split()[1:-1]  # words that no row's edge cuts
            assert set(whole) <= set(words[data.train.names[component]])
            counts[component] += 1
    assert abs(counts[0] - counts[1]) <= 0.2 * counts.sum()


def test_weights_change_at_their_step(mixed):
    config = mixed(data__weights=(1.0, 0.0), data__weights_at=((4, (0.0, 1.0)),))
    data = opened.open_data(config, say_nothing)
    plan = opened.train_plan(data, config, num_steps=9, rows=np.arange(6))
    for step in range(9):
        assert set(plan[step]["components"]) == {int(step >= 4)}


def test_a_store_that_repeats_is_warned_of_beforehand(mixed):
    data = opened.open_data(mixed(data__weights=(1.0, 1.0)), say_nothing)
    sizes = [windows.num_targets for windows in data.train.windows]
    assert sizes[0] > 1.3 * sizes[1]
    steps = int(1.2 * sizes[1] / 3 / 17)
    lines = list(opened.repeats(data, steps, 6))
    assert lines[0].startswith("mixture animals: 50.")
    assert lines[1].startswith("WARNING: mixture numbers: ")
    assert lines[1].endswith(f" epochs of {sizes[1]:,}; it repeats")


def test_tokens_that_repeat_are_not_unique(mixed):
    data = opened.open_data(mixed(data__weights=(1.0, 1.0)), say_nothing)
    sizes = [windows.num_targets for windows in data.train.windows]
    assert data.unique_tokens(0, 10**6, 6) == sum(sizes)
    seen = data.tokens_by_store(3, 6)
    assert data.unique_tokens(0, 3, 6) == pytest.approx(seen.sum())
    one = dataclasses.replace(
        data, train=opened.Split(("animals",), data.train.windows[:1]), weights=(1.0,)
    )
    assert one.unique_tokens(7, 1, 6) == 7
    assert one.unique_tokens(10**9, 1, 6) == sizes[0]
    assert one.tokens_seen(3, 6) == {}
    assert set(data.tokens_seen(3, 6)) == {
        "train/tokens_seen/animals",
        "train/tokens_seen/numbers",
    }


def test_held_out_text_that_is_trained_on_too_is_warned_of(mixed, stores, tmp_path):
    both = (str(shutil.copytree(stores["animals"] / "train", tmp_path / "again")),)
    said = []
    data = opened.open_data(mixed(data__eval_paths=both), said.append)
    count = data.train.stores[0].header["num_documents"]
    assert said == [f"WARNING: {count:,} documents are held out and trained on too"]
