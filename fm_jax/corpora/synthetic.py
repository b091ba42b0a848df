"""Text that a chain writes: documents whose best possible loss is known."""

import dataclasses
import itertools
import unicodedata
from collections.abc import Iterator

import numpy as np

from fm_jax.corpora.chains import Chain

FORMAT = 1  # of how text follows from a chain's numbers; the tests know some of it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Synthetic:
    """Documents of a chain, as many as have so many tokens, end ids among them."""

    chain: Chain
    num_tokens: dict[str, int]

    def documents(self, split: str) -> Iterator[str]:
        """Yield the texts of a split; the last is whole, however long.

        More tokens are the same text and more of it.
        """
        letters_V = alphabet(self.chain.num_symbols).astype("<u4")
        left = self.num_tokens[split]
        for symbols_T in self.chain.sample(split):
            yield letters_V[symbols_T].tobytes().decode("utf-32-le")
            left -= len(symbols_T) + 1
            if left <= 0:
                return

    def identity(self, split: str) -> dict:
        """Return what the split's documents follow from."""
        return {
            "synthetic": dataclasses.asdict(self.chain),
            "format": FORMAT,
            "num_tokens": self.num_tokens[split],
            "split": split,
        }


def make(*, num_tokens: int, num_eval_tokens: int, **chain) -> Synthetic:
    """Return the source that the synthetic section of a config describes."""
    return Synthetic(
        chain=Chain(**chain), num_tokens={"train": num_tokens, "eval": num_eval_tokens}
    )


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
