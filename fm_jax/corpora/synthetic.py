"""Text that a chain writes: documents whose best possible loss is known."""

import dataclasses
import itertools
import unicodedata
from collections.abc import Iterator
from typing import ClassVar

import numpy as np

from fm_jax.corpora.chains import Chain
from fm_jax.corpora.documents import Piece, Reader, Reading

FORMAT = 1  # of how text follows from a chain's numbers; the tests know some of it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Synthetic:
    """Documents of a chain, as many as have so many tokens, end ids among them."""

    chain: Chain
    num_tokens: dict[str, int]

    # The splits are drawn independently. To leave out of one what the other has by
    # chance, short documents, would be to write another text than the chain's.
    is_held_out_apart: ClassVar[bool] = False

    def pieces(self, split: str) -> list[Piece]:
        """Return the one piece that a split is: each document follows the last."""
        letters_V = alphabet(self.chain.num_symbols).astype("<u4")
        raw = letters_V.tobytes().decode("utf-32-le").encode()
        size = self.num_tokens[split] * len(raw) // self.chain.num_symbols
        return [Piece(name="synthetic", size=size)]

    def share(self, split: str) -> tuple[float, float]:
        """Return the range of hashes, as fractions of 1, of the documents, all."""
        return 0.0, 1.0

    def identity(self, split: str) -> dict:
        """Return what the split's documents follow from."""
        return {
            "synthetic": dataclasses.asdict(self.chain),
            "format": FORMAT,
            "num_tokens": self.num_tokens[split],
            "split": split,
        }

    def spec(self, split: str) -> dict:
        """Return what `reader` makes the reader from."""
        return {
            "kind": "synthetic",
            "chain": dataclasses.asdict(self.chain),
            "num_tokens": self.num_tokens[split],
            "split": split,
        }


def make(*, num_tokens: int, num_eval_tokens: int, **chain) -> Synthetic:
    """Return the source that the synthetic section of a config describes."""
    return Synthetic(
        chain=Chain(**chain), num_tokens={"train": num_tokens, "eval": num_eval_tokens}
    )


def reader(spec: dict) -> Reader:
    """Return the reader of a split, by a source's `spec`; the last document is whole.

    More tokens are the same text and more of it.
    """
    chain = Chain(**spec["chain"])

    def read(piece: Piece, reading: Reading) -> Iterator[tuple[int, str]]:
        letters_V = alphabet(chain.num_symbols).astype("<u4")
        left = spec["num_tokens"]
        for number, symbols_T in enumerate(chain.sample(spec["split"])):
            text = letters_V[symbols_T].tobytes().decode("utf-32-le")
            for part in reading.texts(text, piece, number):
                yield number, part
            left -= len(symbols_T) + 1
            if left <= 0:
                return

    return read


def alphabet(num_symbols: int) -> np.ndarray:
    """Return the code points of the first printable characters but spaces, [V].

    From U+0021 on, of those that Unicode 3.2 has: every Python knows that version, so
    an id is the same character under all of them.
    """
    known = unicodedata.ucd_3_2_0.category
    printable = (
        code
        for code in itertools.count(0x21)
        if chr(code).isprintable() and known(chr(code)) != "Cn"
    )
    return np.fromiter(itertools.islice(printable, num_symbols), np.uint32, num_symbols)
