"""Tokenizers that learn nothing: an id for each byte, or for each symbol."""

import json
import sys

import numpy as np

from fm_jax.corpora import synthetic
from fm_jax.errors import UserError
from fm_jax.tokenizers.protocol import Tokenizer, num_bytes


class ByteTokenizer(Tokenizer):
    """Ids 0 to 255 are bytes; 256 ends a document."""

    vocab_size = 257
    end_id = 256
    byte_lengths = np.array([1] * 256 + [0], np.int32)
    is_exact = True

    def encode_batch(self, texts, *, num_threads=0):
        for text in texts:
            num_bytes(text)
        return [np.frombuffer(t.encode(), np.uint8).astype(np.uint32) for t in texts]

    def decode(self, ids):
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids):
        return bytes(i for i in map(int, ids) if i < 256)

    def to_json(self):
        return json.dumps({"fm_jax_tokenizer": "bytes"})


class SymbolTokenizer(Tokenizer):
    """An id for each character that a synthetic source writes, and one for the end."""

    is_exact = True

    def __init__(self, num_symbols: int):
        if type(num_symbols) is not int or not 1 <= num_symbols <= sys.maxunicode:
            raise UserError(
                f"num_symbols must be a number of letters; got {num_symbols!r}."
            )
        self.end_id, self.vocab_size = num_symbols, num_symbols + 1
        self._letters_V = synthetic.alphabet(num_symbols).astype("<u4")
        lengths = [len(chr(letter).encode()) for letter in self._letters_V]
        self.byte_lengths = np.array([*lengths, 0], np.int32)

    def encode_batch(self, texts, *, num_threads=0):
        rows = []
        for text in texts:
            if stranger := self.stranger(text):
                raise UserError(
                    f"text must be of {self.shown} alone; got {stranger!r} in "
                    f"{text[:40]!r}."
                )
            rows.append(self._find(text).astype(np.uint32))
        return rows

    def stranger(self, text: str) -> str:
        """Return the first character of a text that has no id, or ""."""
        found = np.minimum(self._find(text), self.end_id - 1)
        strange = np.flatnonzero(self._letters_V[found] != _code_points(text))
        return text[strange[0]] if len(strange) else ""

    @property
    def shown(self) -> str:
        """The characters that have an id, in words."""
        first, last = (chr(self._letters_V[i]) for i in (0, -1))
        return f"the {self.end_id} symbols from {first!r} to {last!r}"

    def decode(self, ids):
        known = [i for i in map(int, ids) if i < self.end_id]
        return self._letters_V[known].tobytes().decode("utf-32-le")

    def to_json(self):
        return json.dumps({"fm_jax_tokenizer": "symbols", "num_symbols": self.end_id})

    def _find(self, text: str) -> np.ndarray:
        return np.searchsorted(self._letters_V, _code_points(text))


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
