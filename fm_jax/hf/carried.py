"""What stands beside weights in a checkpoint folder, and is carried both ways.

A run that was imported keeps these files, as they came, in its folder `hf`, and beside
them weights.json: the family, and each tensor's name and dtype. Imports no jax.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from fm_jax import jsonfiles
from fm_jax.errors import UserError
from fm_jax.runs import Run
from fm_jax.tokenizers import load as tokenizers
from fm_jax.tokenizers.protocol import Tokenizer

CONFIG, GENERATION = "config.json", "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TEXTS = ("tokenizer.json", "tokenizer.model", "special_tokens_map.json",
         "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt",
         "spiece.model")  # fmt: skip
FILES = (CONFIG, GENERATION, TOKENIZER_CONFIG, *TEXTS, "chat_template.jinja",
         "chat_template.json", "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE",
         "NOTICE.txt")  # fmt: skip
TOKENIZERS = ("tokenizer.json", "tokenizer.model")  # which we read, the first there is
WEIGHTS = "weights.json"
KEPT = {"family": str, "names": {"*": [str]}, "kinds": {"*": str}}


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where an imported run came from.

    config: of theirs. tensors: dtype by name, as the format has it. A tensor that stood
    there under several names has them all in `names`, by the family's name for it.
    """

    folder: Path
    family: str
    config: dict[str, Any]
    names: dict[str, list[str]]
    kinds: dict[str, str]


def write_json(file: Path, fields: dict[str, Any]) -> None:
    """Write a JSON object, as people read it."""
    text = json.dumps(fields, indent=2, ensure_ascii=False) + "\n"
    file.write_text(text, encoding="utf-8")


def copy(folder: Path, into: Path, *, but: tuple[str, ...] = ()) -> None:
    """Copy the files that are carried, no code among them, to another folder."""
    into.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if name not in but and (folder / name).is_file():
            shutil.copyfile(folder / name, into / name)


def keep(origin: Origin) -> None:
    """Write weights.json of a run."""
    fields = {"family": origin.family, "names": origin.names, "kinds": origin.kinds}
    write_json(origin.folder / WEIGHTS, fields)


def origin_of(run: Run) -> Origin | None:
    """Return where a run was imported from, or None where it was trained here."""
    folder = run.path / "hf"
    if not (folder / WEIGHTS).exists():
        return None
    said = jsonfiles.read(folder / WEIGHTS, form=KEPT)
    config = jsonfiles.read(folder / CONFIG)
    return Origin(folder, said["family"], config, said["names"], said["kinds"])


def tokenizer_of(folder: Path, given: str, config: dict) -> Tokenizer:
    """Return the tokenizer of a checkpoint folder, or the one that is given.

    given: bytes, a tokenizer's file, or "". What ends a document is what the folder
    says. Raises UserError when there is none.
    """
    token, index = _end(folder, config)
    if given == "bytes":
        return _bytes()
    if given and not Path(given).is_file():
        raise UserError(f"--tokenizer must be a file or bytes; got {given!r}.")
    if given:
        return _with_end(Path(given), token, index)
    for name in TOKENIZERS:
        if (folder / name).is_file():
            return _with_end(folder / name, token, index)
    raise UserError(
        f"a checkpoint must have {' or '.join(TOKENIZERS)}; got neither in {folder}. "
        "Give one: --tokenizer=FILE, or --tokenizer=bytes."
    )


def special_id(folder: Path, config: dict, name: str) -> int | None:
    """Return bos_token_id or the like of a checkpoint, of several the first."""
    for fields in (config, jsonfiles.read(folder / GENERATION, must=False)):
        ids = fields.get(name)
        first = ids[0] if isinstance(ids, list) and ids else ids
        if type(first) is int and first >= 0:
            return first
    return None


def _end(folder: Path, config: dict) -> tuple[str, int]:
    """Return the token that ends a document and its id; "" and -1 where not said."""
    token = jsonfiles.read(folder / TOKENIZER_CONFIG, must=False).get("eos_token")
    if isinstance(token, dict):  # an added token, with how it strips
        token = token.get("content")
    index = special_id(folder, config, "eos_token_id")
    return token if isinstance(token, str) else "", -1 if index is None else index


def _with_end(file: Path, token: str, index: int) -> Tokenizer:
    try:
        return tokenizers.load(file, end_id=index)
    except UserError:  # no such id, and none of the usual names
        return tokenizers.load(file, end_token=token)


def _bytes() -> Tokenizer:
    from fm_jax.tokenizers.plain import ByteTokenizer

    return ByteTokenizer()
