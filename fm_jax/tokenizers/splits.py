"""How text is split into pieces before it is tokenised, and how bytes are spelt.

A pattern is an alternation of which the first that fits is a piece. Each of these takes
every character, and holds nothing that Oniguruma (the `tokenizers` library) and Rust's
regex (tiktoken) read in two ways.
"""

import re
from collections.abc import Iterator

DIGITS = {"triples": r" ?\p{N}{1,3}", "single": r" ?\p{N}", "keep": r" ?\p{N}+"}
WHITESPACE = {"runs": r"\r?\n|[ \t]+(?!\S)|[ \t]+|\s", "single": r"\r?\n|\s"}


def pattern(digits: str, whitespace: str) -> str:
    """Return a split into words with their leading space, numbers, signs and spaces."""
    return (
        rf" ?\p{{L}}+|{DIGITS[digits]}| ?[^\s\p{{L}}\p{{N}}]+|{WHITESPACE[whitespace]}"
    )


# Digits by threes, and runs of spaces kept whole, so that indentation is a token.
PIECES = pattern("triples", "runs")

# Of github.com/openai/tiktoken, openai_public.py, and as the files of the tokenizers
# library spell them.
_SUFFIXES = r"'s|'t|'re|'ve|'m|'ll|'d"
GPT2 = rf"{_SUFFIXES}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CL100K = rf"(?i:{_SUFFIXES})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
QWEN2 = rf"(?i:{_SUFFIXES})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+(?i:{_SUFFIXES})?|"
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*(?i:{_SUFFIXES})?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
KNOWN = {pattern(d, w) for d in DIGITS for w in WHITESPACE} | {
    GPT2,
    CL100K,
    QWEN2,
    O200K,
}

# Where a line ends and the next begins with no space or slash, which o200k's pieces of
# signs take with them. No piece of any of these goes over it, and none before it is
# another for want of what follows.
BORDER = re.compile(r"(?<=\S\n)(?=[^\s/])")


def parts(text: str, length: int) -> Iterator[str]:
    """Yield a text in parts, of `length` >= 1 or longer, whose pieces are its own."""
    start = 0
    while border := BORDER.search(text, start + length):
        yield text[start : border.start()]
        start = border.start()
    yield text[start:]


def byte_letters() -> dict[str, int]:
    """Return the byte that each letter of byte-level files stands for.

    Those that are seen as themselves in Latin-1 stand for themselves, the others for
    the letters from 256 on, as in GPT-2's encoder.py.
    """
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unseen = [byte for byte in range(256) if byte not in seen]
    letters = {chr(byte): byte for byte in seen}
    return letters | {chr(256 + place): byte for place, byte in enumerate(unseen)}
