"""The tokenizer of a config: one that needs no text, a file's, or one trained on it."""

from collections.abc import Iterator
from pathlib import Path

from fm_jax.config import Config
from fm_jax.corpora import sources
from fm_jax.corpora.documents import Reading, fraction, text_hash
from fm_jax.tokenizers import load, plain, training
from fm_jax.tokenizers.protocol import Tokenizer

# A tokenizer learns from this much text at most, evenly taken from a larger corpus.
TRAINING_BYTES = 1 << 28


def of(config: Config, source: sources.Source, say, *, may_build: bool) -> Tokenizer:
    """Return the tokenizer of a config, trained on its train split where asked for.

    Raises UserError on a file that is no tokenizer, and on one that is not there and
    may not be trained now.
    """
    data = config.data
    if data.tokenizer == "bytes":
        return plain.ByteTokenizer()
    if data.tokenizer == "symbols":
        return plain.SymbolTokenizer(config.synthetic.num_symbols)
    if data.tokenizer != "bpe":
        return load.load(Path(data.tokenizer).expanduser(), end_token=data.end_token)

    def learn_from() -> Iterator[str]:
        source.pieces("eval")  # what is wrong with it is told before a long training
        return texts(config, source)

    return training.find_or_train_bpe(
        Path(data.cache_dir).expanduser(),
        learn_from,
        vocab_size=data.vocab_size,
        identity=source.identity("train")
        | {
            "share": source.share("train"),
            "on_bad_text": data.on_bad_text,
            "max_document_bytes": data.max_document_bytes,
            "at_most": TRAINING_BYTES,
        },
        say=say,
        may_build=may_build,
    )


def texts(
    config: Config, source: sources.Source, *, at_most: int = TRAINING_BYTES
) -> Iterator[str]:
    """Yield training text, `at_most` bytes of it, from all over the corpus.

    Of a larger corpus each piece gives its beginning, so that what has been taken keeps
    the pace of what has been passed.
    """
    reader = sources.open_reader(source.spec("train"))
    reading = Reading(
        on_bad_text=config.data.on_bad_text,
        max_document_bytes=config.data.max_document_bytes,
    )
    low, high = source.share("train")
    has_all = (low, high) == (0.0, 1.0)
    pieces = source.pieces("train")
    pace = at_most / max(at_most, sum(piece.size for piece in pieces))
    taken = passed = 0
    for piece in pieces:
        passed += piece.size
        for _, text in reader(piece, reading):
            if pace < 1 and taken >= pace * passed:
                break
            if has_all or low <= fraction(text_hash(text)) < high:
                taken += len(text)
                yield text
