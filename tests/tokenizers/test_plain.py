"""Tests of tokenizers that learn nothing: bytes, and symbols of a synthetic source."""

import numpy as np
import pytest

from fm_jax.corpora import synthetic
from fm_jax.tokenizers import plain
from tests.tokenizers import made
from tests.tokenizers.made import BYTES, refusal


def test_bytes_are_their_own_ids():
    (ids,) = BYTES.encode_batch(["aé\U0001f642"])
    assert ids.tolist() == [0x61, 0xC3, 0xA9, 0xF0, 0x9F, 0x99, 0x82]
    assert (BYTES.vocab_size, BYTES.end_id, BYTES.special_ids) == (257, 256, (256,))


def test_symbols_are_ids_and_come_back_as_they_were(tmp_path):
    tokenizer = plain.SymbolTokenizer(300)
    text = "".join(map(chr, synthetic.alphabet(300)))
    ids, empty = tokenizer.encode_batch([text, ""], num_threads=2)
    assert ids.dtype == np.uint32
    np.testing.assert_array_equal(ids, np.arange(300))
    assert len(empty) == 0
    assert tokenizer.is_exact
    assert tokenizer.decode([300, *ids, 300]) == text
    assert tokenizer.decode_bytes([300, *ids, 300]) == text.encode()
    assert (tokenizer.vocab_size, tokenizer.end_id) == (301, 300)
    lengths = [len(letter.encode()) for letter in text]
    assert set(lengths) == {1, 2}
    np.testing.assert_array_equal(tokenizer.byte_lengths, [*lengths, 0])
    again = made.load(tmp_path, tokenizer.to_json())
    assert again.fingerprint == tokenizer.fingerprint
    np.testing.assert_array_equal(again.encode_batch([text])[0], ids)
    assert plain.SymbolTokenizer(299).fingerprint != tokenizer.fingerprint


@pytest.mark.parametrize("stranger", [" ", "#", "\n", "\U0001f642", "\ud800"])
def test_a_character_that_is_no_symbol_is_refused(stranger):
    tokenizer = plain.SymbolTokenizer(2)
    text = f'!"{stranger}!'
    assert refusal(tokenizer.encode_batch, ['!"', text]) == (
        "text must be of the 2 symbols from '!' to '\"' alone; got "
        f"{stranger!r} in {text!r}."
    )
