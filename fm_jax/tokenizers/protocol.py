"""What every tokenizer gives, whatever its kind."""

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from fm_jax.errors import UserError, reason

END = "<|endoftext|>"
KNOWN_ENDS = (END, "</s>", "<|end_of_text|>", "<eos>", "[SEP]")
MOST_IDS = 1 << 24  # memory is taken for each, whether there is a token or not


class Tokenizer:
    """What every tokenizer gives: ids, text, the bytes of each id, and an end id.

    `end_id` stands before each document and after the last; no text encodes to it.
    `byte_lengths` [vocab_size] are the UTF-8 bytes that each id stands for.
    `unknown_id` stands for text that has no other id; -1: all text has. `is_exact`
    promises that decode gives back any text that encode_batch takes, and decode_bytes
    the bytes of any of its ids.
    """

    vocab_size: int
    end_id: int
    byte_lengths: np.ndarray
    unknown_id: int = -1
    is_exact: bool = False

    @functools.cached_property
    def special_ids(self) -> tuple[int, ...]:
        """The ids that stand for no text, and that no text encodes to."""
        return (self.end_id,)

    def encode_batch(
        self, texts: Sequence[str], *, num_threads: int = 0
    ) -> list[np.ndarray]:
        """Return the ids of each text, uint32, without special ids.

        `num_threads` 0 stands for all cores. Raises UserError on text that cannot be
        encoded: that has half a surrogate pair, or that the tokenizer has no ids for.
        """
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; bytes that are not UTF-8 are replaced."""
        raise NotImplementedError

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the UTF-8 bytes of ids, which may be a part of a character's."""
        return self.decode(ids).encode()

    def to_json(self) -> str:
        """Return the text that `load` reads back."""
        raise NotImplementedError

    @functools.cached_property
    def fingerprint(self) -> str:
        """Return a digest of everything that decides the ids, the end id included."""
        decides = f"{self.end_id} {self.to_json()}"
        return hashlib.sha256(decides.encode()).hexdigest()[:16]


def num_bytes(text: str) -> int:
    """Return the bytes of text in UTF-8. Raises UserError on half a surrogate pair."""
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        raise UserError(
            f"text must be Unicode; got {text[error.start]!r} at character "
            f"{error.start}, half of a surrogate pair or a byte that is not UTF-8."
        ) from error


def check_count(count: int) -> int:
    """Return a number of ids. Raises UserError on more than there is memory for."""
    if not 1 <= count <= MOST_IDS:
        raise UserError(
            f"a tokenizer must have from 1 to {MOST_IDS:,} ids; got {count:,}, one "
            "more than its largest id."
        )
    return count


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Turn what a library of Rust's ends in as it encodes into the user's error.

    Of a tokenizer that cannot be: a panic of its own, which is no Exception, or a bare
    one.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise UserError(
            f"a tokenizer must encode any text; got one that cannot ({reason(error)})."
        ) from error


def find_end(id_of: Callable[[str], int | None], end_token: str, where: str) -> int:
    """Return the id of the token that ends a document: the one named, or a usual one.

    Raises UserError where there is none in `where`.
    """
    for token in (end_token,) if end_token else KNOWN_ENDS:
        found = id_of(token)
        if found is not None:
            return found
    raise UserError(
        "data.end_token must name the tokenizer's end-of-document token; got "
        f"{end_token!r}, and none of {', '.join(KNOWN_ENDS)} is in {where}."
    )
