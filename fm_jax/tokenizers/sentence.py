"""A SentencePiece model, run by its own library."""

import base64
import json

import numpy as np

from fm_jax.errors import UserError
from fm_jax.tokenizers.protocol import Tokenizer, find_end, num_bytes


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model: Unigram or BPE of normalised text, a `.model` file.

    Never exact: it normalises text, and writes a space as a letter of its own. A piece
    stands for its letters, a byte piece for its byte. The space that most models put
    before a text is not text: it is left over, and negative, in the token store.
    """

    def __init__(self, model: bytes, *, end_token: str = "", end_id: int = -1):
        try:
            import sentencepiece
        except ImportError as error:
            raise UserError(
                "a SentencePiece model must be read by its library; got none. "
                "pip install 'fm_jax[text]'"
            ) from error
        self._model = model
        self._inner = sentencepiece.SentencePieceProcessor()
        self._inner.load_from_serialized_proto(model)
        self.vocab_size = self._inner.vocab_size()
        self.unknown_id = self._inner.unk_id()
        ids = range(self.vocab_size)
        controls = {i for i in ids if self._inner.is_control(i)}
        self.end_id = self._find_end(end_token, end_id, controls)
        self.special_ids = tuple(sorted(controls))
        self.special_tokens = {self._inner.id_to_piece(i): i for i in self.special_ids}
        self.byte_lengths = np.array([self._num_bytes(i) for i in ids], np.int32)

    def encode_batch(self, texts, *, num_threads=0):
        for text in texts:
            num_bytes(text)
        rows = self._inner.encode(
            list(texts), out_type=int, num_threads=num_threads or -1
        )
        return [np.array(ids, np.uint32) for ids in rows]

    def decode(self, ids):
        return self._inner.decode([i for i in map(int, ids) if i < self.vocab_size])

    def to_json(self):
        model = base64.b64encode(self._model).decode()
        kind = "sentencepiece"
        return json.dumps(
            {"fm_jax_tokenizer": kind, "end_id": self.end_id, "model": model}
        )

    def _find_end(self, end_token: str, end_id: int, controls: set[int]) -> int:
        """Return the end id: a control symbol, for text spells other pieces."""
        if end_id in controls:
            return end_id
        named = {self._inner.id_to_piece(i): i for i in sorted(controls)}
        if not end_token and self._inner.eos_id() >= 0:
            return self._inner.eos_id()
        return find_end(named.get, end_token, "its control symbols")

    def _num_bytes(self, index: int) -> int:
        inner = self._inner
        if inner.is_control(index) or inner.is_unknown(index) or inner.is_unused(index):
            return 0
        if inner.is_byte(index):
            return 1
        return len(inner.id_to_piece(index).replace("▁", " ").encode())
