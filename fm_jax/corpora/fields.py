"""Several fields of a row, whose text is the JSON object of those that are there."""

import json
import re
from collections.abc import Collection, Mapping

from fm_jax.errors import UserError, unknown

TextField = str | tuple[str, ...]

# A NUL as json.dumps writes it, after whole pairs of backslashes.
NUL = re.compile(r"(?<!\\)((?:\\\\)*)\\u0000")


def is_one(text_field: TextField | list[str]) -> bool:
    """Return whether the text is one field; else it is a JSON object of several."""
    return isinstance(text_field, str)


def names(text_field: TextField | list[str]) -> tuple[str, ...]:
    """Return the names of the fields."""
    return (text_field,) if isinstance(text_field, str) else tuple(text_field)


def told(text_field: TextField) -> str | list[str]:
    """Return a text_field as JSON gives it back."""
    return text_field if isinstance(text_field, str) else list(text_field)


def refuse_unknown(text_field: TextField, known: Collection[str], place: str) -> None:
    """Raise UserError where a place has no field of the name; of several, none.

    place: as a person is shown it; "": the one that there is.
    """
    asked, of = names(text_field), f" of {place}" if place else ""
    if any(name in known for name in asked):
        return
    if isinstance(text_field, str):
        raise unknown(f"data.text_field{of}", text_field, known)
    raise UserError(
        f"data.fields must name fields of the data; got {', '.join(asked)}, none of "
        f"which is in {place}: {', '.join(known)}. Say where each stands: "
        '--config.data.fields=\'(("name", "its field"), ...)\'.'
    )


def taken(row: object, text_field: TextField | list[str]) -> object:
    """Return what a row holds: a field's value, or a dict of several.

    None stands for a field that is not there.
    """
    row = row if isinstance(row, Mapping) else {}
    if isinstance(text_field, str):
        return row.get(text_field)
    return {name: row.get(name) for name in text_field}


def as_text(found: dict) -> str | bytes | None:
    """Return the JSON object of the fields that are there; None where none is.

    Keys are sorted. Bytes are taken for UTF-8; where they are none, so is the result,
    and whoever decodes that meets them. A NUL stands as itself, not as JSON spells it.
    """
    there = {name: plain(value) for name, value in found.items() if value is not None}
    if not there:
        return None
    text = json.dumps(there, ensure_ascii=False, sort_keys=True)
    if "u0000" in text:
        text = NUL.sub("\\1\0", text)
    if text.isascii():
        return text
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half of a pair, as JSON may spell one
        return text


def plain(value: object) -> object:
    """Return a value as lists, dicts, text and numbers."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if isinstance(value, Mapping):
        return {str(plain(key)): plain(held) for key, held in value.items()}
    if isinstance(value, list | tuple):
        return [plain(held) for held in value]
    if hasattr(value, "tolist"):  # of NumPy
        return plain(value.tolist())
    return str(value)  # times, decimals
