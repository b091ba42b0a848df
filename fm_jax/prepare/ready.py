"""Token stores that are there already: found, named, and checked against each other."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fm_jax.data import store
from fm_jax.data.store import TokenStore
from fm_jax.errors import UserError
from fm_jax.tokenizers import load
from fm_jax.tokenizers.protocol import Tokenizer

Folders = dict[str, list[tuple[str, Path]]]


def find(
    paths: tuple[str, ...], eval_paths: tuple[str, ...]
) -> tuple[Tokenizer, Folders]:
    """Return the tokenizer that stores share, and (name, folder) of each by split.

    A path is a store, or a folder with the stores `train` and `eval`. Raises UserError
    where there is none, two have one name or one is in both splits, or their tokenizers
    differ.
    """
    if not paths:
        raise UserError(
            "data.paths must name token stores; got none. Example: "
            "--config.data.paths='(\"stores/mine\",)'. fm data build --out makes them."
        )
    found = {
        "train": [_train(path) for path in paths],
        "eval": [_held_out(p) for p in eval_paths] or [_beside(p) for p in paths],
    }
    for split, stores in found.items():
        names = [name for name, _ in stores]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise UserError(
                f"token stores of a mixture must have names of their own; got two "
                f"{split} stores named {twice!r}. Rename a folder."
            )
    trained = {path for _, path in found["train"]}
    both = next((path for _, path in found["eval"] if path in trained), None)
    if both:
        raise UserError(
            f"a token store must not be both trained on and held out; got {both}. Take "
            "it out of data.paths or data.eval_paths."
        )
    opened = [store.open_store(path) for stores in found.values() for _, path in stores]
    first = opened[0]
    for other in opened[1:]:
        if other.header["tokenizer"] != first.header["tokenizer"]:
            raise UserError(
                "token stores of one run must share a tokenizer; got "
                f"{first.path} made with {first.header['tokenizer']}, {other.path} "
                f"with {other.header['tokenizer']}. Build both with one tokenizer file."
            )
    file, end_id = first.path / "tokenizer.json", first.header["end_id"]
    return load.load(file, end_id=end_id), found


def _train(path: str) -> tuple[str, Path]:
    return _named(_folder(path, "train", "data.paths"))


def _held_out(path: str) -> tuple[str, Path]:
    return _named(_folder(path, "eval", "data.eval_paths"))


def _beside(path: str) -> tuple[str, Path]:
    """Return the held-out store that goes with a training store."""
    folder = _folder(path, "train", "data.paths").parent / "eval"
    if not _is_store(folder):
        raise UserError(
            f"a token store to train on must have its held-out one in {folder}; got "
            "nothing there. Name one in --config.data.eval_paths."
        )
    return _named(folder)


def _folder(path: str, split: str, key: str) -> Path:
    folder = Path(path).expanduser().resolve()
    for found in (folder / split, folder):
        if _is_store(found):
            return found
    raise UserError(
        f"{key} must name token stores; got {path!r}, which has no header.json, and no "
        f"folder {split} with one. fm data build --out makes them."
    )


def _is_store(folder: Path) -> bool:
    return (folder / "header.json").exists()


def _named(folder: Path) -> tuple[str, Path]:
    """Return a store with its name: that of the folder of both splits, or its own."""
    is_split = folder.name in ("train", "eval")
    return (folder.parent if is_split else folder).name, folder


def shared_documents(
    train: Sequence[TokenStore], held_out: Sequence[TokenStore]
) -> int:
    """Return how many training documents have the text of a held-out one."""
    words = np.sort(np.concatenate([s.hashes[:, 0] for s in held_out]))
    return sum(
        int(np.isin(some, words, kind="sort").sum())
        for s in train
        for some in np.array_split(s.hashes[:, 0], 1 + len(s.hashes) // 2**22)
    )
