"""Text to ids and back: bytes, BPE trained here, any tokenizer.json, or symbols."""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from fm_jax import caches
from fm_jax.corpora import synthetic
from fm_jax.errors import UserError

END = "<|endoftext|>"
KNOWN_ENDS = (END, "</s>", "<|end_of_text|>", "<eos>", "[SEP]")
# Words with their leading space, digits by threes, and runs of spaces kept whole, so
# that indentation is a token.
PIECES = r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\r?\n|[ \t]+(?!\S)|[ \t]+|\s"


class Tokenizer:
    """What every tokenizer gives: ids, text, the bytes of each id, and an end id.

    `end_id` stands before each document and after the last; no text encodes to it.
    `byte_lengths` [vocab_size] are the UTF-8 bytes that each id stands for.
    """

    vocab_size: int
    end_id: int
    byte_lengths: np.ndarray

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text, uint32, without special ids."""
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; bytes that are not UTF-8 are replaced."""
        raise NotImplementedError

    def to_json(self) -> str:
        """Return the text that `load` reads back."""
        raise NotImplementedError

    @functools.cached_property
    def fingerprint(self) -> str:
        """Return a digest of everything that decides the ids, the end id included."""
        decides = f"{self.end_id} {self.to_json()}"
        return hashlib.sha256(decides.encode()).hexdigest()[:16]


class ByteTokenizer(Tokenizer):
    """Ids 0 to 255 are bytes; 256 ends a document."""

    vocab_size = 257
    end_id = 256
    byte_lengths = np.array([1] * 256 + [0], np.int32)

    def encode_batch(self, texts):
        return [np.frombuffer(t.encode(), np.uint8).astype(np.uint32) for t in texts]

    def decode(self, ids):
        raw = bytes(i for i in map(int, ids) if i < 256)
        return raw.decode("utf-8", "replace")

    def to_json(self):
        return json.dumps({"fm_jax_tokenizer": "bytes"})


class SymbolTokenizer(Tokenizer):
    """An id for each character that a synthetic source writes, and one for the end."""

    def __init__(self, num_symbols: int):
        self.end_id, self.vocab_size = num_symbols, num_symbols + 1
        self._letters_V = synthetic.alphabet(num_symbols).astype("<u4")
        lengths = [len(chr(letter).encode()) for letter in self._letters_V]
        self.byte_lengths = np.array([*lengths, 0], np.int32)

    def encode_batch(self, texts):
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


class JsonTokenizer(Tokenizer):
    """A Hugging Face `tokenizers` tokenizer, from its JSON."""

    def __init__(self, text: str, *, end_token: str = ""):
        import tokenizers

        self._json = text
        self._inner = tokenizers.Tokenizer.from_str(text)
        # A document that spells a special token must not become one.
        self._inner.encode_special_tokens = True
        self._inner.no_truncation()
        self._inner.no_padding()
        self.vocab_size = 1 + max(self._inner.get_vocab().values())
        self.end_id = self._find_end(end_token)
        self.byte_lengths = self._byte_lengths()

    def encode_batch(self, texts):
        encoded = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        rows = [np.array(e.ids, np.uint32) for e in encoded]
        return [self._spell_ends(ids) if self.end_id in ids else ids for ids in rows]

    def decode(self, ids):
        ids = [i for i in map(int, ids) if i < self.vocab_size]
        return self._inner.decode(ids, skip_special_tokens=True)

    def to_json(self):
        return self._json

    def _spell_ends(self, ids: np.ndarray) -> np.ndarray:
        """Return ids with each end id, which text has spelt, in smaller pieces.

        A model whose vocabulary holds the end token, as Unigram's does, finds it in
        text by itself, whatever is said of special tokens.
        """
        places = np.flatnonzero(ids == self.end_id)
        spelling = np.array(self._end_spelling, np.uint32)
        parts = np.split(ids, places)
        return np.concatenate(
            [parts[0], *(p for q in parts[1:] for p in (spelling, q[1:]))]
        )

    @functools.cached_property
    def _end_spelling(self) -> list[int]:
        end, model = self._inner.id_to_token(self.end_id), self._inner.model
        pieces = [*model.tokenize(end[:1]), *model.tokenize(end[1:])]
        ids = [piece.id for piece in pieces]
        if self.end_id in ids:
            raise UserError(
                "data.end_token must be a token that no text encodes to; got "
                f"{end!r}, which the text has."
            )
        return ids

    def _find_end(self, end_token: str) -> int:
        for token in (end_token,) if end_token else KNOWN_ENDS:
            found = self._inner.token_to_id(token)
            if found is not None:
                return found
        raise UserError(
            "data.end_token must name the tokenizer's end-of-document token; got "
            f"{end_token!r}, and none of {', '.join(KNOWN_ENDS)} is in its vocabulary."
        )

    def _byte_lengths(self) -> np.ndarray:
        """Return bytes per id; text that a normalizer adds or drops is left over.

        The token store keeps what is left over, document by document, so that bits per
        byte stays exact for tokenizers whose ids have no fixed bytes.
        """
        spec = json.loads(self._json)
        special = {t["id"] for t in spec.get("added_tokens", ()) if t.get("special")}
        is_byte_level = '"ByteLevel"' in json.dumps(
            [spec.get("pre_tokenizer"), spec.get("decoder")]
        )
        lengths = np.zeros(self.vocab_size, np.int32)
        for token, index in self._inner.get_vocab().items():
            if index in special:
                continue
            if is_byte_level:  # its alphabet has one letter for each byte
                lengths[index] = len(token)
            elif len(token) == 6 and token.startswith("<0x"):
                lengths[index] = 1
            else:
                lengths[index] = len(token.replace("▁", " ").encode())
        return lengths


def load(path: Path, *, end_token: str = "") -> Tokenizer:
    """Return the tokenizer in a JSON file: one of ours, or a tokenizer.json.

    Raises UserError when the file is missing or is not a tokenizer.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            "data.tokenizer must be bytes, bpe or the path of a tokenizer.json; got "
            f"{str(path)!r} ({error})."
        ) from error
    try:
        ours = json.loads(text)
        if ours.get("fm_jax_tokenizer") == "bytes":
            return ByteTokenizer()
        if ours.get("fm_jax_tokenizer") == "symbols":
            return SymbolTokenizer(ours["num_symbols"])
        return JsonTokenizer(text, end_token=end_token)
    except UserError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise UserError(
            f"tokenizer file must be a tokenizer.json; got {str(path)!r} ({error})."
        ) from error


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
        "pieces": PIECES,
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
                    beside = path.with_name(f".{path.name}.{os.getpid()}")
                    beside.write_text(trained.to_json(), encoding="utf-8")
                    os.replace(beside, path)
        except OSError as error:
            raise UserError(
                f"data.cache_dir must be writable and have room; got {path} "
                f"({error.strerror})."
            ) from error
    return load(path)


def train_bpe(texts: Iterable[str], *, vocab_size: int) -> JsonTokenizer:
    """Return a byte-level BPE of `vocab_size` ids learnt from texts.

    Every byte has an id, so any text survives the round trip. Raises UserError below
    the 257 ids that bytes and the end of a document take.
    """
    import tokenizers
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise UserError(f"data.vocab_size must be >= 257 for BPE; got {vocab_size}.")
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer=trainer)
    return JsonTokenizer(inner.to_str())
