"""Tests of what every tokenizer promises: round trips, bytes of ids, special ids."""

import numpy as np
import pytest
from hypothesis import given, settings

from fm_jax.tokenizers.protocol import END
from tests.tokenizers import made
from tests.tokenizers.made import BPE, BYTES, EXACT, TORTURE, refusal

EVERY = pytest.mark.parametrize("tokenizer", EXACT.values(), ids=EXACT)
SOME = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def keeps(tokenizer, text):
    """Assert that the ids of a text are all of it and nothing else."""
    (ids,) = tokenizer.encode_batch([text])
    assert ids.dtype == np.uint32
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.byte_lengths[ids].sum() == len(text.encode())
    assert not np.isin(ids, tokenizer.special_ids).any()
    return ids


@pytest.mark.parametrize("name", TORTURE)
@EVERY
def test_any_text_survives_the_round_trip(tokenizer, name):
    keeps(tokenizer, TORTURE[name])


@EVERY
@SOME
@given(text=made.TEXT)
def test_text_that_is_made_up_survives_the_round_trip(tokenizer, text):
    assert tokenizer.is_exact
    keeps(tokenizer, text)


@EVERY
@SOME
@given(text=made.TEXT)
def test_the_bytes_of_ids_are_those_of_each_id_one_after_another(tokenizer, text):
    (ids,) = tokenizer.encode_batch([text])
    parts = [tokenizer.decode_bytes([index]) for index in ids]
    assert b"".join(parts) == text.encode()
    assert [len(part) for part in parts] == tokenizer.byte_lengths[ids].tolist()


@EVERY
def test_every_letter_of_unicode_survives_the_round_trip(tokenizer):
    letters = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    keeps(tokenizer, "".join(letters[::7]))


@EVERY
def test_every_id_but_the_special_ones_stands_for_bytes(tokenizer):
    assert tokenizer.byte_lengths.shape == (tokenizer.vocab_size,)
    assert tokenizer.end_id in tokenizer.special_ids
    bare = np.flatnonzero(tokenizer.byte_lengths == 0)
    gap = range(300, 317) if tokenizer is made.RANKS else ()
    assert bare.tolist() == sorted({*tokenizer.special_ids, *gap})
    assert tokenizer.unknown_id == -1


@EVERY
def test_text_that_spells_a_special_token_does_not_become_it(tokenizer):
    spelt = [*TORTURE.values(), END, *made.SPECIAL, f"a{END}{END} {made.SPECIAL}"]
    for ids in tokenizer.encode_batch(spelt):
        assert not np.isin(ids, tokenizer.special_ids).any()


@EVERY
def test_decode_leaves_out_special_ids_and_replaces_broken_bytes(tokenizer):
    end = tokenizer.end_id
    ids, half = tokenizer.encode_batch(["aé", "\u00e9"])
    assert tokenizer.decode([end, *ids, end]) == "aé"
    assert tokenizer.decode_bytes([end, *ids, end]) == b"a\xc3\xa9"
    assert tokenizer.decode(half[:1]) == "\ufffd"
    assert tokenizer.decode_bytes(half[:1]) == b"\xc3"
    assert tokenizer.decode([*ids, tokenizer.vocab_size + 5]) == "aé"


@EVERY
def test_a_batch_encodes_as_its_texts_one_by_one(tokenizer):
    texts = list(TORTURE.values())
    alone = [tokenizer.encode_batch([text])[0] for text in texts]
    for threads in (0, 1, 3):
        rows = tokenizer.encode_batch(texts, num_threads=threads)
        for ids, other in zip(rows, alone, strict=True):
            np.testing.assert_array_equal(ids, other)
    assert tokenizer.encode_batch([]) == []


@EVERY
def test_a_saved_tokenizer_loads_as_itself(tokenizer, tmp_path):
    loaded = made.load(tmp_path, tokenizer.to_json())
    texts = list(TORTURE.values())
    for one, two in zip(
        tokenizer.encode_batch(texts), loaded.encode_batch(texts), strict=True
    ):
        np.testing.assert_array_equal(one, two)
    assert loaded.fingerprint == tokenizer.fingerprint
    for field in ("end_id", "unknown_id", "special_ids", "is_exact", "vocab_size"):
        assert getattr(loaded, field) == getattr(tokenizer, field), field
    np.testing.assert_array_equal(loaded.byte_lengths, tokenizer.byte_lengths)


@EVERY
def test_half_of_a_surrogate_pair_is_refused(tokenizer):
    assert refusal(tokenizer.encode_batch, ["the", "aé\udcff b"]) == (
        r"text must be Unicode; got '\udcff' at character 2, half of a surrogate pair "
        "or a byte that is not UTF-8."
    )


def test_fingerprints_differ_with_anything_that_decides_the_ids(tmp_path):
    two_ends = made.unigram("[SEP]")
    model = made.sentence_model(control_symbols=["<fin>"])
    (tmp_path / "a.model").write_bytes(model)
    found = [
        BYTES,
        BPE,
        *(EXACT[name] for name in ("unigram", "options", "ranks")),
        made.trained(vocab_size=301),
        made.trained(digits="keep"),
        made.load(tmp_path, made.unigram()),
        made.load(tmp_path, two_ends, end_token="[SEP]"),
        made.load(tmp_path, two_ends, end_token="</s>"),
        made.loading.load(tmp_path / "a.model"),
        made.loading.load(tmp_path / "a.model", end_token="<fin>"),
    ]
    assert len({tokenizer.fingerprint for tokenizer in found}) == len(found)


def test_the_fingerprints_of_stores_that_are_there_stay(tmp_path):
    # Of the bytes, of symbols and of a file whose text is given.
    assert BYTES.fingerprint == "1142943ff3e68463"
    assert made.plain.SymbolTokenizer(5).fingerprint == "3981ab5a52533671"
    assert made.load(tmp_path, GOLDEN_FILE).fingerprint == "fbdd69976f52b2ff"


GOLDEN_FILE = """{"version": "1.0", "truncation": null, "padding": null,
 "added_tokens": [{"id": 1, "content": "</s>", "single_word": false, "lstrip": false,
 "rstrip": false, "normalized": false, "special": true}], "normalizer": null,
 "pre_tokenizer": null, "post_processor": null, "decoder": null,
 "model": {"type": "WordLevel", "vocab": {"a": 0, "</s>": 1}, "unk_token": "a"}}"""
