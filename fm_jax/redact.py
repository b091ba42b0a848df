"""Secrets in text: told apart, and left out of what is kept."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

LEFT_OUT = "[left out]"
FEWEST = 8  # characters of a variable's value that may be a secret
VARIABLE = re.compile(r"(?:TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY(?:_ID)?)$")
# The user and password of a URL; what a query of one is signed with.
LOGIN = re.compile(
    r"(?<=://)[^/\s@'\":]*:[^/\s@'\"]+(?=@)|(?<=http://)[^/\s@'\"]+(?=@)|"
    r"(?<=https://)[^/\s@'\"]+(?=@)"
)
SIGNED = re.compile(
    r"(?i)(?<=[?&])((?:[\w-]*(?:token|signature|secret|password|credential))|sig|"
    r"(?:api|access)[_-]?key(?:[_-]?id)?)=[^&\s'\"]+"
)
# --token=..., hf_token=..., but neither data.end_token nor train.tokens.
NAMED = re.compile(
    r"(?i)^(-{0,2}(?:[\w.-]*[._-])?(?<!end_)(?<!special_)"
    r"(?:token|secret|password|passwd|api[_-]?key))=(?=.).*",
    re.DOTALL,
)
SHAPES = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|"
    r"(?:AKIA|ASIA)[A-Z0-9]{16}|xox[abprs]-[A-Za-z0-9-]{10,})\b"
)


def in_url(text: str) -> bool:
    """Return whether text has a URL with a password or a key in it."""
    return bool(LOGIN.search(text) or SIGNED.search(text))


def words(command: Iterable[str], environ: Mapping[str, str]) -> list[str]:
    """Return the words of a command without secrets.

    Those are the logins of URLs and what they are signed with, values of names as
    `token`, tokens that show by their beginning, and what the environment holds under
    such a name.
    """
    held = [
        value
        for name, value in environ.items()
        if VARIABLE.search(name.upper()) and len(value) >= FEWEST
    ]
    return [_word(word, sorted(held, key=len, reverse=True)) for word in command]


def values(found: Any, environ: Mapping[str, str]) -> Any:
    """Return text, or dicts and lists that hold some, without secrets."""
    if isinstance(found, str):
        return words([found], environ)[0]
    if isinstance(found, Mapping):
        return {name: values(value, environ) for name, value in found.items()}
    if isinstance(found, list | tuple):
        return [values(value, environ) for value in found]
    return found


def _word(word: str, held: list[str]) -> str:
    for value in held:
        word = word.replace(value, LEFT_OUT)
    word = NAMED.sub(rf"\1={LEFT_OUT}", word)
    word = SHAPES.sub(LEFT_OUT, LOGIN.sub(LEFT_OUT, word))
    return SIGNED.sub(rf"\1={LEFT_OUT}", word)
