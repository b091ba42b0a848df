"""Tokenizers learnt from text, kept in the cache."""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from fm_jax import caches
from fm_jax.errors import UserError, unknown
from fm_jax.tokenizers import load, splits
from fm_jax.tokenizers.jsonfile import JsonTokenizer
from fm_jax.tokenizers.protocol import END

KINDS = ("bpe", "unigram")
UNSEEN = 10.0  # nats by which a byte that text does not have is below the rarest piece


def train(
    texts: Iterable[str],
    *,
    kind: str,
    vocab_size: int,
    special_tokens: tuple[str, ...] = (),
    digits: str = "triples",
    whitespace: str = "runs",
) -> JsonTokenizer:
    """Return a tokenizer of `vocab_size` ids learnt from texts, fewer of little text.

    `bpe` (Sennrich et al. 2016, arXiv 1508.07909) merges the commonest pairs; `unigram`
    (Kudo 2018, arXiv 1804.10959) keeps the likeliest pieces. Both are of bytes, each
    of which has an id, so any text survives the round trip. `digits` are kept in
    pieces of up to three (triples), of one (single) or whole (keep); `whitespace` in
    runs or single. `special_tokens` are ids that no text encodes to, besides END.

    Raises UserError on unknown names, on special tokens that words may spell, below
    the ids that bytes and special tokens take, and without any text.
    """
    for thing, name, known in (
        ("kind of tokenizer", kind, KINDS),
        ("digits of a tokenizer", digits, splits.DIGITS),
        ("whitespace of a tokenizer", whitespace, splits.WHITESPACE),
    ):
        if name not in known:
            raise unknown(thing, name, known)
    pattern = splits.pattern(digits, whitespace)
    _check(kind, vocab_size, special_tokens, pattern)
    rest = iter(texts)
    first = next(rest, None)
    if first is None:
        raise UserError(
            "a tokenizer must have text to learn from; got none. Check data.paths and "
            "data.eval_fraction."
        )
    learn, special = _bpe if kind == "bpe" else _unigram, [END, *special_tokens]
    texts = itertools.chain([first], rest)
    return JsonTokenizer(learn(texts, vocab_size, special, pattern))


def train_bpe(texts: Iterable[str], *, vocab_size: int) -> JsonTokenizer:
    """Return `train` of kind bpe, as data.tokenizer=bpe asks for it."""
    return train(texts, kind="bpe", vocab_size=vocab_size)


def find_or_train_bpe(
    cache: Path,
    documents: Callable[[], Iterable[str]],
    *,
    vocab_size: int,
    identity: dict,
    say: Callable[[str], None],
    may_build: bool = True,
) -> JsonTokenizer:
    """Return the BPE of these documents, from the cache or trained into it.

    Raises UserError on one that is not there unless it may be built.
    """
    import tokenizers

    key = {
        "source": identity,
        "vocab_size": vocab_size,
        "pieces": splits.PIECES,
        "library": tokenizers.__version__,
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    path = cache / "tokenizers" / f"bpe-{vocab_size}-{name}.json"
    if not path.exists():
        caches.require(may_build, path)
        try:
            with caches.made_by_one(path):
                if not path.exists():
                    say(
                        f"Training a BPE tokenizer of {vocab_size:,} ids on the train "
                        "text"
                    )
                    trained = train_bpe(documents(), vocab_size=vocab_size)
                    caches.write_whole(path, trained.to_json())
        except OSError as error:
            raise UserError(
                f"data.cache_dir must be writable and have room; got {path} "
                f"({error.strerror})."
            ) from error
    return load.load(path)


def _check(
    kind: str, vocab_size: int, special_tokens: tuple[str, ...], pattern: str
) -> None:
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    for place, token in enumerate(special_tokens):
        if token == END or token in special_tokens[:place]:
            raise UserError(f"special tokens must be distinct; got {token!r} twice.")
        if len(split.pre_tokenize_str(token)) < 2:
            raise UserError(
                "special tokens must have signs around letters, for else text may "
                f"spell them; got {token!r}. Try '<|{token.strip()}|>'."
            )
    least = 257 + len(special_tokens)
    if vocab_size < least:
        shown = "BPE" if kind == "bpe" else kind
        more = f" with {len(special_tokens)} special tokens" if special_tokens else ""
        raise UserError(
            f"data.vocab_size must be >= {least} for {shown}{more}; got {vocab_size}."
        )


def _bpe(
    texts: Iterable[str], vocab_size: int, special_tokens: list[str], pattern: str
) -> str:
    from tokenizers import models, trainers

    inner = _byte_level(models.BPE(), pattern)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        initial_alphabet=sorted(splits.byte_letters()),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer=trainer)
    return inner.to_str()


def _unigram(
    texts: Iterable[str], vocab_size: int, special_tokens: list[str], pattern: str
) -> str:
    from tokenizers import models, trainers

    inner = _byte_level(models.Unigram(), pattern)
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        initial_alphabet=sorted(splits.byte_letters()),
        show_progress=False,
    )
    num_V = np.zeros(256, np.int64)
    inner.train_from_iterator(_counted(texts, num_V), trainer=trainer)
    spec = json.loads(inner.to_str())
    first, scored = len(special_tokens), dict(spec["model"]["vocab"])
    # The trainer leaves bytes that it has not seen, and pieces of one score, in an
    # order that is drawn anew each time; to a small vocabulary it gives too many.
    letters = splits.byte_letters()
    seen = {one: scored[one] for one, byte in letters.items() if num_V[byte]}
    floor = min([*seen.values(), 0.0]) - UNSEEN
    pieces = [p for p in scored if p not in letters and p not in special_tokens]
    pieces.sort(key=lambda piece: (-round(scored[piece], 9), piece))
    kept = seen | {p: scored[p] for p in pieces[: vocab_size - first - 256]}
    scores = {one: floor for one in letters} | kept
    ordered = [(piece, round(score, 9)) for piece, score in scores.items()]
    ordered.sort(key=lambda item: (-item[1], item[0]))
    spec["model"]["vocab"][first:] = ordered
    return json.dumps(spec, ensure_ascii=False)


def _counted(texts: Iterable[str], num_V: np.ndarray) -> Iterator[str]:
    """Yield texts, and count their bytes."""
    for text in texts:
        raw = np.frombuffer(text.encode(), np.uint8)
        num_V += np.bincount(raw, minlength=256)
        yield text


def _byte_level(model, pattern: str):
    """Return an untrained tokenizer of the bytes of pieces."""
    import tokenizers
    from tokenizers import Regex, decoders, pre_tokenizers

    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    return inner
