"""Tests of how text is split: what is a piece, and that nothing is left out."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies
from tokenizers import Regex, pre_tokenizers

from fm_jax.tokenizers import fast, splits
from tests.tokenizers import made

KNOWN = pytest.mark.parametrize("pattern", sorted(splits.KNOWN))


def pieces(text, pattern):
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return [piece for piece, _ in split.pre_tokenize_str(text)]


def test_the_split_of_tokenizers_that_are_there_stays():
    assert splits.PIECES == (
        r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\r?\n|[ \t]+(?!\S)|[ \t]+|\s"
    )


@pytest.mark.parametrize(
    ("digits", "expected"),
    [
        ("triples", ["a", " 123", "45"]),
        ("single", ["a", " 1", "2", "3", "4", "5"]),
        ("keep", ["a", " 12345"]),
    ],
)
@pytest.mark.parametrize("whitespace", splits.WHITESPACE)
def test_digits_are_kept_as_they_are_asked_for(digits, whitespace, expected):
    assert pieces("a 12345", splits.pattern(digits, whitespace)) == expected


@pytest.mark.parametrize(
    ("whitespace", "expected"),
    [
        ("runs", ["a", "\r\n", "   ", " b", "\t\t", "\n", "\n", " \t "]),
        ("single",
         ["a", "\r\n", " ", " ", " ", " b", "\t", "\t", "\n", "\n", " ", "\t", " "]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("digits", splits.DIGITS)
def test_whitespace_is_kept_as_it_is_asked_for(digits, whitespace, expected):
    text = "a\r\n    b\t\t\n\n \t "
    assert pieces(text, splits.pattern(digits, whitespace)) == expected


@KNOWN
def test_a_split_takes_every_character_wherever_it_stands(pattern):
    # tiktoken leaves out what a pattern does not take.
    points = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    text = "".join(map(chr, np.random.default_rng(0).permutation(points)))
    encoder = fast.Encoder(pattern, {bytes([byte]): byte for byte in range(256)})
    (ids,) = encoder.encode_batch([text])
    assert bytes(ids.astype(np.uint8)) == text.encode()


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(text=made.TEXT)
def test_the_split_of_gpt2_is_the_one_in_the_library(text):
    inside = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bare = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(splits.GPT2), behavior="isolated")
    ours = pre_tokenizers.Sequence([split, bare])
    assert ours.pre_tokenize_str(text) == inside.pre_tokenize_str(text)


LINES = "a\n b\nc \nd\n\ne\r\nf\r\n\r\ng.\n'\n's\n\u00a0\n1\n\n\n22\n\u0301"
LINES += "\nI'\nll\n!\n\n!\n\u3000\na\r\n\tb\n'\n"


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(text=made.TEXT, length=strategies.integers(1, 7))
def test_parts_of_a_text_have_the_pieces_of_the_text(text, length):
    text = LINES.replace("d", text)
    parts = list(splits.parts(text, length))
    assert "".join(parts) == text
    assert len(parts) > 3
    assert all(len(part) >= length for part in parts[:-1])
    for pattern in splits.KNOWN:
        found = [piece for part in parts for piece in pieces(part, pattern)]
        assert found == pieces(text, pattern), pattern


@KNOWN
@pytest.mark.parametrize("text", ["x;\n//y", "}\n/* a */", "a\nb", ";\n\n/", "1\n2"])
def test_no_border_stands_within_a_piece(pattern, text):
    text *= 9
    cut = [piece for part in splits.parts(text, 1) for piece in pieces(part, pattern)]
    assert cut == pieces(text, pattern)


def test_a_text_without_borders_stays_whole():
    for text in ("", "a" * 99, "\n" * 99, "a\n \n" * 33):
        assert list(splits.parts(text, 5)) == [text]


def test_each_byte_has_the_letter_that_it_has_in_the_library():
    letters = splits.byte_letters()
    assert sorted(letters) == sorted(pre_tokenizers.ByteLevel.alphabet())
    bare = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    points = [*range(0x800), 0x800, *range(0x1000, 0x10000, 0xFFF), 0xD000]
    points = [c for c in points if not 0xD800 <= c < 0xE000]
    points += range(0x10000, 0x110000, 0xFFF)
    seen = set()
    for letter in map(chr, points):
        ((spelt, _),) = bare.pre_tokenize_str(letter)
        assert bytes(letters[one] for one in spelt) == letter.encode()
        seen |= set(letter.encode())
    never = {0xC0, 0xC1, *range(0xF5, 0x100)}  # which UTF-8 does not have
    assert seen == set(range(256)) - never
