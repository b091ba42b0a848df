"""Tests of text that a chain writes: its characters, how much of it, its identity."""

import json
import unicodedata

import numpy as np
import pytest

from fm_jax.corpora import sources, synthetic
from fm_jax.corpora.chains import KINDS
from fm_jax.corpora.documents import Reading
from fm_jax.tokenizers import plain
from tests.corpora.made import POLICY, met, read
from tests.corpora.made import make as make_source

FIELDS = {
    "kind": "markov",
    "num_symbols": 130,
    "num_states": 5,
    "num_components": 2,
    "concentration": 0.2,
    "zipf": 1.0,
    "mean_length": 13.0,
    "num_tokens": 3000,
    "num_eval_tokens": 700,
    "seed": 3,
}


def make(**fields):
    return synthetic.make(**FIELDS | fields)


@pytest.mark.parametrize("kind", KINDS)
def test_text_is_the_symbols_of_the_chain(kind):
    source = make(kind=kind)
    encode = plain.SymbolTokenizer(130).encode_batch
    texts = read(source, "eval")
    drawn = source.chain.sample("eval")
    for ids, symbols in zip(encode(texts), drawn, strict=False):
        np.testing.assert_array_equal(ids, symbols)


@pytest.mark.parametrize("kind", KINDS)
def test_more_tokens_are_the_same_text_and_more_of_it(kind):
    few, many = (read(make(kind=kind, num_tokens=count)) for count in (40, 30_000))
    assert many[: len(few)] == few
    assert len(many) > 1000


@pytest.mark.parametrize("split, wanted", [("train", 3000), ("eval", 700)])
def test_there_is_as_much_text_as_was_asked_for(split, wanted):
    texts = read(make(), split)
    tokens = sum(len(text) + 1 for text in texts)
    assert tokens - len(texts[-1]) - 1 < wanted <= tokens


def test_the_splits_are_of_one_chain_and_share_no_document():
    train, held = (set(read(make(mean_length=40.0), s)) for s in sources.SPLITS)
    assert train and held
    assert not train & {text for text in held if len(text) > 5}


def test_a_split_is_one_piece_of_about_its_bytes():
    for split in sources.SPLITS:
        [piece] = make(kind="hmm", num_symbols=20_000).pieces(split)
        size = len("".join(read(make(kind="hmm", num_symbols=20_000), split)).encode())
        assert 0.9 < piece.size / size < 1.2


def test_all_documents_are_a_splits_whatever_the_other_has():
    # Short ones are in both by chance, as often as the chain writes them.
    source = make(num_symbols=3, mean_length=2.0)
    assert not source.is_held_out_apart
    assert source.share("train") == source.share("eval") == (0.0, 1.0)
    assert set(read(source)) & set(read(source, "eval"))


def test_the_spec_makes_the_reader_from_json_and_places_count_documents():
    spec = json.loads(json.dumps(make().spec("train")))
    [piece] = make().pieces("train")
    reading = Reading(**POLICY)
    found = list(sources.open_reader(spec)(piece, reading))
    assert found == list(enumerate(read(make())))
    assert met(make())[0][2] == ("synthetic row 2", found[2][1])


def test_identity_changes_with_every_field_and_with_the_split():
    changes = {
        "kind": "hmm",
        "num_symbols": 131,
        "num_states": 6,
        "num_components": 3,
        "concentration": 0.3,
        "zipf": 1.1,
        "mean_length": 14.0,
        "num_tokens": 3001,
        "seed": 4,
    }
    assert changes.keys() == FIELDS.keys() - {"num_eval_tokens"}
    seen = [make().identity("train"), make().identity("eval")]
    seen += [make(**{key: new}).identity("train") for key, new in changes.items()]
    assert len({json.dumps(identity) for identity in seen}) == len(seen)
    assert make(num_eval_tokens=5).identity("train") == seen[0]


def test_a_config_names_the_source():
    source = make_source(source="synthetic", synthetic=FIELDS)
    assert source == make()


def test_symbols_are_the_first_printable_characters_but_spaces():
    letters = [chr(n) for n in synthetic.alphabet(900)]
    assert "".join(letters[:95]) == "".join(map(chr, range(0x21, 0x7F))) + "¡"
    assert all(c.isprintable() and not c.isspace() for c in letters)
    between = set(map(chr, range(0x21, ord(letters[-1])))) - set(letters)
    later = {c for c in between if c.isprintable()}  # than the Unicode that is kept
    assert all(unicodedata.ucd_3_2_0.category(c) == "Cn" for c in later)
