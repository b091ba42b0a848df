"""Limits of a chat template: a program of a stranger's, which must come to its end.

The sandbox of Jinja keeps a template from what it may not see; it does not keep it from
loops without end or text without bounds. So steps and letters are counted as it goes,
and what would make a text or a list out of proportion is refused before it is made.
"""

import contextlib
import contextvars
import re
from collections.abc import Callable, Iterator
from typing import Any

MOST_SOURCE = 1 << 20  # letters of a template
MOST_STEPS = 1_000_000  # of loops and macros of one rendering
MOST_SIZE = 1 << 24  # letters of a text, and of all that is written
MOST_PARTS = 1 << 18  # of a list, those of lists in it too
MOST_PRODUCT = 1 << 28  # of a text's size and what is put into it
MOST_NUMBER = 1 << 17  # a width, or times
MOST_BITS = 1 << 14  # of a whole number
# Filters and methods of text whose numbers are widths or times.
WIDE = ("batch", "center", "indent", "slice", "tojson", "truncate", "wordwrap",
        "ljust", "rjust", "zfill", "expandtabs")  # fmt: skip
FORMS = ("format", "format_map")
WIDTH = re.compile(r"\d{5,}|\*|:[^{}]*\{")  # in a form: a wide one, or one from outside

_spent: contextvars.ContextVar[list[int]] = contextvars.ContextVar("spent")


class TooMuch(Exception):
    """What a template asked for is more than a chat is worth."""


@contextlib.contextmanager
def counted() -> Iterator[None]:
    """Count the steps and letters of what is rendered in the block."""
    token = _spent.set([0, 0])
    try:
        yield
    finally:
        _spent.reset(token)


def step(letters: int) -> None:
    """Count a step, and the letters that it writes as they stand in the template."""
    spent = _spent.get(None)
    if spent is not None:
        spent[0] += 1
        spent[1] += letters
        if spent[0] > MOST_STEPS:
            raise TooMuch(f"more than {MOST_STEPS:,} steps")
        _check_size(spent[1])


def written(value: Any) -> Any:
    """Return what is written, counted."""
    size = _size(value)
    spent = _spent.get(None)
    if spent is not None:
        spent[1] += size
        _check_size(spent[1])
    return value


def small(value: Any) -> Any:
    """Return a value that is not too large."""
    _size(value)
    return value


def check_operator(operator: str, left: Any, right: Any) -> None:
    """Raise TooMuch where an operator would make something too large."""
    pair = (left, right)
    whole = [x for x in pair if isinstance(x, int)]
    if operator == "**" and len(whole) == 2:
        if abs(left).bit_length() * max(right, 0) > MOST_BITS:
            raise TooMuch("a number too large")
    elif operator == "*":
        sizes = [_size(x) for x in pair if isinstance(x, str | list | tuple)]
        bits = sum(abs(x).bit_length() for x in whole)
        if sizes and whole:
            _check_size(sizes[0] * max(0, *whole))
        elif bits > MOST_BITS:
            raise TooMuch("a number too large")
    elif operator == "+":
        _check_size(sum(_size(x) for x in pair))
    elif operator == "%" and isinstance(left, str):
        _check_form(left, right)


def check_use(name: str, value: Any, given: tuple) -> None:
    """Raise TooMuch where a filter or a method would make something too large."""
    if name in WIDE:
        for one in given:
            if isinstance(one, int) and abs(one) > MOST_NUMBER:
                raise TooMuch(f"{name} of {one}")
        times = max((abs(one) for one in given if isinstance(one, int)), default=0)
        _check_product(_size(value), times)
    elif name in FORMS and isinstance(value, str):
        _check_form(value, given)
    elif isinstance(value, str):
        _check_product(len(value), sum(map(_size, given)))


def limited(name: str, function: Callable) -> Callable:
    """Return a filter that refuses what is out of proportion."""
    place = 1 if hasattr(function, "jinja_pass_arg") else 0

    def call(*given, **named):
        value, *rest = given[place:] or ("",)
        check_use(name, value, (*rest, *named.values()))
        return small(function(*given, **named))

    vars(call).update(getattr(function, "__dict__", {}))
    return call


def _check_form(form: str, given: Any) -> None:
    if WIDTH.search(form):
        raise TooMuch("a form with a width that is large, or not its own")
    _check_product(len(form), _size(given) if isinstance(given, tuple) else 1)


def _check_product(size: int, times: int) -> None:
    if size * times > MOST_PRODUCT:
        raise TooMuch("a text too large")


def _check_size(size: int) -> None:
    if size > MOST_SIZE:
        raise TooMuch(f"more than {MOST_SIZE:,} letters")


def _size(value: Any) -> int:
    """Return letters and parts, all told; TooMuch as soon as they are too many."""
    parts, letters, left = 0, 0, [value]
    while left:
        one = left.pop()
        parts += 1
        if isinstance(one, str):
            letters += len(one)
        elif isinstance(one, dict):
            left += [*one.keys(), *one.values()]
        elif isinstance(one, list | tuple):
            left += one
        if parts + len(left) > MOST_PARTS:
            raise TooMuch(f"more than {MOST_PARTS:,} parts")
    _check_size(letters)
    return parts + letters
