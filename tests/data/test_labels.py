"""Tests of labels: their order, and the words that stand for them."""

import pytest

from fm_jax.data import labels
from fm_jax.errors import UserError
from fm_jax.tokenizers.plain import ByteTokenizer


def test_numbers_stand_by_size_and_other_labels_as_text():
    assert labels.in_order(["10", "9", "-1", "9", "2.5"]) == ("-1", "2.5", "9", "10")
    assert labels.in_order(["10", "9", "b"]) == ("10", "9", "b")
    assert labels.in_order([]) == ()


def test_labels_are_text_as_json_spells_them():
    found = [labels.as_text(label) for label in ("a", 3, True, 1.5)]
    assert found == ["a", "3", "true", "1.5"]


def test_words_have_the_ids_of_their_labels_in_order():
    words = (("yes", "y"), ("no", "n"))
    assert labels.ids_of(words, ("no", "yes"), ByteTokenizer()) == (110, 121)


@pytest.mark.parametrize(
    "words, said",
    [
        ((("no", "n"),), "a word for each label and no other; got no for the labels"),
        ((("no", "n"), ("yes", "y"), ("so", "s")), "a word for each label"),
        ((("no", "n"), ("yes", "y"), ("yes", "z")), "a word for each label"),
        ((("no", "n"), ("yes", "yy")), "must be one token; got 'yy', which is 2"),
        ((("no", "n"), ("yes", "")), "must be one token; got '', which is 0"),
        ((("no", "n"), ("yes", "n")), "must differ in their tokens; got 'n' and 'n'"),
    ],
)
def test_words_that_cannot_stand_for_the_labels_are_refused(words, said):
    with pytest.raises(UserError, match=said):
        labels.ids_of(words, ("no", "yes"), ByteTokenizer())
