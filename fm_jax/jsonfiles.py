"""JSON files of others, read with care."""

import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from fm_jax.errors import UserError, reason

MOST_BYTES = 1 << 28  # of a file; what a tokenizer or a fit has is a tenth of it
MOST_DIGITS = 20  # of a whole number, its sign too
MOST_WHOLE = 1 << 63  # whole numbers below it go into any array
MOST_DEPTH = 100  # of lists and objects in each other: what walks them recurs
SHOWN = 40  # characters of a value that a message repeats
TAIL_BYTES, BLOCK_BYTES = 1 << 22, 1 << 16  # of a file's end; of it at once
NAMES = {
    str: "a string",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "an object",
    list: "a list",
    None: "null",
}


def read(file: Path, *, must: bool = True, form: Any = dict) -> dict[str, Any]:
    """Return a JSON object of a form; {} where there is no file and none `must` be.

    Raises UserError on anything else.
    """
    if not must and not file.exists():
        return {}
    try:
        found = parse(text(file))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file} must be a JSON file to read; got {reason(error)}."
        ) from error
    if not isinstance(found, dict):
        raise UserError(f"{file} must hold a JSON object; got {str(found)[:40]!r}.")
    check(found, form, str(file))
    return found


def text(file: Path) -> str:
    """Return what a plain file holds.

    Raises OSError on a pipe and the like, which would be waited for, and on more than
    memory is taken for; ValueError on what is not UTF-8.
    """
    size = _plain_size(file)
    if size > MOST_BYTES:
        raise OSError(f"{size:,} bytes, of at most {MOST_BYTES:,}")
    return file.read_text(encoding="utf-8")


def opened(file: Path) -> BinaryIO:
    """Open a plain file to read; raises OSError on what would be waited for."""
    _plain_size(file)
    return open(file, "rb")


def last_lines(file: Path) -> Iterator[bytes]:
    """Yield the whole lines of a file's last TAIL_BYTES, the last one first.

    What follows the last line break is left out: it is torn, or being written. Raises
    OSError as `opened`.
    """
    with opened(file) as stream:
        end = stream.seek(0, 2)
        least = max(0, end - TAIL_BYTES)
        part, is_whole = b"", False
        while end > least:
            begin = max(least, end - BLOCK_BYTES)
            stream.seek(begin)
            part, *lines = (stream.read(end - begin) + part).split(b"\n")
            end = begin
            if not is_whole and lines:
                lines.pop()
                is_whole = True
            yield from reversed(lines)
        if is_whole and least == 0:
            yield part


def _plain_size(file: Path) -> int:
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(f"{file}, which is no plain file")
    return status.st_size


def parse(text: str | bytes, *, is_kept: bool = True, **how: Any) -> Any:
    """Return a value of JSON; ValueError on anything else, and on what is nested deep.

    A whole number with more digits than any amount has is a float. is_kept: half of a
    surrogate pair, which no file can be written with, is none either. how: what
    json.loads takes beside the text.
    """
    deep = f"lists and objects in each other, more than {MOST_DEPTH} deep"
    try:
        found = json.loads(text, parse_int=_whole, **how)
    except RecursionError as error:
        raise ValueError(deep) from error
    marks = ("[", "{", "\\u") if isinstance(text, str) else (b"[", b"{", b"\\u")
    opening, brace, escape = map(text.count, marks)
    if opening + brace > MOST_DEPTH and _is_deep(found):
        raise ValueError(deep)
    if escape and is_kept:
        json.dumps(found, ensure_ascii=False).encode()
    return found


def check(value: Any, form: Any, where: str) -> None:
    """Raise UserError, which says where, unless a value has a form.

    A form is a type (float: whole numbers too; object: anything) or None; a tuple of
    forms, of which one is had; [form], a list of these, or [form, form], a list of just
    two; or {key: form}, an object that has these keys, `key?` where it may lack it, `*`
    all others.
    """
    for place, wanted, got in _faults(value, form, ""):
        said = repr(got)
        said = said if len(said) <= SHOWN else said[:SHOWN] + "..."
        thing = f"{place.lstrip('.')} of {where}" if place else where
        raise UserError(f"{thing} must be {_told(wanted)}; got {said}.")


def _whole(text: str) -> int | float:
    return int(text) if len(text) <= MOST_DIGITS else float(text)


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MOST_DEPTH + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return bool(level)


def _faults(value: Any, form: Any, place: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield what is not as it must be: its place, the form there, what is there."""
    if isinstance(form, tuple):
        if all(any(_faults(value, one, place)) for one in form):
            # Of an object that is one only in name, the inner fault says more.
            inner = [one for one in form if isinstance(one, dict | list)]
            if len(inner) == 1 and isinstance(value, type(inner[0])):
                yield from _faults(value, inner[0], place)
            yield place, form, value
    elif isinstance(form, list):
        if not isinstance(value, list):
            yield place, list, value
        elif len(value) != len(form) > 1:
            yield place, f"a list of {len(form)}", value
        else:
            for index, one in enumerate(value):
                yield from _faults(one, form[0], f"{place}[{index}]")
    elif isinstance(form, dict):
        if isinstance(value, dict):
            yield from _of_object(value, form, place)
        else:
            yield place, dict, value
    elif not _is(value, form):
        yield place, form, value


def _of_object(value: dict, form: dict, place: str) -> Iterator[tuple[str, Any, Any]]:
    named = {key.removesuffix("?"): inner for key, inner in form.items()}
    for key in form:
        if key not in value and key != "*" and not key.endswith("?"):
            yield place, f"an object with {key}", sorted(value)
    for key, inner in value.items():
        if key in named or "*" in named:
            yield from _faults(inner, named.get(key, named.get("*")), f"{place}.{key}")


def _is(value: Any, kind: Any) -> bool:
    if kind is None:
        return value is None
    if kind in (int, float):
        is_whole = type(value) is int and abs(value) < MOST_WHOLE
        return is_whole or (kind is float and type(value) is float)
    return isinstance(value, kind)


def _told(form: Any) -> str:
    if isinstance(form, str):
        return form
    if isinstance(form, tuple):
        return " or ".join(map(_told, form))
    if isinstance(form, dict | list):
        form = type(form)
    return NAMES[form]
