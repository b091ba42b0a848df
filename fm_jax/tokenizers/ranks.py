"""Encodings of tiktoken, from files of ranks."""

import base64
import binascii
import json
import re
from pathlib import Path

import numpy as np

from fm_jax import jsonfiles
from fm_jax.errors import UserError
from fm_jax.tokenizers import fast
from fm_jax.tokenizers.protocol import END, Tokenizer, check_count, find_end, num_bytes

# Patterns and special tokens of github.com/openai/tiktoken, openai_public.py.
_R50K = (
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
)
_CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+|"
    r" ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_SUFFIX}|"
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_SUFFIX}|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CL100K_SPECIAL = {
    END: 100257,
    "<|fim_prefix|>": 100258,
    "<|fim_middle|>": 100259,
    "<|fim_suffix|>": 100260,
    "<|endofprompt|>": 100276,
}
KNOWN = {
    "gpt2": (_R50K, {END: 50256}),
    "r50k_base": (_R50K, {END: 50256}),
    "p50k_base": (_R50K, {END: 50256}),
    "cl100k_base": (_CL100K, _CL100K_SPECIAL),
    "o200k_base": (_O200K, {END: 199999, "<|endofprompt|>": 200018}),
}
LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")  # which a file of ranks opens with


class RanksTokenizer(Tokenizer):
    """A tiktoken encoding: bytes of a piece are merged, the lowest rank first.

    A run of spaces too long for the library is cut, as by Llama 3's own tokenizer.
    """

    is_exact = True

    def __init__(
        self,
        ranks: dict[bytes, int],
        *,
        pattern: str,
        special_tokens: dict[str, int],
        end_token: str = "",
        end_id: int = -1,
    ):
        _check(ranks, special_tokens)
        self._ranks, self._pattern = ranks, pattern
        self.special_tokens = special_tokens
        self.vocab_size = check_count(
            1 + max(*ranks.values(), *special_tokens.values())
        )
        self._inner = fast.Encoder(pattern, ranks)
        if end_id in special_tokens.values():
            self.end_id = end_id
        else:
            self.end_id = find_end(special_tokens.get, end_token, "its special tokens")
        self.special_ids = tuple(sorted(special_tokens.values()))
        self._bytes_V = [b""] * self.vocab_size
        for token, index in ranks.items():
            self._bytes_V[index] = token
        self.byte_lengths = np.array([len(b) for b in self._bytes_V], np.int32)

    def encode_batch(self, texts, *, num_threads=0):
        sizes = [num_bytes(text) for text in texts]
        cuts = [_parts(text) for text in texts]
        parts = [part for cut in cuts for part in cut]
        found = iter(self._inner.encode_batch(parts, num_threads=num_threads))
        rows = []
        for text, size, cut in zip(texts, sizes, cuts, strict=True):
            row = [next(found) for _ in cut]
            rows.append(row[0] if len(row) == 1 else np.concatenate(row))
            if self.byte_lengths[rows[-1]].sum() != size:
                raise UserError(
                    "the split pattern of a rank file must take every character; got "
                    f"{self._pattern!r}, which leaves some of {text[:40]!r} out."
                )
        return rows

    def decode(self, ids):
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids):
        known = (i for i in map(int, ids) if i < self.vocab_size)
        return b"".join(self._bytes_V[i] for i in known)

    def to_json(self):
        tokens = sorted(self._ranks.items(), key=lambda item: item[1])
        return json.dumps(
            {
                "fm_jax_tokenizer": "ranks",
                "end_id": self.end_id,
                "pattern": self._pattern,
                "special_tokens": self.special_tokens,
                "ranks": [[base64.b64encode(t).decode(), rank] for t, rank in tokens],
            }
        )


def from_json(fields: dict, *, end_token: str = "", end_id: int = -1) -> RanksTokenizer:
    """Return what `to_json` told of, with another end where one is named."""
    return RanksTokenizer(
        {base64.b64decode(token): rank for token, rank in fields["ranks"]},
        pattern=fields["pattern"],
        special_tokens=fields["special_tokens"],
        end_token=end_token,
        end_id=fields["end_id"] if end_id < 0 and not end_token else end_id,
    )


def from_file(
    path: Path, raw: bytes, *, end_token: str = "", end_id: int = -1
) -> RanksTokenizer:
    """Return the encoding of a file of ranks: a line for each, base64 and its rank.

    The pattern and the special tokens are those of a JSON of the same stem beside it,
    else those known by the stem. Raises UserError where neither is there.
    """
    ranks = {}
    for number, line in enumerate(raw.splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise UserError(
                f"rank file must have a token in base64 and its rank in each line; got "
                f"{line[:40]!r} in line {number} of {path}."
            ) from error
    pattern, special_tokens = _described(path)
    return RanksTokenizer(
        ranks,
        pattern=pattern,
        special_tokens=special_tokens,
        end_token=end_token,
        end_id=end_id,
    )


def _described(path: Path) -> tuple[str, dict[str, int]]:
    beside = path.with_suffix(".json")
    try:
        fields = jsonfiles.parse(jsonfiles.text(beside))
        return str(fields["pattern"]), {
            str(token): int(index) for token, index in fields["special_tokens"].items()
        }
    except FileNotFoundError:
        if path.stem in KNOWN:
            return KNOWN[path.stem]
        why = "nothing there"
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        why = f"{type(error).__name__}: {error}"
    raise UserError(
        f"rank file must be named after a known encoding ({', '.join(KNOWN)}) or have "
        f"its split pattern beside it; got {path}, and in {beside.name} {why}. Write "
        '{"pattern": "...", "special_tokens": {"<|endoftext|>": 50256}} there.'
    )


def _check(ranks: dict[bytes, int], special_tokens: dict[str, int]) -> None:
    missing = 256 - sum(bytes([byte]) in ranks for byte in range(256))
    if missing:
        raise UserError(
            f"rank file must have a rank for each of the 256 bytes; got none for "
            f"{missing} of them."
        )
    ids = [*ranks.values(), *special_tokens.values()]
    jsonfiles.check(ids, [int], "the ids of ranks and special tokens")
    if len(set(ids)) < len(ids) or min(ids) < 0:
        raise UserError(
            "ranks and ids of special tokens must be distinct and at least 0; got "
            f"{len(ids)} of which {len(set(ids))} are distinct, from {min(ids)} on."
        )


def _parts(text: str) -> list[str]:
    """Return a text cut within runs of spaces that are too long, mostly as it is."""
    if not fast.has_long_run(text):
        return [text]
    parts, start = [], 0
    for run in re.finditer(r"(?<!\s)\s+", text):
        for cut in range(run.start() + fast.LONG_RUN, run.end(), fast.LONG_RUN):
            parts.append(text[start:cut])
            start = cut
    return [*parts, text[start:]]
