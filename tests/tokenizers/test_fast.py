"""Tests of the faster encoder: when it is taken, and that its ids are the library's."""

import copy
import json
import threading

import numpy as np
import pytest
import tokenizers as library
from hypothesis import given, settings
from tokenizers import models

from fm_jax.tokenizers import fast, jsonfile, splits
from fm_jax.tokenizers.jsonfile import JsonTokenizer
from tests.tokenizers import made
from tests.tokenizers.made import BPE, CORPUS, TORTURE

SPEC = json.loads(BPE.to_json())
LETTERS = {byte: letter for letter, byte in splits.byte_letters().items()}


def with_pattern(pattern, spec=SPEC):
    """Return a spec with another split: its merges are as good there."""
    spec = copy.deepcopy(spec)
    spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = pattern
    return spec


def by_library(spec, texts):
    inner = library.Tokenizer.from_str(json.dumps(spec))
    inner.encode_special_tokens = True
    return [inner.encode(text, add_special_tokens=False).ids for text in texts]


def agree(encoder, spec, texts):
    """Assert that texts have one encoding, each of which the encoder takes."""
    assert all(map(encoder.takes, texts))
    found = [ids.tolist() for ids in encoder.encode_batch(texts)]
    assert found == by_library(spec, texts)


def byte_level(merges, **model):
    """Return a spec of bytes, and of what these pairs make; ids in order of pairs."""
    vocab = {LETTERS[byte]: byte for byte in range(256)}
    for pair in merges:
        vocab.setdefault("".join(pair), len(vocab))
    inner = library.Tokenizer(models.BPE(vocab, merges, **model))
    inner.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    return json.loads(inner.to_str())


# The ids are those of the library.


@pytest.fixture(scope="module")
def encoders():
    specs = {pattern: with_pattern(pattern) for pattern in splits.KNOWN}
    return {pattern: (fast.find(spec), spec) for pattern, spec in specs.items()}


@pytest.mark.parametrize("pattern", sorted(splits.KNOWN))
def test_the_two_engines_see_the_same_classes_of_all_characters(pattern):
    assert fast._strangers(pattern) == ""


@pytest.mark.parametrize("pattern", sorted(splits.KNOWN))
def test_ids_are_those_of_the_library_on_hard_texts(encoders, pattern):
    agree(*encoders[pattern], [*TORTURE.values(), *CORPUS, "ab" * 999])


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(text=made.TEXT)
def test_ids_are_those_of_the_library_on_any_text(encoders, text):
    for encoder, spec in encoders.values():
        agree(encoder, spec, [text])


@pytest.mark.parametrize("pattern", sorted(splits.KNOWN))
def test_ids_are_those_of_the_library_around_every_kind_of_character(encoders, pattern):
    points = [c for c in range(0x20000) if not 0xD800 <= c < 0xE000]
    some = np.random.default_rng(1).permutation(points)[:9999]
    texts = ["a{0} {0}1{0}{0}'{0}\n{0}s  {0}".format(chr(point)) for point in some]
    agree(*encoders[pattern], ["".join(texts)])


def test_ids_are_those_of_the_library_of_much_text_and_a_larger_vocabulary():
    import argparse
    import inspect

    texts = [inspect.getsource(module) for module in (argparse, inspect, json)]
    spec = json.loads(made.training.train_bpe(texts, vocab_size=2000).to_json())
    encoder = fast.find(spec)
    agree(encoder, spec, [*texts, texts[0][::-1], "".join(sorted(texts[0])).strip()])


def test_a_file_without_listed_defaults_is_read_as_the_library_reads_it():
    spec = byte_level([("a", "b")])
    assert spec["pre_tokenizer"].pop("use_regex") is True
    text = json.dumps(spec | {"added_tokens": [
        {"id": 257, "content": "</s>", "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False, "special": True}]})  # fmt: skip
    assert fast.find(JsonTokenizer(text)._spec()) is not None


def test_a_token_of_several_pairs_merges_by_the_one_that_comes_about():
    # As files made of tiktoken's ranks list them: Llama 3's, with ignore_merges.
    merges = [("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc"), ("abc", "abc")]
    spec = byte_level(merges, ignore_merges=True)
    texts = ["abc", "ab bc abcabc", "aabcabcc", "abcabcabc bcabca"]
    agree(fast.find(spec), spec, texts)


def test_lists_of_pairs_that_are_taken_give_the_ids_of_the_library():
    rng, taken, left = np.random.default_rng(2), 0, 0
    words = ["".join(rng.choice(["a", "b"], size)) for size in (2, 3, 5, 7, 9, 13, 40)]
    words += ["".join(rng.choice(["a", "b", "c"], 9)) for _ in range(50)]
    for _ in range(150):
        tokens, pairs = ["a", "b", "c"], []
        for _ in range(rng.integers(4, 12)):
            pair = tuple(rng.choice(tokens, 2))
            if len("".join(pair)) < 9 and pair not in pairs:
                pairs.append(pair)
                tokens.append("".join(pair))
        spec = byte_level(pairs)
        encoder = fast.find(spec)
        if encoder:
            agree(encoder, spec, words)
        taken, left = taken + bool(encoder), left + (not encoder)
    assert taken > 20 and left > 20


# It is taken only where that is proven.


def test_pairs_out_of_the_order_of_ids_are_not_taken():
    spec = byte_level([("a", "b"), ("b", "c")])
    assert fast.find(spec) is not None
    spec["model"]["merges"].reverse()
    assert fast.find(spec) is None
    # And the two would differ: one by its list, one by its ids.
    encoder = fast.Encoder(splits.GPT2, made_ranks(spec))
    assert [ids.tolist() for ids in encoder.encode_batch(["abc"])] == [[256, ord("c")]]
    assert by_library(spec, ["abc"]) == [[ord("a"), 257]]


def test_a_token_that_does_not_come_about_by_itself_is_not_taken():
    spec = byte_level([("b", "c"), ("a", "b"), ("ab", "c")])
    assert fast.find(spec) is None
    encoder = fast.Encoder(splits.GPT2, made_ranks(spec))
    assert [ids.tolist() for ids in encoder.encode_batch(["abc"])] == [[258]]
    assert by_library(spec, ["abc"]) == [[ord("a"), 256]]
    # Nor where the library finds it whole: within another it does not come about.
    assert fast.find(spec | {"model": spec["model"] | {"ignore_merges": True}}) is None


def made_ranks(spec):
    letters = splits.byte_letters()
    vocab = spec["model"]["vocab"].items()
    return {bytes(letters[one] for one in token): index for token, index in vocab}


def _drop_a_byte(spec):
    del spec["model"]["vocab"]["z"]


def _name_a_raw_token(spec):
    spec["model"]["vocab"]["a b"] = 300


def _merge_into_a_special_token(spec):
    index = spec["model"]["vocab"]["the"]
    spec["added_tokens"].append(
        spec["added_tokens"][0] | {"id": index, "content": "the"}
    )


def _add_a_token_that_text_has(spec):
    spec["added_tokens"].append(
        spec["added_tokens"][0] | {"id": 300, "content": "zz", "special": False}
    )


CHANGES = {
    "a normalizer": lambda s: s.update(normalizer={"type": "NFC"}),
    "no split": lambda s: s.update(pre_tokenizer=None),
    "an unknown split": lambda s: s.update(with_pattern(r"\p{L}+|\P{L}+")),
    "a split that drops": lambda s: split_of(s).update(behavior="Removed"),
    "a split turned round": lambda s: split_of(s).update(invert=True),
    "a space before": lambda s: bytes_of(s).update(add_prefix_space=True),
    "two splits": lambda s: bytes_of(s).update(use_regex=True),
    "dropout": lambda s: s["model"].update(dropout=0.5),
    "a prefix": lambda s: s["model"].update(continuing_subword_prefix="##"),
    "a suffix": lambda s: s["model"].update(end_of_word_suffix="</w>"),
    "a byte without an id": _drop_a_byte,
    "a token that is not of bytes": _name_a_raw_token,
    "a special token that text makes": _merge_into_a_special_token,
    "a token that is found before": _add_a_token_that_text_has,
}


def split_of(spec):
    return spec["pre_tokenizer"]["pretokenizers"][0]


def bytes_of(spec):
    return spec["pre_tokenizer"]["pretokenizers"][1]


@pytest.mark.parametrize("name", CHANGES)
def test_a_file_with_more_to_it_is_not_taken(name):
    spec = copy.deepcopy(SPEC)
    assert fast.find(spec) is not None
    CHANGES[name](spec)
    assert fast.find(spec) is None


@pytest.mark.parametrize(
    "text",
    [made.word_piece(), made.unigram(), made.byte_fallback(),
     made.EXACT["unigram"].to_json()],
)  # fmt: skip
def test_other_models_are_not_taken(text):
    assert fast.find(json.loads(text)) is None


def test_characters_of_other_classes_are_found_and_their_texts_not_taken(monkeypatch):
    def older(one, every, find=fast._of_class_by_rust):
        # An engine that does not know some letters yet, and one digit as a letter.
        found = find(one, every).replace("\u01c5", "").replace("\U00031350", "")
        return found + "\u0663" if one == r"\p{L}" else found

    monkeypatch.setattr(fast, "_of_class_by_rust", older)
    fast._disputed.cache_clear()
    try:
        assert fast._strangers(splits.PIECES) == "\u01c5\u0663\U00031350"
        encoder = fast.find(SPEC)
    finally:
        fast._disputed.cache_clear()
    assert encoder.takes("abc \u01c4 1")
    assert not any(encoder.takes(f"abc {c} 1") for c in "\u01c5\u0663\U00031350")


@pytest.mark.parametrize("space", [" ", "\n", "\t \u3000\u2028\x85\r"])
def test_runs_of_spaces_are_long_from_twice_the_least_on_and_never_below(space):
    def run(length):
        return (space * length)[:length]

    for offset in (0, 1, 7, fast.LONG_RUN - 1, 2 * fast.LONG_RUN + 3):
        before = ("x" * 96 + space)[:97] * 700
        for after in ("", "x", "x" * fast.LONG_RUN):
            around = before[:offset], after
            assert fast.has_long_run(run(2 * fast.LONG_RUN - 1).join(around))
            assert not fast.has_long_run("x".join(around))
    assert not fast.has_long_run(f"{'x' * 5}{run(fast.LONG_RUN - 1)}x" * 3)


# How a tokenizer uses it.


@pytest.fixture
def spied(monkeypatch):
    """Return `tokenizer`, which takes batches of 1,000 bytes fast, and its `counts`."""
    monkeypatch.setattr(jsonfile, "FAST_FROM", 1000)
    tokenizer, counts = JsonTokenizer(BPE.to_json()), {"found": 0, "fast": 0, "slow": 0}

    def find(spec, inner=fast.find):
        counts["found"] += 1
        encoder = inner(spec)
        encoder.encode_batch = spy("fast", encoder.encode_batch)
        return encoder

    def spy(name, function):
        def call(texts, **options):
            counts[name] += len(texts)
            return function(texts, **options)

        return call

    monkeypatch.setattr(fast, "find", find)
    monkeypatch.setattr(tokenizer, "_encode", spy("slow", tokenizer._encode))
    return tokenizer, counts


def same(rows, texts):
    expected = by_library(SPEC, texts)
    assert [ids.tolist() for ids in rows] == expected


def test_it_is_looked_for_once_at_the_first_large_batch(spied):
    tokenizer, counts = spied
    same(tokenizer.encode_batch(["the cat"] * 9), ["the cat"] * 9)
    assert counts == {"found": 0, "fast": 0, "slow": 9}
    same(tokenizer.encode_batch(CORPUS), CORPUS)
    compared = counts["slow"] - 9
    assert counts == {"found": 1, "fast": compared + 40, "slow": compared + 9}
    same(tokenizer.encode_batch(["the cat"]), ["the cat"])
    assert counts == {"found": 1, "fast": compared + 41, "slow": compared + 9}


def test_threads_that_come_together_look_for_it_once(spied):
    tokenizer, counts = spied
    rows, gate = {}, threading.Barrier(4)

    def work(name):
        gate.wait()
        rows[name] = tokenizer.encode_batch(CORPUS, num_threads=2)

    threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts["found"] == 1
    for name in range(4):
        same(rows[name], CORPUS)


def test_texts_that_it_does_not_take_are_encoded_by_the_library_in_their_place(spied):
    tokenizer, counts = spied
    tokenizer.encode_batch(CORPUS)
    before = dict(counts)
    spaces = " " * 400_000 + "x"  # Rust's regex has no stack for these
    texts = ["the cat", spaces, "sat", spaces[1:], ""]
    same(tokenizer.encode_batch(texts), texts)
    assert counts["fast"] - before["fast"] == 3
    assert counts["slow"] - before["slow"] == 2


def test_all_tokens_in_a_text_are_compared_and_not_what_is_encoded(spied, monkeypatch):
    tokenizer, _ = spied
    lengths, inner = [], tokenizer._encode

    def encode(texts):
        lengths.extend(map(len, texts))
        return inner(texts)

    monkeypatch.setattr(jsonfile, "COMPARED", 11)
    monkeypatch.setattr(tokenizer, "_encode", encode)
    text = "".join(CORPUS)
    same(tokenizer.encode_batch(["the cat", text, text]), ["the cat", text, text])
    assert lengths == [11]


def test_an_encoder_with_other_ids_is_said_aloud_and_left(monkeypatch):
    monkeypatch.setattr(jsonfile, "FAST_FROM", 1000)
    wrong = {token: index for token, index in made.ranks_of(BPE).items() if index < 290}
    monkeypatch.setattr(fast, "find", lambda spec: fast.Encoder(splits.PIECES, wrong))
    tokenizer = JsonTokenizer(BPE.to_json())
    with pytest.warns(RuntimeWarning) as warned:
        rows = tokenizer.encode_batch(CORPUS)
    assert [str(one.message) for one in warned] == [
        "tiktoken gives other ids than the tokenizers library, which is used now, "
        "several times slower. Please report it, with the tokenizer.json."
    ]
    same(rows, CORPUS)
    same(tokenizer.encode_batch(CORPUS), CORPUS)  # without a word


def test_an_end_token_that_merges_make_is_kept_out_of_large_batches(monkeypatch):
    monkeypatch.setattr(jsonfile, "FAST_FROM", 1000)
    spec = byte_level([("q", "z"), ("b", "c")])
    tokenizer = JsonTokenizer(json.dumps(spec), end_token="qz")
    (ids,) = tokenizer.encode_batch(["aqz bc" * 999])
    assert tokenizer.end_id == 256 and 256 not in ids
    assert tokenizer.decode(ids) == "aqz bc" * 999
