"""Special tokens in text: what spells them, and text in which they are spelt out."""

import re
from collections.abc import Callable, Sequence

from fm_jax.tokenizers.jsonfile import JsonTokenizer
from fm_jax.tokenizers.protocol import END, Tokenizer, num_bytes
from fm_jax.tokenizers.ranks import RanksTokenizer
from fm_jax.tokenizers.sentence import SentencePieceTokenizer


def special_encoder(tokenizer: Tokenizer) -> Callable[..., list[int]]:
    """Return `encode(text)`, for text in which special tokens are spelt out.

    With `add_special_tokens` it adds what a tokenizer.json says of a whole text. Other
    kinds add nothing; they know what `spelt` says.
    """
    encode_batch = batch_encoder(tokenizer)
    if not isinstance(tokenizer, JsonTokenizer):
        return lambda text, add_special_tokens=False: encode_batch([text])[0]
    inner = _library(tokenizer)

    def encode(text: str, add_special_tokens: bool = False) -> list[int]:
        if not add_special_tokens:
            return encode_batch([text])[0]
        num_bytes(text)  # else the library's own error
        return inner.encode(text, add_special_tokens=True).ids

    return encode


def batch_encoder(
    tokenizer: Tokenizer,
) -> Callable[[Sequence[str]], list[list[int]]]:
    """Return `encode(texts)`, as `special_encoder` does for each, faster together."""
    if isinstance(tokenizer, JsonTokenizer):
        inner = _library(tokenizer)
        known = {t.content for t in inner.get_added_tokens_decoder().values()}
        token = end_token(tokenizer)

        def plain(texts):
            for text in texts:
                num_bytes(text)
            found = inner.encode_batch(list(texts), add_special_tokens=False)
            return [one.ids for one in found]

        # An end token that the file does not call special is text to the library.
        rest = {} if token in known else {token: tokenizer.end_id}
    else:
        rest = spelt(tokenizer)

        def plain(texts):
            return [ids.tolist() for ids in tokenizer.encode_batch(texts)]

    return plain if not rest else lambda texts: _split(texts, rest, plain)


def spelt(tokenizer: Tokenizer) -> dict[str, int]:
    """Return the ids of special tokens by their spelling, of other kinds than JSON.

    A rank file has its own, a SentencePiece model its control pieces; the end id is
    always spelt `<|endoftext|>` too.
    """
    named = {END: tokenizer.end_id}
    if isinstance(tokenizer, RanksTokenizer | SentencePieceTokenizer):
        named |= tokenizer.special_tokens
    return named


def end_token(tokenizer: Tokenizer) -> str:
    """Return how the end id is spelt in text for `special_encoder`."""
    return _spelling(tokenizer, tokenizer.end_id)


def tokens(tokenizer: Tokenizer) -> tuple[str, ...]:
    """Return how all special tokens are spelt in text for `special_encoder`."""
    if not isinstance(tokenizer, JsonTokenizer):
        return tuple(spelt(tokenizer))
    inner = _library(tokenizer)
    return tuple(inner.id_to_token(index) for index in tokenizer.special_ids)


def begin_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the ids that stand before a text.

    What the post-processor of a tokenizer.json puts there, as Llama's does; where
    nothing is said the end id, which stands before each document in pretraining.
    """
    return _processed(tokenizer) or (tokenizer.end_id,)


def begin_token(tokenizer: Tokenizer) -> str:
    """Return how `begin_ids` are spelt in text for `special_encoder`."""
    return "".join(_spelling(tokenizer, index) for index in begin_ids(tokenizer))


def _processed(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return what a tokenizer.json says stands before a text."""
    if not isinstance(tokenizer, JsonTokenizer):
        return ()
    inner = _library(tokenizer)
    plain = inner.encode("a", add_special_tokens=False).ids
    found = inner.encode("a").ids
    starts = range(len(found) - len(plain) + 1)
    at = next((i for i in starts if found[i : i + len(plain)] == plain), 0)
    return tuple(found[:at])


def _spelling(tokenizer: Tokenizer, index: int) -> str:
    if isinstance(tokenizer, JsonTokenizer):
        return _library(tokenizer).id_to_token(index)
    return next(token for token, found in spelt(tokenizer).items() if found == index)


def _library(tokenizer: JsonTokenizer):
    """Return the tokenizer of the library, to which special tokens are special."""
    import tokenizers

    inner = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    inner.no_truncation()
    inner.no_padding()
    return inner


def _split(
    texts: Sequence[str], special: dict[str, int], plain: Callable
) -> list[list[int]]:
    """Return ids of texts, cut at special tokens; what lies between goes to `plain`."""
    longest_first = sorted(special, key=len, reverse=True)
    cut = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
    parts = [cut.split(text) for text in texts]  # every second one is special
    found = iter(plain([p for row in parts for p in row[::2] if p]))
    rows = []
    for row in parts:
        ids: list[int] = []
        for place, part in enumerate(row):
            if place % 2:
                ids.append(special[part])
            elif part:
                ids += next(found)
        rows.append(ids)
    return rows
