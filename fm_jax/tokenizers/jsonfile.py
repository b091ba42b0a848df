"""A tokenizer of the `tokenizers` library, from its JSON."""

import json
import threading
import warnings

import numpy as np

from fm_jax.errors import UserError
from fm_jax.tokenizers import fast, splits
from fm_jax.tokenizers.protocol import Tokenizer, check_count, find_end, num_bytes, told

FAST_FROM = 1 << 19  # bytes of a batch from which a faster encoder is worth its proof
COMPARED = 1 << 17  # characters which are then encoded both ways
# Characters of a text from which it is encoded in parts, where that is the same: the
# library takes more than a hundred bytes for each.
LONG = 1 << 20


class JsonTokenizer(Tokenizer):
    """A Hugging Face `tokenizers` tokenizer, from its JSON."""

    def __init__(self, text: str, *, end_token: str = "", end_id: int = -1):
        import tokenizers

        self._json = text
        self._inner = tokenizers.Tokenizer.from_str(text)
        ids = self._inner.get_vocab().values()  # its text goes through all below it
        self.vocab_size = check_count(1 + max(ids, default=-1))
        # A document that spells a special token must not become one.
        self._inner.encode_special_tokens = True
        self._inner.no_truncation()
        self._inner.no_padding()
        spec = self._spec()
        if spec["model"].get("dropout"):  # else ids would be drawn anew each time
            self._inner.model.dropout = None
        self.end_id = self._find_end(end_token, end_id)
        self.is_exact = _is_exact(spec)
        self.unknown_id = -1 if self.is_exact else self._find_unknown(spec["model"])
        special = {t["id"] for t in spec["added_tokens"] if t["special"]}
        is_end_special = self.end_id in special
        special = special - {self.unknown_id} | {self.end_id}
        self.special_ids = tuple(sorted(special))
        self._is_special_V = np.zeros(self.vocab_size, bool)
        self._is_special_V[list(special)] = True
        self._bytes_V = self._bytes_of_ids(spec)
        self.byte_lengths = np.array([len(b) for b in self._bytes_V], np.int32)
        self._is_split = fast.pattern_of(spec) is not None
        self._fast: fast.Encoder | None = None
        self._is_fast_known = not is_end_special  # it must keep out of text's ids
        self._lock = threading.Lock()

    def encode_batch(self, texts, *, num_threads=0):
        texts = list(texts)
        encoder = self._encoder(texts, sum(map(num_bytes, texts)))
        if encoder is None:
            return self._encode(texts)
        is_taken = [encoder.takes(text) for text in texts]
        taken = [text for text, is_it in zip(texts, is_taken, strict=True) if is_it]
        rest = [text for text, is_it in zip(texts, is_taken, strict=True) if not is_it]
        quick = iter(encoder.encode_batch(taken, num_threads=num_threads))
        slow = iter(self._encode(rest) if rest else ())
        return [next(quick if is_it else slow) for is_it in is_taken]

    def decode(self, ids):
        if self.is_exact:
            return self.decode_bytes(ids).decode(errors="replace")
        ids = [i for i in map(int, ids) if i < self.vocab_size]
        return self._inner.decode(ids, skip_special_tokens=True)

    def decode_bytes(self, ids):
        if not self.is_exact:
            return self.decode(ids).encode()
        known = (i for i in map(int, ids) if i < self.vocab_size)
        return b"".join(self._bytes_V[i] for i in known)

    def to_json(self):
        return self._json

    # ---- Encoding

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        """Return ids by the library itself, on all of its threads."""
        if not self._is_split or all(len(text) <= LONG for text in texts):
            return self._encode_whole(texts)
        rows = []
        for text in texts:
            parts, found = list(splits.parts(text, LONG // 4)), []
            for start in range(0, len(parts), 4):
                found += self._encode_whole(parts[start : start + 4])
            rows.append(np.concatenate(found))
        return rows

    def _encode_whole(self, texts: list[str]) -> list[np.ndarray]:
        with told():
            encoded = self._inner.encode_batch_fast(texts, add_special_tokens=False)
        rows = [np.array(e.ids, np.uint32) for e in encoded]
        return [self._spell(ids) if self._is_special_V[ids].any() else ids
                for ids in rows]  # fmt: skip

    def _encoder(self, texts: list[str], size: int) -> fast.Encoder | None:
        """Return what is faster, if anything is; found out at the first large batch."""
        if size < FAST_FROM and not self._is_fast_known:
            return None
        with self._lock:
            if not self._is_fast_known:
                found = fast.find(self._spec())
                self._fast = found and self._compared(found)
                self._is_fast_known = True
        return self._fast

    def _compared(self, encoder: fast.Encoder) -> fast.Encoder | None:
        """Return the encoder if a text of all tokens has the library's ids by it.

        The same text in every process that builds a store: they answer alike.
        """
        text = b" ".join(self._bytes_V).decode(errors="replace")[:COMPARED]
        some = [text] if encoder.takes(text) else []
        # On this thread: the first that uses an encoder has its regex to itself, which
        # is a fifth faster, and one of a pool would end at once.
        quick = encoder.encode_batch(some, num_threads=1)
        pairs = zip(quick, self._encode(some), strict=True)
        if all(np.array_equal(one, other) for one, other in pairs):
            return encoder
        warnings.warn(
            "tiktoken gives other ids than the tokenizers library, which is used now, "
            "several times slower. Please report it, with the tokenizer.json.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None

    def _spell(self, ids: np.ndarray) -> np.ndarray:
        """Return ids with each special id, which text has spelt, in smaller pieces.

        A model whose vocabulary holds a special token, as Unigram's does, finds it in
        text by itself, whatever is said of special tokens.
        """
        places = np.flatnonzero(self._is_special_V[ids])
        parts = np.split(ids, places)
        rows = [parts[0]]
        for part in parts[1:]:
            rows += [np.array(self._spelling(int(part[0])), np.uint32), part[1:]]
        return np.concatenate(rows)

    def _spelling(self, special_id: int) -> list[int]:
        token, model = self._inner.id_to_token(special_id), self._inner.model
        pieces = [*model.tokenize(token[:1]), *model.tokenize(token[1:])]
        found = []
        for piece in pieces:
            if not self._is_special_V[piece.id]:
                found.append(piece.id)
            elif len(token) > 1 and piece.id != self.unknown_id:
                found += self._spelling(piece.id)
            else:
                thing = "data.end_token" if piece.id == self.end_id else "special token"
                raise UserError(
                    f"{thing} must be a token that no text encodes to; got {token!r}, "
                    "which the text has."
                )
        return found

    # ---- What the file says

    def _spec(self) -> dict:
        """Return the file as the library has read it, nothing left to defaults."""
        return json.loads(self._inner.to_str())

    def _find_end(self, end_token: str, end_id: int) -> int:
        if end_id >= 0 and self._inner.id_to_token(end_id) is not None:
            return end_id
        return find_end(self._inner.token_to_id, end_token, "its vocabulary")

    def _find_unknown(self, model: dict) -> int:
        if model.get("unk_id") is not None:
            return model["unk_id"]
        token = model.get("unk_token")
        found = self._inner.token_to_id(token) if token else None
        return -1 if found is None else found

    def _bytes_of_ids(self, spec: dict) -> list[bytes]:
        """Return bytes by id; text that a normalizer adds or drops is left over.

        The token store keeps what is left over, document by document, so that bits per
        byte stays exact for tokenizers whose ids have no fixed bytes.
        """
        added = {t["id"]: t for t in spec["added_tokens"]}
        is_byte_level = '"ByteLevel"' in json.dumps(
            [spec["pre_tokenizer"], spec["decoder"]]
        )
        letters = splits.byte_letters()
        found = [b""] * self.vocab_size
        for token, index in self._inner.get_vocab().items():
            if index in added:
                if not added[index]["special"]:
                    found[index] = added[index]["content"].encode()
            elif is_byte_level and letters.keys() >= set(token):
                found[index] = bytes(letters[letter] for letter in token)
            elif len(token) == 6 and token.startswith("<0x"):
                found[index] = bytes([int(token[3:5], 16)])
            else:
                found[index] = token.replace("▁", " ").encode()
        for index in {*self.special_ids, self.unknown_id} - {-1}:
            found[index] = b""
        return found


def _is_exact(spec: dict) -> bool:
    """Return whether any text comes back as it was: all its bytes are in the ids."""
    steps = spec["pre_tokenizer"] or {}
    *before, last = steps.get("pretokenizers") or [steps]
    model = spec["model"]
    vocab = model.get("vocab", {})
    tokens = set(vocab) if isinstance(vocab, dict) else {token for token, _ in vocab}
    added = spec["added_tokens"]
    return (
        not spec["normalizer"]
        and last.get("type") == "ByteLevel"
        and not last["add_prefix_space"]
        and all(
            step["type"] == "Digits"
            or (step["type"] == "Split" and step["behavior"] != "Removed")
            for step in before
        )
        and model.get("type") in ("BPE", "Unigram")
        and not model.get("continuing_subword_prefix")
        and not model.get("end_of_word_suffix")
        and tokens >= splits.byte_letters().keys()
        and not any(t["lstrip"] or t["rstrip"] for t in added if not t["special"])
    )
