"""Regular expressions of others, refused where matching them could take for ever."""

import re

from fm_jax.errors import UserError

MOST_LETTERS = 1000
MOST_REPEATS = 6  # that are open, of short paths; each multiplies the time by a length
ESCAPED = re.compile(r"\\.", re.DOTALL)
CLASS = re.compile(r"\[\^?\]?[^\]]*\]")
OPEN = re.compile(r"[*+]|\{\d*,\d*\}")
OF_GROUP = re.compile(r"\)(?:[*+]|\{)")


def compiled(pattern: str, thing: str, *, most: int = MOST_REPEATS) -> re.Pattern:
    """Return the pattern; `thing` is what it was given as.

    Raises UserError on what is none, and on what may backtrack for ever: a group that
    is repeated, or more than `most` repeats.
    """
    try:
        found = re.compile(pattern[: MOST_LETTERS + 1])
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(
            f"{thing} must be regular expressions; got {pattern[:80]!r} ({error})."
        ) from error
    plain = CLASS.sub("x", ESCAPED.sub("x", pattern))
    repeats = len(OPEN.findall(plain))
    if len(pattern) > MOST_LETTERS or repeats > most or OF_GROUP.search(plain):
        raise UserError(
            f"{thing} must be regular expressions of at most {MOST_LETTERS} letters "
            f"that repeat at most {most} times, and no group; got {pattern[:80]!r}. "
            "Others can take for ever."
        )
    return found
