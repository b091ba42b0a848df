"""Tests of rows to tune on: every example whole, once, and by itself."""

import jax
import numpy as np
import pytest

from fm_jax.corpora.documents import Piece
from fm_jax.data import example_store, sides, store
from fm_jax.data.batches import EvalBatches, TrainBatches
from fm_jax.data.example_rows import ExampleRows
from fm_jax.data.examples import Maker
from fm_jax.data.mixtures import Mixture
from fm_jax.data.sides import Reader
from fm_jax.data.windows import NAMES
from fm_jax.errors import UserError
from fm_jax.models import zoo
from fm_jax.tokenizers.plain import ByteTokenizer

LENGTH = 23
NUM = 41
TOKENIZER = ByteTokenizer()


def _rows_of(kind):
    rng = np.random.default_rng(7)

    def text(least, most):
        size = int(rng.integers(least, most))
        return "".join(map(chr, rng.integers(97, 123, size)))

    for number in range(NUM):
        row = {"prompt": text(0, 5)}
        if kind == "completion":
            row["completion"] = text(1, 12)
        elif kind == "classify":
            row = {"text": text(0, 19), "label": number % 3}
        else:
            row |= {"chosen": text(1, 4) + "A", "rejected": text(1, 4) + "B"}
        yield Piece("r.jsonl", "/r.jsonl"), number + 1, row


def _made(folder, kind, packing="best_fit", length=LENGTH):
    reader = Reader(kind, sides.fields(kind, ()))
    maker = Maker(reader, TOKENIZER, LENGTH, labels=("0", "1", "2"))
    store = example_store.find_or_make(
        folder, {}, lambda: _rows_of(kind), lambda: maker, kind=kind, split="train",
        skips=False, say=lambda line: None,
    )  # fmt: skip
    return ExampleRows(store, TOKENIZER, length, packing)


@pytest.fixture(params=["completion", "classify", "preference"])
def kind(request):
    """Return each kind that needs no template."""
    return request.param


@pytest.fixture(params=["best_fit", "single"])
def rows(request, kind, tmp_path):
    """Return rows of each kind, packed and not."""
    return _made(tmp_path, kind, request.param)


def _segments(batch, row):
    """Return (tokens, targets, weights, bytes) of each segment of a row, by number."""
    numbers = batch["segment_ids"][row]
    names = ("tokens", "targets", "loss_weights", "target_bytes")
    return [
        tuple(batch[name][row][numbers == n].tolist() for name in names)
        for n in range(1, numbers.max() + 1)
    ]


def test_each_example_is_in_one_row_once_and_whole(rows):
    batch, store = rows.rows(np.arange(len(rows))), rows.store
    each, bytes_V = store.num_segments, TOKENIZER.byte_lengths
    assert sorted(batch) == sorted(NAMES)
    seen = []
    for row in range(len(rows)):
        examples = rows.examples_of(row).tolist()
        assert examples == sorted(examples)
        seen += examples
        numbers = [n * each + side for n in examples for side in range(each)]
        found = _segments(batch, row)
        for number, segment in zip(numbers, found, strict=True):
            here = slice(store.offsets[number], store.offsets[number + 1])
            targets = store.targets[here]
            sizes = bytes_V[targets] * (store.header["kind"] != "classify")
            assert segment == (
                store.tokens[here].tolist(), targets.tolist(),
                store.weights[here].tolist(), sizes.tolist(),
            )  # fmt: skip
    assert sorted(seen) == list(range(NUM)) == list(range(rows.num_examples))
    firsts = [rows.examples_of(row)[0] for row in range(len(rows))]
    assert firsts == sorted(firsts)


def test_segments_are_numbered_and_counted_from_0_and_padding_is_0(rows):
    batch = rows.rows(np.array([2, -1, 0, 2]))
    for name, array in batch.items():
        assert array.shape == (4, LENGTH)
        assert array.dtype == (np.float32 if name == "loss_weights" else np.int32)
        assert not array[1].any()  # padding
        np.testing.assert_array_equal(array[0], array[3])
    for row in (0, 2):
        numbers, expected, last = batch["segment_ids"][row], [], 0
        used = int((numbers > 0).sum())
        assert (numbers[:used] > 0).all()
        assert (np.diff(numbers[:used]) >= 0).all()
        assert {*numbers[:used].tolist()} == {*range(1, numbers.max() + 1)}
        for place in range(used):
            begins = place == 0 or numbers[place] != numbers[place - 1]
            last = 0 if begins else last + 1
            expected.append(last)
        assert batch["positions"][row].tolist() == expected + [0] * (LENGTH - used)
        assert (batch["tokens"][row][batch["positions"][row] == 0][:1] == 256).all()


def test_every_segment_begins_with_the_end_of_what_came_before(rows):
    batch = rows.rows(np.arange(len(rows)))
    begins = (batch["positions"] == 0) & (batch["segment_ids"] > 0)
    assert (batch["tokens"][begins] == TOKENIZER.end_id).all()
    assert begins.sum() == NUM * rows.store.num_segments


def test_packed_rows_are_fewer_and_say_how_full_they_are(kind, tmp_path):
    packed, single = (_made(tmp_path, kind, p) for p in ("best_fit", "single"))
    assert len(packed) < len(single) == NUM
    for rows in (packed, single):
        batch = rows.rows(np.arange(len(rows)))
        assert rows.num_targets == (batch["segment_ids"] > 0).sum()
        assert rows.mean_targets == rows.num_targets / len(rows)
        assert rows.num_segments == batch["segment_ids"].max()
    assert single.num_segments == single.store.num_segments


def test_the_two_sides_of_a_pair_are_neighbours_the_chosen_first(tmp_path):
    rows = _made(tmp_path, "preference")
    batch = rows.rows(np.arange(len(rows)))
    for row in range(len(rows)):
        found = _segments(batch, row)
        assert len(found) % 2 == 0
        for number, (tokens, *_) in enumerate(found):
            assert (65 if number % 2 == 0 else 66) == tokens[-1]
        for chosen, rejected in zip(found[::2], found[1::2], strict=True):
            prompts = [side[0][: side[2].index(1.0) + 1] for side in (chosen, rejected)]
            assert prompts[0] == prompts[1]


def test_a_reference_stands_at_the_last_weighted_place_of_its_segment(tmp_path):
    rows = _made(tmp_path, "preference")
    logps = -np.arange(1, 2 * NUM + 1, dtype=np.float64).reshape(NUM, 2)
    told = rows.with_reference(logps)
    assert "reference" not in rows.rows(np.array([0]))
    batch = told.rows(np.array([3, -1, 1]))
    assert batch["reference"].dtype == np.float32
    assert not batch["reference"][1].any()
    for place, row in ((0, 3), (2, 1)):
        reference = batch["reference"][place]
        expected = logps[told.examples_of(row)].reshape(-1)
        np.testing.assert_array_equal(reference[reference != 0], expected)
        for number, value in enumerate(expected, 1):
            here = batch["segment_ids"][place] == number
            weighted = here & (batch["loss_weights"][place] > 0)
            assert reference[np.flatnonzero(weighted)[-1]] == value


def test_an_example_means_the_same_to_a_model_packed_or_alone(
    kind, tmp_path, model_config, random_params
):
    model = zoo.build(model_config(vocab_size=261, max_length=LENGTH))
    params = random_params(model.abstract)
    sums = []
    for packing in ("best_fit", "single"):
        rows = _made(tmp_path, kind, packing)
        batch = rows.rows(np.arange(len(rows)))
        inputs = (batch[n] for n in ("tokens", "positions", "segment_ids"))
        hidden_BTD, _ = model.hidden(params, *inputs)
        logits_BTV = model.logits(params, hidden_BTD)
        nll_BT = -np.take_along_axis(
            np.asarray(jax.nn.log_softmax(logits_BTV)), batch["targets"][..., None], -1
        )[..., 0]
        nll_BT *= batch["loss_weights"]
        each, found = rows.store.num_segments, np.zeros((NUM, rows.store.num_segments))
        for row in range(len(rows)):
            for number, example in enumerate(rows.examples_of(row)):
                for side in range(each):
                    here = batch["segment_ids"][row] == each * number + side + 1
                    found[example, side] = nll_BT[row][here].sum()
        assert (found > 0).all()
        sums.append(found)
    np.testing.assert_allclose(sums[0], sums[1], rtol=2e-5)


def test_an_epoch_of_training_reads_each_example_once(rows):
    plan = TrainBatches((rows,), Mixture(((0, (1.0,)),)), 1, 3, len(rows), np.arange(1))
    chosen = [int(plan.indices(step)[1][0]) for step in range(len(rows))]
    assert chosen != sorted(chosen)
    seen = np.concatenate([rows.examples_of(row) for row in chosen])
    assert sorted(seen.tolist()) == list(range(NUM))
    again = plan[1]
    for name, array in rows.rows(np.array([chosen[1]])).items():
        np.testing.assert_array_equal(again[name], array)


def test_several_files_are_read_together_with_their_references(tmp_path):
    some = _made(tmp_path, "preference").with_reference(-np.ones((NUM, 2)))
    other = some.with_reference(-2 * np.ones((NUM, 2)))
    plan = EvalBatches((some, other), 4, np.arange(4))
    summed = {0: 0.0, 1: 0.0}
    for batch in plan:
        for part in summed:
            summed[part] += float(batch["reference"][batch["components"] == part].sum())
    assert summed == {0: -2.0 * NUM, 1: -4.0 * NUM}


def test_rows_that_would_cut_examples_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"must be best_fit or single.*; got split\."):
        _made(tmp_path, "completion", "split")
    with pytest.raises(
        UserError, match=r"must hold every example; got 9, and r\.jsonl"
    ):
        _made(tmp_path, "completion", length=9)


def test_an_example_says_where_it_stood(tmp_path):
    rows = _made(tmp_path, "completion")
    assert rows.where(7) == "r.jsonl line 8"


@pytest.mark.parametrize("wrong", [257, 2**31 - 1, -3])
@pytest.mark.parametrize("name", ["tokens", "targets"])
def test_an_id_that_there_is_not_is_named(name, wrong, kind, tmp_path, monkeypatch):
    """Fault 39, data: stored examples have an id beyond the vocabulary or the labels.

    Promise: the batch that has it stops the run with exit 2 and names the file; no
    model ever sees it clamped.
    """
    file = _made(tmp_path, kind).store.path / f"{name}.npy"
    held = np.load(file)
    held[len(held) // 2] = wrong
    np.save(file, held)
    monkeypatch.setattr(store, "READ_AT_START", 0)  # as of a store that is large
    rows = _made(tmp_path, kind)
    with pytest.raises(UserError) as error:
        rows.rows(np.arange(len(rows)))
    size = 3 if (name, kind) == ("targets", "classify") else 257
    assert str(error.value) == (
        f"ids of stored examples must be below {size:,}; got {wrong % 2**32:,} in "
        f"{file}. Delete {file.parent} and start again: they will be made again."
    )
