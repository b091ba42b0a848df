"""Tests of rows of the stream: shift, documents, padding, bytes of targets."""

import collections

import numpy as np
import pytest
import tokenizers as library
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers

from fm_jax.data import windows as windowing
from fm_jax.data.lanes import Sizes
from fm_jax.data.windows import PACKINGS, Windows
from fm_jax.errors import UserError
from fm_jax.tokenizers import jsonfile, plain, training
from tests.data import made, streams

END = 256
TEXTS = [
    "The cat",
    "",
    "s",
    "a</s>b \U0001f642  é\r\n",
    "x\ty",
    "the cat sat " * 3,
    "ab",
]


def word_piece():
    """Return a tokenizer whose ids lose case, spaces, and what it does not know."""
    pieces = ["[UNK]", "[SEP]", "the", "cat", "##s", "sat", "a", "b", "ab", "x", "y"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    inner = library.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.add_special_tokens(["[UNK]", "[SEP]"])
    return jsonfile.JsonTokenizer(inner.to_str())


def unigram():
    """Return a tokenizer that adds a space, drops some, and holds its end token."""
    letters = [(letter, -9.0) for letter in "\u2581abcehstxy</>"]
    vocab = [("<unk>", 0.0), ("</s>", 0.0), *letters, ("\u2581cat", -4.0)]
    inner = library.Tokenizer(models.Unigram(vocab, unk_id=0))
    inner.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(library.Regex(" {2,}"), " ")]
    )
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.add_special_tokens(["<unk>", "</s>"])
    return jsonfile.JsonTokenizer(inner.to_str())


TOKENIZERS = {
    "bytes": plain.ByteTokenizer,
    "bpe": lambda: training.train_bpe(TEXTS * 3, vocab_size=270),
    "word_piece": word_piece,
    "unigram": unigram,
}


@pytest.fixture
def cut(tmp_path):
    """Return `cut(texts, length)`: the windows over a store of texts."""

    def make(texts, length, *, mask_documents=True, tokenizer=None, **how):
        tokenizer = tokenizer or plain.ByteTokenizer()
        sizes = Sizes(shard_tokens=11, batch_bytes=1)
        built = made.build(tmp_path, texts, tokenizer, sizes=sizes)
        return Windows(built, tokenizer, length, mask_documents, **how)

    return make


def everything(windows):
    return windows.rows(np.arange(len(windows)))


def test_a_batch_by_hand(cut):
    windows = cut(["abc", "de"], 4)
    batch = everything(windows)
    assert len(windows) == 2
    a, b, c, d, e = b"abcde"
    expected = {
        "tokens": [[END, a, b, c], [END, d, e, END]],
        "targets": [[a, b, c, END], [d, e, END, 0]],
        "loss_weights": [[1, 1, 1, 1], [1, 1, 1, 0]],
        "positions": [[0, 1, 2, 3], [0, 1, 2, 0]],
        "segment_ids": [[2, 2, 2, 2], [2, 2, 2, 3]],
        "target_bytes": [[1, 1, 1, 0], [1, 1, 0, 0]],
    }
    assert {key: array.tolist() for key, array in batch.items()} == expected


def test_documents_are_not_told_apart_without_mask_documents(cut):
    masked = everything(cut(TEXTS, 5))
    batch = everything(cut(TEXTS, 5, mask_documents=False))
    is_token_BT = masked["segment_ids"] > 0
    np.testing.assert_array_equal(batch["segment_ids"], is_token_BT)
    np.testing.assert_array_equal(batch["positions"], np.arange(5) * is_token_BT)
    for key in ("tokens", "targets", "loss_weights", "target_bytes"):
        np.testing.assert_array_equal(batch[key], masked[key])


@pytest.mark.parametrize("length", [1, 3, 5, 16])
def test_segments_and_positions_follow_the_documents(cut, length):
    windows = cut(TEXTS, length)
    batch = everything(windows)
    stream = [i for text in TEXTS for i in (END, *text.encode())] + [END]
    for row in range(len(windows)):
        segment, position = 1, -1
        for column in range(length):
            place = row * length + column
            if place >= len(stream):
                found = [batch[k][row, column] for k in ("segment_ids", "positions")]
                assert found == [0, 0]
                continue
            opens = stream[place] == END
            segment, position = segment + opens, 0 if opens else position + 1
            assert batch["tokens"][row, column] == stream[place]
            assert batch["segment_ids"][row, column] == segment
            assert batch["positions"][row, column] == position


@pytest.mark.parametrize("length", [1, 3, 5, 16])
def test_every_id_but_the_first_is_a_target_just_once(cut, length):
    windows = cut(TEXTS, length)
    batch = everything(windows)
    stream = [i for text in TEXTS for i in (END, *text.encode())] + [END]
    is_target_BT = batch["loss_weights"] > 0
    assert batch["targets"][is_target_BT].tolist() == stream[1:]
    assert batch["tokens"][is_target_BT].tolist() == stream[:-1]
    assert set(np.unique(batch["loss_weights"])) <= {0.0, 1.0}


def test_a_target_is_the_next_token_of_its_row(cut):
    batch = everything(cut(TEXTS, 7))
    is_token_BT = batch["segment_ids"] > 0
    both_BT = is_token_BT[:, :-1] & is_token_BT[:, 1:]
    np.testing.assert_array_equal(
        batch["targets"][:, :-1][both_BT], batch["tokens"][:, 1:][both_BT]
    )
    assert np.all(is_token_BT[batch["loss_weights"] > 0])


def test_the_tail_of_the_last_row_is_padding(cut):
    windows = cut(["abcdef"], 5)  # 8 ids: 7 targets, 5 and 2
    batch = everything(windows)
    assert batch["loss_weights"].sum(axis=1).tolist() == [5, 2]
    # The last end id is there as a token; nothing follows it.
    assert batch["segment_ids"][1].tolist() == [1, 1, 2, 0, 0]
    for key, array in batch.items():
        assert not array[1, 3:].any(), key


def test_a_stream_that_just_fills_its_rows_has_no_padding(cut):
    windows = cut(["abcdef"], 7)
    assert len(windows) == 1
    batch = everything(windows)
    assert batch["loss_weights"].all() and batch["segment_ids"].all()


def test_an_index_of_minus_one_is_a_row_of_padding(cut):
    windows = cut(TEXTS, 5)
    batch = windows.rows(np.array([2, -1, 0]))
    alone = windows.rows(np.array([2, 0]))
    for key, array in batch.items():
        assert not array[1].any(), key
        np.testing.assert_array_equal(array[[0, 2]], alone[key])


def test_rows_come_in_the_order_asked_for_with_their_types(cut):
    windows = cut(TEXTS, 5)
    batch = windows.rows(np.array([4, 1, 1]))
    whole = everything(windows)
    for key, array in batch.items():
        expected = np.float32 if key == "loss_weights" else np.int32
        assert array.dtype == expected, key
        assert array.shape == (3, 5), key
        assert array.flags.c_contiguous, key
        np.testing.assert_array_equal(array, whole[key][[4, 1, 1]])


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("length", [1, 3, 16])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_target_bytes_add_up_to_the_bytes_of_the_text(cut, name, length, packing):
    windows = cut(TEXTS, length, tokenizer=TOKENIZERS[name](), packing=packing)
    assert len(windows.store.shards) > 1
    batch = everything(windows)
    total = sum(len(text.encode()) for text in TEXTS)
    assert batch["target_bytes"].sum() == total == windows.store.num_bytes
    assert not batch["target_bytes"][batch["loss_weights"] == 0].any()


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_target_bytes_add_up_document_by_document(cut, name, packing):
    windows = cut(TEXTS, 3, tokenizer=TOKENIZERS[name](), packing=packing)
    sizes = np.zeros(len(windows.store), int)
    for row, size_T in enumerate(everything(windows)["target_bytes"]):
        column = 0
        for start, count in windows.spans(row):
            sizes[start + 1 : start + count + 1] = size_T[column : column + count]
            column += count
    documents = streams.documents_of(windows.store)
    found = [sizes[opens + 1 : closes + 1].sum() for opens, closes in documents]
    assert found == [len(text.encode()) for text in TEXTS]


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_the_end_id_stands_for_no_bytes_where_ids_stand_for_all(cut, name):
    windows = cut(TEXTS, 5, tokenizer=TOKENIZERS[name]())
    batch = everything(windows)
    is_target_BT = batch["loss_weights"] > 0
    is_end_BT = (batch["targets"] == windows.tokenizer.end_id) & is_target_BT
    assert is_end_BT.sum() == len(TEXTS)
    assert not batch["target_bytes"][is_end_BT].any()


def test_a_corpus_shorter_than_a_window_is_refused(cut):
    assert len(cut(["abc"], 4)) == 1
    with pytest.raises(UserError) as error:
        cut(["abc"], 5)
    path = cut(["abc"], 4).store.path
    assert str(error.value) == (
        "the corpus must be longer than one window of data.max_length=5 tokens; got 5 "
        f"tokens in {path}. Add text or lower data.max_length."
    )


# Any packing.


def filled(windows, row):
    """Return a row by the definition of a batch, from spans and stream, in Python."""
    store, tokenizer = windows.store, windows.tokenizer
    stream = store.read(0, len(store)).tolist()
    spans = windows.spans(row)
    places = [p for start, count in spans for p in range(start, start + count)]
    is_cut = windows.packing == "split"
    # Cut from the stream, the row has the last id too, with no target.
    inputs = (
        places
        if not is_cut or len(places) == windows.length
        else [*places, places[-1] + 1]
    )
    bytes_of = collections.Counter()
    for document, (_, close) in enumerate(streams.documents_of(store)):
        bytes_of[close] = int(store.leftover[document])
    segments, positions = [], []
    if is_cut:
        segment, position = 1, -1
        for place in inputs:
            opens = stream[place] == tokenizer.end_id
            segment, position = segment + opens, 0 if opens else position + 1
            segments.append(segment)
            positions.append(position)
    else:
        for number, (_, count) in enumerate(spans, 1):
            segments += [number] * count
            positions += range(count)
    expected = {
        "tokens": [stream[p] for p in inputs],
        "targets": [stream[p + 1] for p in places],
        "loss_weights": [1.0] * len(places),
        "positions": positions,
        "segment_ids": segments,
        "target_bytes": [
            int(tokenizer.byte_lengths[stream[p + 1]]) + bytes_of[p + 1] for p in places
        ],
    }
    return {k: x + [0] * (windows.length - len(x)) for k, x in expected.items()}


@st.composite
def corpora(draw):
    """Return a store of documents of any lengths, in any shards, and its tokenizer."""
    lengths = draw(st.lists(st.integers(0, 40), min_size=1, max_size=30))
    cuts = draw(st.sets(st.integers(1, 29), max_size=4))
    cuts = sorted(cut for cut in cuts if cut < len(lengths))
    end_id = draw(st.sampled_from([0, sum(lengths) + len(lengths) + 1]))
    some = st.lists(st.integers(0, 3), min_size=len(lengths), max_size=len(lengths))
    leftover = draw(st.none() | some)
    store = streams.store_of(lengths, cuts=cuts, end_id=end_id, leftover=leftover)
    return store, streams.tokenizer_of(store, end_id=end_id)


@settings(max_examples=60, deadline=None)
@given(corpus=corpora(), length=st.sampled_from([1, 2, 5, 7, 64]))
@pytest.mark.parametrize("at_once", [1, 1 << 16])
@pytest.mark.parametrize("packing", PACKINGS)
def test_rows_of_any_corpus_are_those_of_the_definition(
    packing, at_once, corpus, length
):
    store, tokenizer = corpus
    if packing == "split" and len(store) <= length:
        return
    windows = Windows(store, tokenizer, length, True, packing)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windowing, "AT_ONCE", at_once)
        batch = everything(windows)
    for row in range(len(windows)):
        found = {key: array[row].tolist() for key, array in batch.items()}
        assert found == filled(windows, row)
    # Each id but the first is a target just once, and the weights say so.
    spans = [span for row in range(len(windows)) for span in windows.spans(row)]
    places = [p + 1 for start, count in spans for p in range(start, start + count)]
    assert sorted(places) == list(range(1, len(store)))
    assert batch["loss_weights"].sum() == windows.num_targets == len(store) - 1
    assert windows.mean_targets * len(windows) == pytest.approx(windows.num_targets)
    assert batch["loss_weights"].sum(axis=1).min() >= 1
    total = tokenizer.byte_lengths[store.read(0, len(store))].sum()
    assert batch["target_bytes"].sum() == total + store.leftover.sum()


@settings(max_examples=60, deadline=None)
@given(corpus=corpora(), length=st.sampled_from([1, 2, 5, 7, 64]))
@pytest.mark.parametrize("packing", ["best_fit", "single"])
def test_packed_documents_are_kept_apart_and_cut_only_where_too_long(
    packing, corpus, length
):
    store, tokenizer = corpus
    windows = Windows(store, tokenizer, length, True, packing)
    batch = everything(windows)
    of_place = store.documents_of(np.arange(len(store)))
    pieces = collections.Counter()
    for row in range(len(windows)):
        for number, (start, count) in enumerate(windows.spans(row), 1):
            here = batch["segment_ids"][row] == number
            tokens = batch["tokens"][row][here]
            places = tokens[tokens != tokenizer.end_id]  # the others are their places
            assert len(set(of_place[places].tolist())) <= 1
            assert here.sum() == count
            assert of_place[start] == of_place[start + count - 1]
            pieces[int(of_place[start])] += 1
        assert packing == "best_fit" or number == 1
    for document, (opens, closes) in enumerate(streams.documents_of(store)):
        assert pieces[document] == -(-(closes - opens) // length)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("cuts", [(), (2, 5, 6)])
def test_padding_and_rows_stand_where_they_are_asked_for(packing, cuts):
    store = streams.store_of([3, 0, 9, 1, 1, 25, 4, 2], cuts=cuts)
    windows = Windows(store, streams.tokenizer_of(store), 7, True, packing)
    whole = everything(windows)
    last = len(windows) - 1
    for indices in ([-1, last, -1, 0, 0], [1, -1], [-1], [-1, -1], [2, 1, 0, last], []):
        batch = windows.rows(np.array(indices, int))
        for key, array in batch.items():
            assert array.shape == (len(indices), 7), key
            assert array.dtype == (np.float32 if key == "loss_weights" else np.int32)
            assert array.flags.c_contiguous, key
            for row, index in enumerate(indices):
                expected = 0 * whole[key][0] if index < 0 else whole[key][index]
                np.testing.assert_array_equal(array[row], expected, err_msg=key)
    assert windows.spans(-1) == []


@pytest.mark.parametrize("packing", PACKINGS)
def test_batches_share_no_memory(packing):
    store = streams.store_of([3, 0, 9, 1, 1, 25, 4, 2])
    windows = Windows(store, streams.tokenizer_of(store), 7, True, packing)
    one, two = everything(windows), everything(windows)
    for name in one:
        one[name].fill(7)
        for other in one:
            assert other == name or not np.shares_memory(one[name], one[other])
    for name, array in everything(windows).items():
        np.testing.assert_array_equal(array, two[name])


def test_packed_rows_by_hand():
    # Documents of 3, 1, 2 and 6 targets, the end id among them.
    store = streams.store_of([2, 0, 1, 5])
    windows = Windows(store, streams.tokenizer_of(store), 4, True, "best_fit")
    assert [windows.spans(row) for row in range(len(windows))] == [
        [(0, 3), (3, 1)],
        [(4, 2), (10, 2)],
        [(6, 4)],
    ]
    batch = everything(windows)
    expected = {
        "tokens": [[0, 1, 2, 0], [0, 5, 10, 11], [0, 7, 8, 9]],
        "targets": [[1, 2, 0, 0], [5, 0, 11, 0], [7, 8, 9, 10]],
        "loss_weights": [[1, 1, 1, 1]] * 3,
        "positions": [[0, 1, 2, 0], [0, 1, 0, 1], [0, 1, 2, 3]],
        "segment_ids": [[1, 1, 1, 2], [1, 1, 2, 2], [1, 1, 1, 1]],
        "target_bytes": [[1, 2, 0, 0], [0, 0, 1, 0], [2, 3, 4, 0]],
    }
    assert {key: array.tolist() for key, array in batch.items()} == expected
    single = Windows(store, windows.tokenizer, 4, True, "single")
    assert [single.spans(row) for row in range(len(single))] == [
        [(0, 3)], [(3, 1)], [(4, 2)], [(6, 4)], [(10, 2)]
    ]  # fmt: skip
    assert everything(single)["segment_ids"].sum(axis=1).tolist() == [3, 1, 2, 4, 2]


def test_a_packing_that_is_not_known_is_refused():
    store = streams.store_of([2, 0, 1, 5])
    assert made.refusal(Windows, store, None, 4, True, "bestfit") == (
        "data.packing must be one of the known names; got 'bestfit'. Did you mean "
        "'best_fit'? Known: best_fit, split, single"
    )


@pytest.mark.parametrize("packing", ["best_fit", "single"])
def test_packed_documents_that_see_each_other_are_refused(packing):
    store = streams.store_of([2, 0, 1, 5])
    assert made.refusal(Windows, store, None, 4, False, packing) == (
        f"data.mask_documents must be True when data.packing is {packing}; got False. "
        "Train across documents with split."
    )


@pytest.mark.parametrize("packing", ["best_fit", "single"])
def test_packed_documents_may_be_fewer_tokens_than_a_row(packing):
    store = streams.store_of([2])
    windows = Windows(store, streams.tokenizer_of(store), 9, True, packing)
    assert everything(windows)["targets"].tolist() == [[1, 2] + [0] * 7]
