"""Tests of special tokens that text spells out, for every kind of tokenizer."""

import pytest
import tokenizers as library
from tokenizers import processors

from fm_jax.tokenizers import load, special
from fm_jax.tokenizers.plain import SymbolTokenizer
from fm_jax.tokenizers.protocol import END
from fm_jax.tokenizers.sentence import SentencePieceTokenizer
from tests.tokenizers import made
from tests.tokenizers.made import refusal


@pytest.mark.parametrize("name", made.EXACT)
def test_a_spelt_end_is_the_end_id_and_other_text_is_as_ever(name):
    tokenizer = made.EXACT[name]
    encode, token = special.special_encoder(tokenizer), special.end_token(tokenizer)
    one, two = (ids.tolist() for ids in tokenizer.encode_batch(["the cat", " sat"]))
    end = tokenizer.end_id
    assert encode("the cat") == one
    assert encode(f"the cat{token} sat{token}{token}") == [*one, end, *two, end, end]
    assert encode("") == []
    # In documents it stays text.
    assert end not in tokenizer.encode_batch([f"the cat{token}"])[0]


def test_texts_together_have_the_ids_of_each():
    for tokenizer in made.EXACT.values():
        texts = [f"a{END}", "", "the cat", f"{END}{END}b"]
        encode = special.special_encoder(tokenizer)
        assert special.batch_encoder(tokenizer)(texts) == [encode(t) for t in texts]


def test_all_special_tokens_of_ranks_and_of_a_sentence_model_are_known():
    assert special.special_encoder(made.RANKS)(f"<|im|>{END}") == [317, 0]
    assert {*special.tokens(made.RANKS)} == {END, "<|im|>"}
    pytest.importorskip("sentencepiece")
    tokenizer = SentencePieceTokenizer(made.sentence_model())
    (the,) = tokenizer.encode_batch(["the cat"])
    ids = special.special_encoder(tokenizer)("<s>the cat</s>")
    begin, end = (tokenizer._inner.piece_to_id(t) for t in ("<s>", "</s>"))
    assert ids == [begin, *the, end]
    assert special.special_encoder(tokenizer)(END) == [end]
    assert special.end_token(tokenizer) in ("</s>", END)


def test_an_end_token_that_its_file_calls_a_word_ends_a_text_too():
    vocab = {"[UNK]": 0, "the": 1, "cat": 2, "</s>": 3}
    inner = library.Tokenizer(library.models.WordLevel(vocab, unk_token="[UNK]"))
    inner.pre_tokenizer = library.pre_tokenizers.Whitespace()
    tokenizer = load.JsonTokenizer(inner.to_str(), end_token="</s>")
    assert special.special_encoder(tokenizer)("the cat</s>the") == [1, 2, 3, 1]


def test_what_stands_before_a_text_is_what_the_file_puts_there_else_the_end():
    assert special.begin_ids(made.BYTES) == (256,)
    assert special.begin_token(made.BYTES) == END
    assert special.begin_ids(made.BPE) == (made.BPE.end_id,)
    inner = library.Tokenizer.from_str(made.BPE.to_json())
    inner.add_special_tokens(["<s>", "<t>"])
    first, second = (inner.token_to_id(token) for token in ("<s>", "<t>"))
    inner.post_processor = processors.TemplateProcessing(
        single="<s> <t> $A <s>", special_tokens=[("<s>", first), ("<t>", second)]
    )
    tokenizer = load.JsonTokenizer(inner.to_str(), end_token=END)
    assert special.begin_ids(tokenizer) == (first, second)
    assert special.begin_token(tokenizer) == "<s><t>"
    encode = special.special_encoder(tokenizer)
    (the,) = tokenizer.encode_batch(["the cat"])
    assert encode("<s><t>the cat") == [first, second, *the]
    assert encode("the cat", add_special_tokens=True) == [first, second, *the, first]


def test_text_that_a_tokenizer_does_not_take_is_refused():
    symbols = SymbolTokenizer(5)
    assert special.special_encoder(symbols)(END) == [5]
    assert "text must be of the 5 symbols" in refusal(
        special.special_encoder(symbols), f"User:{END}"
    )
    for tokenizer in (made.BPE, made.BYTES):
        said = refusal(special.special_encoder(tokenizer), "a\ud800")
        assert "text must be Unicode" in said
