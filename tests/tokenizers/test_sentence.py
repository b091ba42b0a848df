"""Tests of SentencePiece models, against the library's own ids and text."""

import sys

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings

from fm_jax.tokenizers.sentence import SentencePieceTokenizer
from tests.tokenizers import made
from tests.tokenizers.made import TORTURE, refusal

MODELS = {
    "bpe": {},
    "unigram": {"model_type": "unigram", "vocab_size": 300, "byte_fallback": False},
    "unigram with bytes": {"model_type": "unigram", "vocab_size": 310},
    "as it is": {
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
    },
    "letters": {"model_type": "char", "byte_fallback": False, "vocab_size": 40},
}


@pytest.fixture(scope="module", params=MODELS)
def both(request):
    """Return one of ours and the library's, of the same model."""
    model = made.sentence_model(**MODELS[request.param])
    inner = sentencepiece.SentencePieceProcessor(model_proto=model)
    return SentencePieceTokenizer(model), inner


def test_ids_are_those_of_the_library(both):
    tokenizer, inner = both
    texts = [*TORTURE.values(), *made.CORPUS]
    for threads in (0, 1, 2):
        rows = tokenizer.encode_batch(texts, num_threads=threads)
        for ids, text in zip(rows, texts, strict=True):
            assert ids.dtype == np.uint32
            assert ids.tolist() == inner.encode(text)
    assert tokenizer.vocab_size == inner.vocab_size()


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(text=made.TEXT)
def test_no_text_encodes_to_a_special_id_and_text_comes_back_as_from_the_library(
    both, text
):
    tokenizer, inner = both
    (ids,) = tokenizer.encode_batch([text])
    assert not np.isin(ids, tokenizer.special_ids).any()
    assert tokenizer.decode(ids) == inner.decode(inner.encode(text))
    assert tokenizer.decode_bytes(ids) == tokenizer.decode(ids).encode()


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(text=made.TEXT)
def test_bytes_add_up_where_text_is_not_normalised(text):
    tokenizer = SentencePieceTokenizer(AS_IT_IS)
    text = text.replace("\u2581", "")  # its own letter for a space
    (ids,) = tokenizer.encode_batch([text])
    assert tokenizer.byte_lengths[ids].sum() == len(text.encode())
    assert tokenizer.decode(ids) == text


AS_IT_IS = made.sentence_model(**MODELS["as it is"])


def test_pieces_stand_for_their_letters_and_byte_pieces_for_a_byte():
    tokenizer = SentencePieceTokenizer(made.sentence_model())
    inner = tokenizer._inner
    (ids,) = tokenizer.encode_batch(["the cat \u00e9\U0001f642"])
    pieces = [inner.id_to_piece(int(index)) for index in ids]
    assert pieces[:3] == ["\u2581the", "\u2581cat", "\u2581"]
    assert pieces[3:5] == ["<0xC3>", "<0xA9>"]
    # The first space is the model's own: one byte less is left over.
    assert tokenizer.byte_lengths[ids].tolist() == [4, 4, 1, 1, 1, 1, 1, 1, 1]
    assert tokenizer.byte_lengths[list(tokenizer.special_ids)].tolist() == [0, 0]


def test_text_without_pieces_is_unknown_and_stands_for_no_bytes():
    model = made.sentence_model(**MODELS["letters"])
    tokenizer = SentencePieceTokenizer(model)
    (ids,) = tokenizer.encode_batch(["\u4f60"])
    assert ids.tolist()[1:] == [tokenizer.unknown_id]
    assert tokenizer.byte_lengths[tokenizer.unknown_id] == 0
    assert tokenizer.unknown_id not in tokenizer.special_ids


def test_it_is_not_exact_and_ids_beyond_it_are_left_out():
    tokenizer = SentencePieceTokenizer(made.sentence_model())
    assert not tokenizer.is_exact
    (ids,) = tokenizer.encode_batch(["the cat"])
    assert tokenizer.decode([*ids, 5000, tokenizer.end_id]) == "the cat"


def test_half_of_a_surrogate_pair_is_refused_in_a_model_too():
    tokenizer = SentencePieceTokenizer(AS_IT_IS)
    assert refusal(tokenizer.encode_batch, ["a\ud83d"]).startswith(
        r"text must be Unicode; got '\ud83d' at character 1"
    )


def test_the_end_is_the_models_own_or_the_control_symbol_that_is_named():
    model = made.sentence_model(control_symbols=["<fin>"])
    assert SentencePieceTokenizer(model).end_id == 2
    named = SentencePieceTokenizer(model, end_token="<fin>")
    assert named.end_id == 3
    assert SentencePieceTokenizer(model, end_id=3).fingerprint == named.fingerprint
    assert named.special_ids == (1, 2, 3)


def test_an_end_that_is_no_control_symbol_is_refused():
    model = made.sentence_model(user_defined_symbols=["<im>"], eos_id=-1)
    for options in ({"end_token": "<im>"}, {}):
        token = options.get("end_token", "")
        assert refusal(SentencePieceTokenizer, model, **options) == (
            "data.end_token must name the tokenizer's end-of-document token; got "
            f"{token!r}, and none of <|endoftext|>, </s>, <|end_of_text|>, <eos>, [SEP]"
            " is in its control symbols."
        )


def test_a_model_is_kept_with_its_end_in_one_json(tmp_path):
    model = made.sentence_model(control_symbols=["<fin>"])
    tokenizer = SentencePieceTokenizer(model, end_token="<fin>")
    loaded = made.load(tmp_path, tokenizer.to_json())
    assert loaded.end_id == 3
    assert loaded.fingerprint == tokenizer.fingerprint
    assert made.load(tmp_path, tokenizer.to_json(), end_token="</s>").end_id == 2
    for text in TORTURE.values():
        (ids,), (other,) = (t.encode_batch([text]) for t in (tokenizer, loaded))
        np.testing.assert_array_equal(ids, other)


def test_a_model_without_its_library_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    assert refusal(SentencePieceTokenizer, AS_IT_IS) == (
        "a SentencePiece model must be read by its library; got none. pip install "
        "'fm_jax[text]'"
    )
