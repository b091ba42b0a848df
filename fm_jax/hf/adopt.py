"""A run takes its base's architecture and tokenizer, and what stands beside weights.

The base is a run of ours, or a checkpoint folder of theirs, which becomes a run in the
cache once its weights are needed. Imports no jax before then.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from fm_jax import caches, configfile, jsonfiles
from fm_jax.errors import UserError, reason
from fm_jax.hf import carried, described
from fm_jax.runs import RECORD, Run
from fm_jax.tokenizers import load as tokenizers
from fm_jax.tokenizers import template

# What says how a model is calculated, not what it is: it stays the user's.
OWN = ("dtype", "residual_dtype", "remat", "remat_names")


def adopted(raw: dict) -> dict:
    """Return nested config dicts with the base's model section and tokenizer.

    As they came where `init.from` is empty or `init.model` is not set. Of the model
    section `OWN` stays; data.tokenizer and data.end_token are the base's whatever they
    were, for their defaults look like a choice, but for sources that bring their ids
    with them (store, synthetic): those are compared when the weights are read. All
    else stays the user's. No weight is read. Raises UserError when there is no such
    base.
    """
    sections = [raw.get(name) for name in ("init", "model", "data")]
    if not all(isinstance(section, dict) for section in sections):
        return raw  # the checks of a config refuse it
    init, own, text = sections
    if init.get("model") is not True or not init.get("from"):
        return raw
    path = _path(init["from"])
    model, data = _of_folder(path) if is_checkpoint(path) else _of_run(path)
    model = {name: value for name, value in model.items() if name not in OWN}
    if text.get("source") in ("store", "synthetic"):
        data = {}
    return raw | {"model": own | model, "data": text | data}


def is_checkpoint(path: Path) -> bool:
    """Return whether a folder is a checkpoint of theirs: no run, with a model_type."""
    if not (path / carried.CONFIG).is_file():
        return False
    try:
        fields = jsonfiles.read(path / carried.CONFIG)
    except UserError:
        return False
    return "model_type" in fields and not fields.keys() >= RECORD


def as_run(folder: Path, cache: Path, say: Callable[[str], None]) -> Path:
    """Return a run's path as it is, and of a checkpoint folder that of a run of it.

    That is made in `cache` once for what the folder holds now, by one process at a
    time. Raises UserError as importing does.
    """
    if not is_checkpoint(folder):
        return folder
    path = (
        cache.expanduser() / "imported" / f"{folder.resolve().name}-{_digest(folder)}"
    )
    with caches.made_by_one(path):
        if Run(path).done_step() == 0 and not Run(path).exists():
            from fm_jax.hf import importing  # it brings jax

            command = ["fm", "import", f"--hf={folder}", f"--out={path}"]
            importing.bring(folder, path, tokenizer="", command=command, say=say)
    return path


def carry(base: Path, run: Path) -> None:
    """Copy what came beside the weights of a base run into one fine-tuned from it.

    The names and dtypes of their tensors are among it, their weights are not. Nothing
    where the base was trained here.
    """
    carry_template(base, run)
    kept = base / "hf"
    if not (kept / carried.WEIGHTS).is_file():
        return
    carried.copy(kept, run / "hf")
    shutil.copyfile(kept / carried.WEIGHTS, run / "hf" / carried.WEIGHTS)


def carry_template(there: Path, here: Path) -> None:
    """Copy the chat template of a run, or beside an adapter, to another folder."""
    if (there / template.FILE).is_file():
        shutil.copyfile(there / template.FILE, here / template.FILE)


def _path(given: str) -> Path:
    """Return the folder of RUN[@STEP]. Raises UserError on what no path can be."""
    name, _, step = given.rpartition("@")
    try:
        found = Path(given if not name or "/" in step else name).expanduser()
        found.exists()
    except (OSError, RuntimeError) as error:  # the latter: of whose home it is
        raise UserError(
            "config.init.from must be RUN[@STEP] or a Hugging Face folder; got "
            f"{given[:80]!r} ({reason(error)})."
        ) from error
    return found


def _of_run(path: Path) -> tuple[dict, dict]:
    """Return the model section of a run as resolved, and its tokenizer's keys."""
    if not path.is_dir():
        raise UserError(
            "config.init.from must be RUN[@STEP] or a Hugging Face folder; got "
            f"{path}, {'a file' if path.exists() else 'which does not exist'}."
        )
    try:
        record = configfile.read_run(Run(path))
    except UserError as error:
        raise UserError(
            f"config.init.from must be RUN[@STEP] or a Hugging Face folder; {error}"
        ) from error
    resolved, keys = record["resolved"]["model"], record["config"]
    model = {name: resolved[name] for name in keys["model"]}
    data = keys["data"]
    if data["tokenizer"] == "bytes":
        return model, {"tokenizer": "bytes", "end_token": ""}
    file = path.absolute() / "tokenizer.json"
    end_token = data["end_token"]
    if data["tokenizer"] == "store":  # the store knew its end id
        end_id = record["data"].get("end_id", -1)
        end_token = described.end_token(tokenizers.load(file, end_id=end_id))
    return model, {"tokenizer": str(file), "end_token": end_token}


def _of_folder(path: Path) -> tuple[dict, dict]:
    """Return the model section of a checkpoint folder, and its tokenizer's keys."""
    names = [name for name in carried.TOKENIZERS if (path / name).is_file()]
    if not names:
        raise UserError(
            "config.init.from must have a tokenizer, to take its model; got no "
            f"{' or '.join(carried.TOKENIZERS)} in {path}. Import it with one: fm "
            "import --tokenizer=FILE."
        )
    found = described.read(path)
    file = path.absolute() / names[0]
    again = tokenizers.load(file, end_token=found.end_token)
    if again.fingerprint != found.tokenizer.fingerprint:
        raise UserError(
            f"config.init.from must have a tokenizer whose file says what ends a text; "
            f"got {file}. Import it, and begin from the run: fm import --hf={path}."
        )
    return found.model(), {"tokenizer": str(file), "end_token": found.end_token}


def _digest(folder: Path) -> str:
    """Return a digest of a folder's files, by name, size and time, and its config."""
    files = sorted(file for file in folder.iterdir() if file.is_file())
    seen = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    config = (folder / carried.CONFIG).read_text(encoding="utf-8")
    return hashlib.sha256(json.dumps([seen, config]).encode()).hexdigest()[:16]
