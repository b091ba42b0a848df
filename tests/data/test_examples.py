"""Tests of rows cut from the stream: shift, documents, padding, bytes of targets."""

import numpy as np
import pytest
import tokenizers as library
from tokenizers import models, normalizers, pre_tokenizers

from fm_jax.data import store
from fm_jax.data.examples import Windows
from fm_jax.errors import UserError
from fm_jax.tokenizers import all as tokenizers

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
    return tokenizers.JsonTokenizer(inner.to_str())


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
    return tokenizers.JsonTokenizer(inner.to_str())


TOKENIZERS = {
    "bytes": tokenizers.ByteTokenizer,
    "bpe": lambda: tokenizers.train_bpe(TEXTS * 3, vocab_size=270),
    "word_piece": word_piece,
    "unigram": unigram,
}


@pytest.fixture
def cut(tmp_path):
    """Return `cut(texts, length)`: the windows over a store of texts."""

    def make(texts, length, *, mask_documents=True, tokenizer=None):
        tokenizer = tokenizer or tokenizers.ByteTokenizer()
        built = store.find_or_build(
            tmp_path,
            lambda: texts,
            tokenizer,
            identity={"split": "train", "texts": texts},
            say=lambda line: None,
        )
        return Windows(built, tokenizer, length, mask_documents)

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


@pytest.mark.parametrize("length", [1, 3, 16])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_target_bytes_add_up_to_the_bytes_of_the_text(cut, name, length, monkeypatch):
    monkeypatch.setattr(store, "SHARD_TOKENS", 11)
    windows = cut(TEXTS, length, tokenizer=TOKENIZERS[name]())
    batch = everything(windows)
    total = sum(len(text.encode()) for text in TEXTS)
    assert batch["target_bytes"].sum() == total == windows.store.num_bytes
    assert not batch["target_bytes"][batch["loss_weights"] == 0].any()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_target_bytes_add_up_document_by_document(cut, name):
    windows = cut(TEXTS, 3, tokenizer=TOKENIZERS[name]())
    batch = everything(windows)
    is_target_BT = batch["loss_weights"] > 0
    targets, sizes = (batch[k][is_target_BT] for k in ("targets", "target_bytes"))
    closes = np.flatnonzero(targets == windows.tokenizer.end_id)
    found = [part.sum() for part in np.split(sizes, closes + 1)[:-1]]
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
