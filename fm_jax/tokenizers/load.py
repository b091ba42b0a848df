"""The tokenizer in a file, whichever kind it is."""

import base64
from pathlib import Path

from fm_jax import jsonfiles
from fm_jax.errors import UserError, reason
from fm_jax.tokenizers import ranks
from fm_jax.tokenizers.jsonfile import JsonTokenizer
from fm_jax.tokenizers.plain import ByteTokenizer, SymbolTokenizer
from fm_jax.tokenizers.protocol import Tokenizer
from fm_jax.tokenizers.sentence import SentencePieceTokenizer

KINDS = "a tokenizer.json, a SentencePiece .model or a .tiktoken file"


def load(path: Path, *, end_token: str = "", end_id: int = -1) -> Tokenizer:
    """Return the tokenizer in a file, known by its content.

    A file is one of ours, as `to_json` writes it, a tokenizer.json of the `tokenizers`
    library, a SentencePiece model or a tiktoken file of ranks. `end_token` names what
    ends a document; `end_id` is its id, where a token store has it.

    Raises UserError when the file is missing or is not a tokenizer.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise OSError("no plain file")
        raw = path.read_bytes()
    except (OSError, ValueError) as error:  # the latter: of what no name can be
        raise UserError(
            "data.tokenizer must be bytes, bpe or the path of a tokenizer.json, "
            f"SentencePiece .model or .tiktoken file; got {str(path)!r} "
            f"({reason(error)})."
        ) from error
    named = {"end_token": end_token, "end_id": end_id}
    try:
        if ranks.LINE.match(raw):
            return ranks.from_file(path, raw, **named)
        if raw.lstrip()[:1] == b"{":
            return _from_json(raw.decode(), **named)
        if path.suffix == ".model" or raw[:1] == b"\n":  # the tag of its first field
            return SentencePieceTokenizer(raw, **named)
        raise ValueError("its beginning is that of none of them")
    except UserError:
        raise
    except Exception as error:  # the libraries raise bare ones
        said = " ".join(str(error).split())
        raise UserError(
            f"tokenizer file must be {KINDS}; got {str(path)!r} ({said})."
        ) from error


def _from_json(text: str, *, end_token: str, end_id: int) -> Tokenizer:
    fields = jsonfiles.parse(text)
    kind = fields.get("fm_jax_tokenizer")
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "symbols":
        return SymbolTokenizer(fields["num_symbols"])
    if kind == "ranks":
        return ranks.from_json(fields, end_token=end_token, end_id=end_id)
    if kind == "sentencepiece":
        if not end_token and end_id < 0:
            end_id = fields["end_id"]
        model = base64.b64decode(fields["model"])
        return SentencePieceTokenizer(model, end_token=end_token, end_id=end_id)
    return JsonTokenizer(text, end_token=end_token, end_id=end_id)
