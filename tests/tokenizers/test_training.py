"""Tests of tokenizers that are trained here: what they learn, when they are found."""

import argparse
import inspect
import json
import re
import subprocess
import sys

import pytest

from fm_jax.tokenizers import training
from fm_jax.tokenizers.protocol import END
from tests.tokenizers.made import BPE, CORPUS, SPECIAL, refusal, trained

KINDS = pytest.mark.parametrize("kind", training.KINDS)


@pytest.mark.parametrize("vocab_size", [257, 258, 301])
def test_bpe_has_as_many_ids_as_were_asked_for(vocab_size):
    tokenizer = training.train_bpe(CORPUS, vocab_size=vocab_size)
    assert tokenizer.vocab_size == vocab_size
    assert tokenizer.byte_lengths.shape == (vocab_size,)
    (ids,) = tokenizer.encode_batch(["".join(CORPUS)])
    assert ids.max() < vocab_size


def test_a_small_corpus_gives_fewer_ids_and_never_more():
    tokenizer = training.train_bpe(["ab ab"], vocab_size=5000)
    assert 257 < tokenizer.vocab_size < 270


def test_bpe_learns_words_with_their_space_and_runs_of_spaces_as_one_id():
    for piece in [" the", " cat", "   "]:
        (ids,) = BPE.encode_batch([piece])
        assert len(ids) == 1, piece
    (ids,) = BPE.encode_batch(["\n    on"])
    assert [BPE.decode([i]) for i in ids] == ["\n", "   ", " on"]


def test_bpe_below_the_bytes_and_the_end_is_refused():
    assert refusal(training.train_bpe, CORPUS, vocab_size=256) == (
        "data.vocab_size must be >= 257 for BPE; got 256."
    )


# Kinds and options; that any text survives each is in test_protocol.py.


@KINDS
def test_the_defaults_are_those_of_a_bpe_that_is_there(kind):
    options = {"special_tokens": (), "digits": "triples", "whitespace": "runs"}
    assert trained(kind, **options).to_json() == trained(kind).to_json()
    assert trained("bpe").to_json() == BPE.to_json()


@KINDS
@pytest.mark.parametrize("vocab_size", [259, 277])
def test_special_tokens_take_the_first_ids(kind, vocab_size):
    tokenizer = trained(kind, vocab_size, special_tokens=SPECIAL)
    assert 259 <= tokenizer.vocab_size <= vocab_size
    assert tokenizer.special_ids == (0, 1, 2)
    assert tokenizer.end_id == 0
    spec = json.loads(tokenizer.to_json())
    assert [t["content"] for t in spec["added_tokens"]] == [END, *SPECIAL]
    assert all(t["special"] for t in spec["added_tokens"])


def longest(pattern, kind, **options):
    """Return the longest run of a pattern in any piece of a tokenizer of code."""
    tokenizer = training.train(CODE, kind=kind, vocab_size=700, **options)
    pieces = [tokenizer.decode([index]) for index in range(tokenizer.vocab_size)]
    return max(len(run) for piece in pieces for run in re.findall(pattern, piece))


CODE = [inspect.getsource(module) for module in (argparse, inspect)]
CODE += ["777777 x777777 7777777 x77777777 777 x777 77777 "] * 99


@KINDS
def test_pieces_have_as_many_digits_as_the_options_ask(kind):
    assert longest(r"\d*", kind) in (2, 3)
    assert longest(r"\d*", kind, digits="single") == 1
    assert longest(r"\d*", kind, digits="keep") > 3


@KINDS
def test_pieces_have_as_many_spaces_as_the_options_ask(kind):
    assert longest(r"[ \t]*", kind) > 3
    assert longest(r"[ \t]*", kind, whitespace="single") == 1
    for options in ({}, {"whitespace": "single"}):
        assert longest(r"(?<= )[a-z]+", kind, **options) > 3


def test_unigram_keeps_the_likeliest_pieces():
    tokenizer = training.train(CODE, kind="unigram", vocab_size=700)
    (ids,) = tokenizer.encode_batch(["        return self.parser"])
    pieces = [tokenizer.decode([index]) for index in ids]
    assert pieces[:2] == ["       ", " return"]
    # What text has not is less likely than all that it has, by the same for each byte.
    scores = dict(json.loads(tokenizer.to_json())["model"]["vocab"][1:])
    rare = {scores[letter] for letter in "\u0101\u0102\u00ff"}
    assert len(rare) == 1
    assert min(scores[letter] for letter in "abtions") > max(rare) + 5


@KINDS
def test_training_is_deterministic(kind):
    again = training.train(iter(CORPUS), kind=kind, vocab_size=300)
    assert again.to_json() == trained(kind).to_json()


@KINDS
@pytest.mark.parametrize("texts", [["a"], ["ab ab"], ["\u4f60\u597d"] * 3])
def test_text_too_small_for_the_vocabulary_gives_fewer_ids(kind, texts):
    tokenizer = training.train(texts, kind=kind, vocab_size=1000)
    assert 257 <= tokenizer.vocab_size < 270
    for text in [*texts, "zebra \u00e9"]:
        (ids,) = tokenizer.encode_batch([text])
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"kind": "bep"},
            "kind of tokenizer must be one of the known names; got 'bep'. Did you mean "
            "'bpe'? Known: bpe, unigram",
        ),
        (
            {"digits": "tripels"},
            "digits of a tokenizer must be one of the known names; got 'tripels'. Did "
            "you mean 'triples'? Known: triples, keep, single",
        ),
        (
            {"whitespace": "run"},
            "whitespace of a tokenizer must be one of the known names; got 'run'. Did "
            "you mean 'runs'? Known: runs, single",
        ),
        (
            {"vocab_size": 258, "special_tokens": SPECIAL, "kind": "unigram"},
            "data.vocab_size must be >= 259 for unigram with 2 special tokens; got "
            "258.",
        ),
        (
            {"special_tokens": ("<|a|>", "<|a|>")},
            "special tokens must be distinct; got '<|a|>' twice.",
        ),
        (
            {"special_tokens": (END,)},
            "special tokens must be distinct; got '<|endoftext|>' twice.",
        ),
        (
            {"special_tokens": ("EOT",)},
            "special tokens must have signs around letters, for else text may spell "
            "them; got 'EOT'. Try '<|EOT|>'.",
        ),
        (
            {"special_tokens": ("",)},
            "special tokens must have signs around letters, for else text may spell "
            "them; got ''. Try '<||>'.",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(options, message):
    options = {"kind": "bpe", "vocab_size": 300} | options
    assert refusal(training.train, CORPUS, **options) == message


# The cache.


def test_bpe_is_trained_once_and_then_found(tmp_path):
    calls, said = [], []

    def documents():
        calls.append(1)
        return CORPUS

    def find(vocab_size=300, **identity):
        return training.find_or_train_bpe(
            tmp_path,
            documents,
            vocab_size=vocab_size,
            identity={"files": "a"} | identity,
            say=said.append,
        )

    first = find()
    assert first.to_json() == training.train_bpe(CORPUS, vocab_size=300).to_json()
    assert find().fingerprint == first.fingerprint
    assert len(calls) == 1
    assert said == ["Training a BPE tokenizer of 300 ids on the train text"]
    find(vocab_size=301)
    find(files="b")
    assert len(calls) == 3
    files = [path.name for path in (tmp_path / "tokenizers").glob("*.json")]
    assert len(files) == 3
    assert all(name.startswith("bpe-30") for name in files)


def test_a_cache_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "cache").write_text("a file where a folder should be")
    text = refusal(
        training.find_or_train_bpe,
        tmp_path / "cache",
        lambda: CORPUS,
        vocab_size=257,
        identity={},
        say=lambda line: None,
    )
    assert text.startswith(
        "data.cache_dir must be writable and have room; got "
        f"{tmp_path}/cache/tokenizers/bpe-257-"
    )
    assert text.endswith(".json (Not a directory).")


# Reads its documents, once it has said so, for as long as the other has not asked.
TRAINER = """
import pathlib, sys, time
from fm_jax.tokenizers import training
name, cache = sys.argv[1], pathlib.Path(sys.argv[2])
def documents():
    print("reads", flush=True)
    while not (cache / "asked").exists():
        time.sleep(0.01)
    time.sleep(0.3)
    return [f"{name} " * 50]
if name == "second":
    (cache / "asked").touch()
found = training.find_or_train_bpe(
    cache, documents, vocab_size=262, identity={}, say=print
)
print(repr(found.decode([261])))
"""


def test_of_two_processes_one_trains_and_the_other_finds(tmp_path):
    def start(name):
        command = [sys.executable, "-c", TRAINER, name, str(tmp_path)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    with start("first") as first:
        said = [first.stdout.readline(), first.stdout.readline()]
        with start("second") as second:
            found, _ = second.communicate(timeout=60)
        said += first.communicate(timeout=60)[0].splitlines(keepends=True)
    whole = training.train_bpe(["first " * 50], vocab_size=262).decode([261])
    assert "irst" in whole
    line = "Training a BPE tokenizer of 262 ids on the train text\n"
    assert sorted(said) == sorted([line, "reads\n", f"{whole!r}\n"])
    assert found == f"{whole!r}\n"


def test_a_bpe_that_may_not_be_trained_is_refused_and_nothing_is_made(tmp_path):
    def find(may_build):
        return training.find_or_train_bpe(
            tmp_path / "cache",
            lambda: CORPUS,
            vocab_size=300,
            identity={},
            say=said.append,
            may_build=may_build,
        )

    said = []
    text = refusal(find, False)
    assert text.startswith(f"{tmp_path}/cache/tokenizers/bpe-300-")
    assert text.endswith(".json must be prepared; got nothing there. fm train does.")
    assert list(tmp_path.iterdir()) == []
    assert said == []
    assert find(True).fingerprint == find(False).fingerprint == BPE.fingerprint
    assert len(said) == 1


@pytest.mark.parametrize("kind", training.KINDS)
def test_no_text_teaches_nothing(kind):
    assert refusal(training.train, iter(()), kind=kind, vocab_size=300) == (
        "a tokenizer must have text to learn from; got none. Check data.paths and "
        "data.eval_fraction."
    )
