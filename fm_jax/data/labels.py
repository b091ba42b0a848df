"""Labels of examples to classify: their order, and the words that stand for them."""

import json
from collections.abc import Iterable, Sequence

from fm_jax.errors import UserError
from fm_jax.tokenizers.protocol import Tokenizer


def as_text(found: str | bool | int | float) -> str:
    """Return a label of the data as text: numbers and truth as JSON spells them."""
    return found if isinstance(found, str) else json.dumps(found)


def in_order(labels: Iterable[str]) -> tuple[str, ...]:
    """Return different labels in their order: numbers by size, others as text."""
    found = {*labels}
    try:
        return tuple(sorted(found, key=lambda label: (float(label), label)))
    except ValueError:
        return tuple(sorted(found))


def ids_of(
    words: Sequence[tuple[str, str]], labels: Sequence[str], tokenizer: Tokenizer
) -> tuple[int, ...]:
    """Return the id of each label's word.

    words: (label, word) pairs, as data.label_words. Raises UserError unless they are
    just the labels, and each word is one token that no other is.
    """
    named = dict(words)
    if len(named) < len(words) or {*named} != {*labels}:
        raise UserError(
            "data.label_words must have a word for each label and no other; got "
            f"{', '.join(label for label, _ in words)} for the labels "
            f"{', '.join(labels)}."
        )
    found: dict[int, str] = {}
    for label in labels:
        ids = tokenizer.encode_batch([named[label]])[0].tolist()
        if len(ids) != 1:
            raise UserError(
                f"a word of data.label_words must be one token; got {named[label]!r}, "
                f"which is {len(ids)}. Try it with a space before it, or another word."
            )
        if ids[0] in found:
            raise UserError(
                "words of data.label_words must differ in their tokens; got "
                f"{found[ids[0]]!r} and {named[label]!r}."
            )
        found[ids[0]] = named[label]
    return tuple(found)
