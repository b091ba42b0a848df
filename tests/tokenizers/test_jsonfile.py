"""Tests of tokenizer.json files: their end, their bytes, their special tokens."""

import json

import numpy as np
import pytest
import tokenizers as library
from tokenizers import decoders, models, normalizers, pre_tokenizers

from fm_jax.tokenizers import jsonfile
from fm_jax.tokenizers.jsonfile import JsonTokenizer
from tests.tokenizers import made
from tests.tokenizers.made import (
    BPE,
    ENGLISH,
    byte_fallback,
    load,
    refusal,
    unigram,
    word_piece,
)

# The end.


def test_a_word_piece_file_loads_with_its_known_end(tmp_path):
    tokenizer = load(tmp_path, word_piece())
    assert (tokenizer.vocab_size, tokenizer.end_id) == (10, 1)
    (ids,) = tokenizer.encode_batch(["The CATS  sat."])
    assert ids.tolist() == [2, 3, 4, 5, 9]
    assert tokenizer.decode(ids) == "the cats sat."
    assert tokenizer.decode_bytes(ids) == b"the cats sat."


def test_end_token_chooses_among_the_tokens_of_a_file(tmp_path):
    text = word_piece(end="<fin>")
    assert load(tmp_path, text, end_token="<fin>").end_id == 1
    assert refusal(load, tmp_path, text) == (
        "data.end_token must name the tokenizer's end-of-document token; got '', and "
        "none of <|endoftext|>, </s>, <|end_of_text|>, <eos>, [SEP] is in its "
        "vocabulary."
    )


def test_an_end_id_chooses_as_its_token_does(tmp_path):
    text = word_piece(end="<fin>")
    tokenizer = load(tmp_path, text, end_id=1)
    assert tokenizer.fingerprint == load(tmp_path, text, end_token="<fin>").fingerprint
    assert load(tmp_path, word_piece(), end_id=77).end_id == 1  # which no token has


def test_an_end_token_that_is_not_in_the_vocabulary_is_refused(tmp_path):
    assert refusal(load, tmp_path, word_piece(), end_token="<stop>").startswith(
        "data.end_token must name the tokenizer's end-of-document token; got '<stop>'"
    )


def test_an_end_token_that_text_is_full_of_is_refused(tmp_path):
    tokenizer = load(tmp_path, unigram(), end_token=".")
    assert refusal(tokenizer.encode_batch, ["the cat."]) == (
        "data.end_token must be a token that no text encodes to; got '.', which the "
        "text has."
    )


# Special tokens.


@pytest.mark.parametrize("make", [word_piece, unigram, byte_fallback])
def test_text_that_spells_another_files_end_token_does_not_become_it(make, tmp_path):
    tokenizer = load(tmp_path, make())
    texts = ["</s>", "the</s>cat </s> sat", "[SEP]", "the [SEP]cat[SEP][SEP]."]
    for ids in tokenizer.encode_batch(texts):
        assert not np.isin(ids, tokenizer.special_ids).any()


def test_a_spelt_end_token_keeps_its_letters_in_a_model_that_has_them(tmp_path):
    tokenizer = load(tmp_path, unigram())
    (ids,) = tokenizer.encode_batch(["the</s>cat"])
    assert tokenizer.decode(ids) == "the</s>cat"


def test_each_special_token_that_is_spelt_keeps_its_letters(tmp_path):
    # The second without its first letter is the first.
    tokenizer = load(tmp_path, unigram("<pad>", "x<pad>"))
    assert tokenizer.special_ids == (1, 2, 3)
    text = "x<pad>a<pad></s>the x<pad><pad>"
    (ids,) = tokenizer.encode_batch([text])
    assert tokenizer.decode(ids) == text
    assert not np.isin(ids, tokenizer.special_ids).any()


def test_a_special_token_of_one_letter_that_text_has_is_refused(tmp_path):
    tokenizer = load(tmp_path, unigram("\u00e6"))
    assert refusal(tokenizer.encode_batch, ["a\u00e6"]) == (
        "special token must be a token that no text encodes to; got '\u00e6', which "
        "the text has."
    )


def test_a_special_token_whose_letters_have_no_ids_is_refused(tmp_path):
    vocab = {"<end>": 0, "a": 1, "<": 2}
    inner = library.Tokenizer(models.WordLevel(vocab, unk_token="<end>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.add_special_tokens(["<end>"])
    tokenizer = load(tmp_path, inner.to_str(), end_token="<end>")
    assert refusal(tokenizer.encode_batch, ["b"]) == (
        "data.end_token must be a token that no text encodes to; got '<end>', which "
        "the text has."
    )


def test_special_ids_and_ids_without_a_token_stand_for_no_bytes(tmp_path):
    vocab = {"[UNK]": 0, "the": 1, "[SEP]": 6}
    inner = library.Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    inner.add_special_tokens(["[UNK]", "[SEP]"])
    tokenizer = load(tmp_path, inner.to_str())
    assert tokenizer.byte_lengths.tolist() == [0, 3, 0, 0, 0, 0, 0]


# What text has no id for.


@pytest.mark.parametrize(
    ("text", "stranger", "expected"),
    [(word_piece(), "zebra", [0]), (unigram(), "Z", [2, 0])],
)
def test_unknown_text_becomes_the_unknown_id(text, stranger, expected, tmp_path):
    tokenizer = load(tmp_path, text)
    assert tokenizer.unknown_id == 0
    assert tokenizer.unknown_id not in tokenizer.special_ids
    assert tokenizer.byte_lengths[0] == 0
    (ids,) = tokenizer.encode_batch([stranger])
    assert ids.tolist() == expected


def test_an_unknown_token_that_is_not_special_stands_for_no_bytes_either(tmp_path):
    vocab = {"<unk>": 0, "the": 1, "</s>": 2}
    inner = library.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer = load(tmp_path, inner.to_str())
    assert tokenizer.unknown_id == 0
    assert tokenizer.byte_lengths.tolist() == [0, 3, 0]


def test_a_model_without_an_unknown_token_has_no_unknown_id(tmp_path):
    inner = library.Tokenizer(models.WordLevel({"the": 0, "</s>": 1}, unk_token=""))
    assert load(tmp_path, inner.to_str()).unknown_id == -1


# Bytes.


def test_a_unigram_file_loads_with_its_known_end(tmp_path):
    tokenizer = load(tmp_path, unigram())
    assert tokenizer.end_id == 1
    (ids,) = tokenizer.encode_batch(["the cat"])
    assert tokenizer.decode(ids) == "the cat"
    # Its own mark of the word's start is a space, and the first one is not text.
    assert tokenizer.byte_lengths[ids].tolist() == [4, 4]


def test_a_byte_fallback_file_counts_one_byte_for_each_of_its_byte_ids(tmp_path):
    tokenizer = load(tmp_path, byte_fallback())
    assert tokenizer.end_id == 2
    (ids,) = tokenizer.encode_batch(["the \u00e9\n"])
    assert tokenizer.decode(ids) == "the \u00e9\n"
    assert tokenizer.byte_lengths[ids].tolist() == [4, 1, 1, 1, 1]


def test_a_token_that_is_found_before_the_model_stands_for_its_own_text(tmp_path):
    inner = library.Tokenizer.from_str(BPE.to_json())
    # Each letter of it is a byte elsewhere, but here it is itself.
    inner.add_tokens(["\u00e9\u0120", "    "])
    tokenizer = load(tmp_path, inner.to_str())
    assert tokenizer.is_exact
    text = "a\u00e9\u0120    b"
    (ids,) = tokenizer.encode_batch([text])
    assert {300, 301} <= set(ids.tolist())
    assert tokenizer.byte_lengths[[300, 301]].tolist() == [4, 4]
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()


# Exactness.


def test_a_byte_level_file_of_the_library_is_exact(tmp_path):
    inner = library.Tokenizer.from_str(BPE.to_json())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = None
    tokenizer = load(tmp_path, inner.to_str())
    assert tokenizer.is_exact
    for text in made.TORTURE.values():
        assert tokenizer.decode(tokenizer.encode_batch([text])[0]) == text


def _with(**parts):
    spec = json.loads(BPE.to_json())
    for name, change in parts.items():
        spec[name] = spec[name] | change if spec[name] else change
    return json.dumps(spec)


def _split(**change):
    spec = json.loads(BPE.to_json())["pre_tokenizer"]
    spec["pretokenizers"][0] |= change
    return spec


def _strips():
    token = library.AddedToken("zz", lstrip=True, normalized=False)
    inner = library.Tokenizer.from_str(BPE.to_json())
    inner.add_tokens([token])
    return inner.to_str()


@pytest.mark.parametrize(
    "text",
    [
        word_piece(),
        unigram(),
        byte_fallback(),
        _with(normalizer={"type": "NFC"}),
        _with(pre_tokenizer=_split(behavior="Removed")),
        _with(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True,
                             "trim_offsets": True, "use_regex": True}),
        _strips(),
    ],
)  # fmt: skip
def test_a_file_that_adds_or_drops_text_is_not_exact(text, tmp_path):
    assert not load(tmp_path, text).is_exact


def test_a_file_without_an_id_for_each_byte_is_not_exact(tmp_path):
    spec = json.loads(BPE.to_json())
    del spec["model"]["vocab"]["~"]
    assert not load(tmp_path, json.dumps(spec)).is_exact


def test_what_a_normalizer_makes_of_text_is_what_comes_back(tmp_path):
    inner = library.Tokenizer.from_str(BPE.to_json())
    inner.normalizer = normalizers.NFC()
    inner.decoder = decoders.ByteLevel()
    tokenizer = load(tmp_path, inner.to_str())
    (ids,) = tokenizer.encode_batch(["e\u0301"])
    assert tokenizer.decode(ids) == "\u00e9"
    assert tokenizer.decode_bytes(ids) == b"\xc3\xa9"


# Long texts.


@pytest.mark.parametrize("name", ["bpe", "unigram", "options"])
def test_a_long_text_is_encoded_in_parts_with_the_same_ids(name, monkeypatch):
    tokenizer = made.EXACT[name]
    # As before a large batch has shown whether something is faster.
    monkeypatch.setattr(tokenizer, "_encoder", lambda texts, size: None)
    texts = ["the cat\nsat " * 99, "", "x\n".join(made.CORPUS), "the\n" * 9]
    whole = tokenizer.encode_batch(texts)
    sizes = []
    inner = tokenizer._encode_whole

    def encode(some):
        sizes.extend(map(len, some))
        return inner(some)

    monkeypatch.setattr(jsonfile, "LONG", 200)
    monkeypatch.setattr(tokenizer, "_encode_whole", encode)
    for ids, expected in zip(tokenizer.encode_batch(texts), whole, strict=True):
        np.testing.assert_array_equal(ids, expected)
    assert len(sizes) > 20 and max(sizes) < 300


@pytest.mark.parametrize(
    "text", [word_piece(), unigram(), byte_fallback(), made.BPE.to_json()]
)
def test_a_long_text_whose_parts_may_not_be_its_own_is_encoded_whole(text, monkeypatch):
    spec = json.loads(text)
    if spec["normalizer"] is None:
        spec["normalizer"] = {"type": "Replace", "pattern": {"String": "\n"},
                              "content": " "}  # fmt: skip
    tokenizer = JsonTokenizer(json.dumps(spec))
    long = "the cat\nsat\n" * 99
    (whole,) = tokenizer.encode_batch([long])
    monkeypatch.setattr(jsonfile, "LONG", 200)
    np.testing.assert_array_equal(tokenizer.encode_batch([long])[0], whole)


# What a file turns on and a corpus has no use for.


def test_truncation_and_padding_in_a_file_are_turned_off(tmp_path):
    inner = library.Tokenizer.from_str(BPE.to_json())
    inner.enable_truncation(max_length=3)
    inner.enable_padding(length=50)
    tokenizer = load(tmp_path, inner.to_str())
    for ids, whole in zip(
        tokenizer.encode_batch([ENGLISH, ""]),
        BPE.encode_batch([ENGLISH, ""]),
        strict=True,
    ):
        np.testing.assert_array_equal(ids, whole)


def test_dropout_in_a_file_is_turned_off():
    tokenizer = JsonTokenizer(_with(model={"dropout": 1.0}))
    (ids,), (whole,) = (t.encode_batch([ENGLISH]) for t in (tokenizer, BPE))
    np.testing.assert_array_equal(ids, whole)
    assert len(whole) < len(ENGLISH)
