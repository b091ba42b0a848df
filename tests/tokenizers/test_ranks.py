"""Tests of tiktoken encodings, against tiktoken's own ids."""

import json

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from tiktoken_ext import openai_public

from fm_jax.tokenizers import fast, load, ranks, splits
from fm_jax.tokenizers.protocol import END
from fm_jax.tokenizers.ranks import KNOWN, RanksTokenizer
from tests.tokenizers import made
from tests.tokenizers.made import BPE, TORTURE, refusal

FOUND = made.ranks_of(BPE)
DESCRIBED = {"pattern": splits.O200K, "special_tokens": {END: 0, "<|im|>": 317}}


def write(folder, name, raw=None, beside=None):
    path = folder / name
    path.write_bytes(made.rank_lines(FOUND) if raw is None else raw)
    if beside is not None:
        path.with_suffix(".json").write_text(json.dumps(beside))
    return path


@pytest.mark.parametrize("name", KNOWN)
def test_what_is_known_of_an_encoding_is_what_tiktoken_says(name, monkeypatch):
    # Its constructors, without the ranks that they would fetch.
    for loader in ("data_gym_to_mergeable_bpe_ranks", "load_tiktoken_bpe"):
        monkeypatch.setattr(openai_public, loader, lambda *args, **kwargs: {})
    fields = openai_public.ENCODING_CONSTRUCTORS[name]()
    assert KNOWN[name] == (fields["pat_str"], fields["special_tokens"])


@pytest.fixture(scope="module")
def both():
    """Return one of ours and tiktoken's, for each of the known patterns."""
    return [
        (
            RanksTokenizer(FOUND, pattern=pattern, special_tokens={END: 0}),
            tiktoken.Encoding(
                name, pat_str=pattern, mergeable_ranks=FOUND, special_tokens={END: 0}
            ),
        )
        for name, (pattern, _) in KNOWN.items()
    ]


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(text=made.TEXT)
def test_ids_are_those_of_tiktoken(both, text):
    for tokenizer, own in both:
        (ids,) = tokenizer.encode_batch([text])
        assert ids.tolist() == own.encode_ordinary(text)


def test_a_file_is_known_by_its_name(tmp_path):
    raw = made.rank_lines(FOUND)
    path = write(tmp_path, "cl100k_base.tiktoken", raw)
    tokenizer = load.load(path)
    own = tiktoken.Encoding(
        "own", pat_str=KNOWN["cl100k_base"][0], mergeable_ranks=FOUND, special_tokens={}
    )
    assert (tokenizer.end_id, tokenizer.vocab_size) == (100257, 100277)
    assert len(tokenizer.special_ids) == 5
    for text in TORTURE.values():
        (ids,) = tokenizer.encode_batch([text])
        assert ids.tolist() == own.encode_ordinary(text)
        assert tokenizer.decode(ids) == text


def test_a_file_is_described_by_the_json_beside_it(tmp_path):
    # As Llama 3's ranks, which are in a file of this name.
    path = write(tmp_path, "tokenizer.model", beside=DESCRIBED)
    tokenizer = load.load(path)
    assert (tokenizer.end_id, tokenizer.special_ids) == (0, (0, 317))
    assert load.load(path, end_token="<|im|>").end_id == 317
    assert load.load(path, end_id=317).end_id == 317
    (ids,), (other,) = (
        t.encode_batch(["It's 1234\n\n  x"])
        for t in (tokenizer, RanksTokenizer(FOUND, **DESCRIBED))
    )
    np.testing.assert_array_equal(ids, other)
    assert tokenizer.fingerprint == RanksTokenizer(FOUND, **DESCRIBED).fingerprint


def test_an_encoding_is_kept_with_its_end_in_one_json(tmp_path):
    tokenizer = RanksTokenizer(FOUND, **DESCRIBED, end_token="<|im|>")
    loaded = made.load(tmp_path, tokenizer.to_json())
    assert (loaded.end_id, loaded.fingerprint) == (317, tokenizer.fingerprint)
    assert made.load(tmp_path, tokenizer.to_json(), end_token=END).end_id == 0
    assert made.load(tmp_path, tokenizer.to_json(), end_id=0).end_id == 0


@pytest.mark.parametrize("spaces", [300_001, 400_000])
@pytest.mark.parametrize("name", KNOWN)
def test_runs_of_spaces_of_any_length_survive_the_round_trip(name, spaces):
    pattern = KNOWN[name][0]
    tokenizer = RanksTokenizer(FOUND, pattern=pattern, special_tokens={END: 0})
    for text in (" " * spaces + "x", "a" + "\n\t" * (spaces // 2), " x" * 9999):
        (ids,) = tokenizer.encode_batch([text])
        assert tokenizer.decode(ids) == text


def test_a_run_of_spaces_is_cut_by_its_own_length_alone():
    run = " " * (2 * fast.LONG_RUN - 1)
    (one, other) = RanksTokenizer(FOUND, **DESCRIBED).encode_batch(
        [f"{run}x", f"a{run}x"]
    )
    first = RanksTokenizer(FOUND, **DESCRIBED).encode_batch(["a"])[0]
    assert other.tolist() == [*first, *one]


def test_a_pattern_that_leaves_text_out_is_refused():
    tokenizer = RanksTokenizer(FOUND, pattern=r"\p{L}+", special_tokens={END: 0})
    assert len(tokenizer.encode_batch(["the"])[0]) > 0
    assert refusal(tokenizer.encode_batch, ["the", "the cat"]) == (
        "the split pattern of a rank file must take every character; got "
        r"'\\p{L}+', which leaves some of 'the cat' out."
    )


def test_an_encoding_that_is_neither_known_nor_described_is_refused(tmp_path):
    path = write(tmp_path, "mine.tiktoken")
    start = (
        "rank file must be named after a known encoding (gpt2, r50k_base, p50k_base, "
        "cl100k_base, o200k_base) or have its split pattern beside it; got "
        f"{path}, and in mine.json "
    )
    end = ' Write {"pattern": "...", "special_tokens": {"<|endoftext|>": 50256}} there.'
    assert refusal(load.load, path) == f"{start}nothing there.{end}"
    write(tmp_path, "mine.tiktoken", beside={"model": 1})
    assert refusal(load.load, path) == f"{start}KeyError: 'pattern'.{end}"


def test_a_broken_line_is_refused_by_its_number(tmp_path):
    raw = b"IQ== 0\nIg==\n"
    path = write(tmp_path, "gpt2.tiktoken", raw)
    assert refusal(load.load, path) == (
        "rank file must have a token in base64 and its rank in each line; got b'Ig==' "
        f"in line 2 of {path}."
    )


def test_ranks_without_a_byte_are_refused():
    some = {
        token: rank for token, rank in FOUND.items() if token not in (b"a", b"\xff")
    }
    assert refusal(RanksTokenizer, some, **DESCRIBED) == (
        "rank file must have a rank for each of the 256 bytes; got none for 2 of them."
    )


def test_an_id_that_is_there_twice_is_refused():
    special = {END: 0, "<|im|>": 1}
    assert refusal(
        RanksTokenizer, FOUND, pattern=splits.GPT2, special_tokens=special
    ) == (
        "ranks and ids of special tokens must be distinct and at least 0; got 301 of "
        "which 300 are distinct, from 0 on."
    )


def test_a_pattern_that_is_none_is_refused(tmp_path):
    path = write(tmp_path, "m.tiktoken", beside=DESCRIBED | {"pattern": "(a"})
    message = refusal(load.load, path)
    assert message.startswith(
        "tokenizer file must be a tokenizer.json, a SentencePiece .model or a "
        f".tiktoken file; got '{path}' ("
    )
    assert "\n" not in message


def test_an_end_that_is_not_special_is_refused():
    assert refusal(RanksTokenizer, FOUND, **DESCRIBED, end_token="the").endswith(
        "got 'the', and none of <|endoftext|>, </s>, <|end_of_text|>, <eos>, [SEP] is "
        "in its special tokens."
    )
    assert ranks.LINE.match(made.rank_lines(FOUND))
