"""Tests of text made fit for a terminal."""

import sys
import unicodedata

from fm_jax.data.visible import visible


def test_text_that_is_seen_stays_as_it_is():
    text = "Grüße, 世界 \u3000— naïve 🙂 e\u0301 שלום"
    assert visible(text) == text


def test_what_commands_a_terminal_is_spelt_out():
    assert visible("\x1b[31mred\x07\x7f") == "␛[31mred␇␡"
    assert visible("a\tb\r\nc\0") == "a␉b␍␊c␀"
    assert visible("\x9b2J") == "<U+009B>2J"  # an escape in one character


def test_what_turns_text_round_or_hides_in_it_is_spelt_out():
    assert visible("a\u202eb\u2066\u200b\ufeff") == "a<U+202E>b<U+2066><U+200B><U+FEFF>"
    assert visible("\u2028\ue000\ud800\U000e0041") == (
        "<U+2028><U+E000><U+D800><U+E0041>"
    )


def test_no_code_point_gets_through_that_is_no_mark_letter_sign_or_space():
    every = visible("".join(map(chr, range(sys.maxunicode + 1))))
    assert {unicodedata.category(letter)[0] for letter in every} == set("LMNPSZ")
    assert not {"\u2028", "\u2029", "\n"} & set(every)
