"""What a checkpoint folder says of a run: its model and tokenizer, no weight read yet.

Imports no jax.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from fm_jax import configfile, jsonfiles
from fm_jax.hf import carried, families, vocabulary
from fm_jax.hf.family import Family
from fm_jax.tokenizers.jsonfile import JsonTokenizer
from fm_jax.tokenizers.protocol import Tokenizer


@dataclasses.dataclass(frozen=True)
class Described:
    """A folder's config.json (`theirs`), its family, and `fields` of a ModelConfig.

    end_token: what ends a document as text, "" where the tokenizer's file says so.
    """

    theirs: dict[str, Any]
    family: Family
    fields: dict[str, Any]
    tokenizer: Tokenizer
    end_token: str

    def model(self) -> dict[str, Any]:
        """Return the model section of a config, the base's where nothing is said."""
        return configfile.load_base()["model"] | self.fields


def read(folder: Path, tokenizer: str = "") -> Described:
    """Return what a folder says of itself.

    tokenizer: a tokenizer's file, or bytes, where the folder's is not to be used.
    Raises UserError on a config.json that is no decoder of ours, or without tokenizer.
    """
    theirs = jsonfiles.read(folder / carried.CONFIG)
    family, fields = families.read(theirs)
    text = carried.tokenizer_of(folder, tokenizer, theirs)
    is_bytes = tokenizer == "bytes"
    return Described(theirs, family, fields, text, "" if is_bytes else end_token(text))


def end_token(tokenizer: Tokenizer) -> str:
    """Return what ends a document as text, "" where the tokenizer's file says so."""
    if not isinstance(tokenizer, JsonTokenizer):
        return ""
    return vocabulary.token(json.loads(tokenizer.to_json()), tokenizer.end_id)
