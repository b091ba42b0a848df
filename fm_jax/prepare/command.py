"""What the fm data commands do: flags in, stores, text and files out."""

import contextlib
import errno
import json
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fm_jax import caches
from fm_jax.config import Config
from fm_jax.corpora import sources
from fm_jax.data import store
from fm_jax.data.visible import visible
from fm_jax.errors import UserError, reason
from fm_jax.prepare import opened


def build(config: Config, flags: Any) -> None:
    """Prepare the tokenizer and the stores of both splits, and print what they hold.

    Flags: out, json.
    """
    from fm_jax.data import summary
    from fm_jax.prepare import vocabulary

    source = _source(config)
    out = _new_stores(flags.out) if flags.out else None
    tokenizer = vocabulary.of(config, source, _say, may_build=True)
    stores = opened.build_stores(config, source, tokenizer, _say, out=out)
    if flags.json:
        shown = {
            split: {"path": str(stores[split].path), **summary.numbers(s.header)}
            for split, s in sorted(stores.items(), reverse=True)
        }
        print(json.dumps(shown, indent=1))
        return
    for split in ("train", "eval"):
        print(f"{split}: {stores[split].path}")
        for line in summary.lines(stores[split].header):
            print(f"  {line}")
    if out:
        data = {"source": "store", "paths": f'("{out}",)', "tokenizer": "store"}
        if config.data.eval_paths:  # of text
            data["eval_paths"] = "()"
        if config.data.end_token:
            data["end_token"] = ""
        _next("train", flags, data)


def show(config: Config, flags: Any) -> None:
    """Print what a step trains on, row by row, decoded. Flags: step, rows."""
    from fm_jax.prepare import show as shown

    size = config.train.batch_size
    last = config.train.steps or None
    if flags.step < 0 or (last and flags.step >= last):
        most = f" and below train.steps={last}" if last else ""
        raise UserError(f"--step must be at least 0{most}; got {flags.step}.")
    rows = _rows(flags.rows, size)
    data = opened.open_data(config, _say)
    every = np.arange(size)
    plan = opened.train_plan(data, config, num_steps=flags.step + 1, rows=every)
    names = data.train.names
    for line in shown.lines(plan, data.tokenizer, flags.step, rows=rows, names=names):
        print(line)


def verify(flags: Any) -> int:
    """Print what is wrong with stores; return 1 where anything is.

    A folder of both splits stands for its two stores.
    """
    from fm_jax.data import verify as verifying

    if not flags.positional:
        raise UserError("fm data verify must be given token stores; got none.")
    status = 0
    for path in [folder for asked in flags.positional for folder in _stores(asked)]:
        problems = verifying.verify(path)
        for problem in problems:
            print(f"{path}: {problem}")
            status = 1
        if not problems:
            header = store.open_store(path).header
            print(
                f"{path}: sound, {header['num_documents']:,} documents, "
                f"{header['num_tokens']:,} tokens, shards: {len(header['shards'])}"
            )
    return status


def overlap(flags: Any) -> None:
    """Print the n-grams that two stores share, or both of a folder. Flags: n, json."""
    import dataclasses

    from fm_jax.data import overlap as overlaps

    folders = [folder for asked in flags.positional for folder in _stores(asked)]
    if len(folders) != 2:
        raise UserError(
            "fm data overlap must be given two token stores, of training and of "
            f"held-out text; got {len(folders)}."
        )
    for folder in folders:
        if not (folder / "header.json").exists():
            raise UserError(
                f"a token store must have a header.json; got {folder} without one. "
                "fm data build makes them."
            )
    train, held_out = map(store.open_store, folders)
    found = overlaps.overlap(train, held_out, n=flags.n)
    if flags.json:
        print(json.dumps(dataclasses.asdict(found), indent=1))
    else:
        print("\n".join(overlaps.lines(found)))


def tokenizer(config: Config, flags: Any) -> None:
    """Train a tokenizer on the train text and write it.

    Flags: out, kind, vocab_size, special_token, digits, whitespace.
    """
    from fm_jax.prepare import vocabulary
    from fm_jax.tokenizers import training

    out = Path(flags.out).expanduser()
    size = flags.vocab_size or config.data.vocab_size
    source = _source(config)
    with _writing("--out must be a file that can be written", out):
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    _say(f"Training a tokenizer ({flags.kind}) of {size:,} ids on the train text")
    made = training.train(
        vocabulary.texts(config, source),
        kind=flags.kind,
        vocab_size=size,
        special_tokens=tuple(flags.special_token),
        digits=flags.digits,
        whitespace=flags.whitespace,
    )
    with _writing("--out must be a file that can be written", out):
        caches.write_whole(out, made.to_json())
    fewer = "" if made.vocab_size >= size else f", fewer than {size:,}: little text"
    print(f"{out}: {made.vocab_size:,} ids{fewer}")
    _next("data build", flags, {"tokenizer": str(out)})


def pack(config: Config, flags: Any) -> None:
    """Make the text of a config a TFDS dataset. Flags: out, name."""
    from fm_jax.corpora import packed

    made = packed.pack(
        _source(config),
        out=Path(flags.out).expanduser(),
        name=flags.name,
        on_bad_text=config.data.on_bad_text,
        max_document_bytes=config.data.max_document_bytes,
    )
    print(made)
    for split, met in json.loads((made / "metadata.json").read_text()).items():
        for line in _met(split, met):
            print(line)
    data = {"source": "tfds", "name": flags.name, "tfds_dir": flags.out}
    packed_as = {"split": "train", "eval_split": "validation", "text_field": "text"}
    for key, value in packed_as.items():
        if getattr(config.data, key) != value:
            data[key] = value
    _next("train", flags, data)


def bench(config: Config, flags: Any) -> None:
    """Print how fast data is tokenised and read. Flags: rounds, json."""
    from fm_jax.prepare import rates

    if flags.rounds < 1:
        raise UserError(f"--rounds must be >= 1; got {flags.rounds}.")
    found = rates.measure(config, rounds=flags.rounds, say=_say)
    if flags.json:
        print(json.dumps(found, indent=1))
        return
    for name, value in found.items():
        print(f"{name:44}{value:>14,.4g}")


def _source(config: Config):
    if config.data.source == "store":
        raise UserError(
            "data.source must be one of text, as text, hf or stdlib; got store, whose "
            "text is ids already."
        )
    return opened.source_of(config)


def _new_stores(asked: str) -> Path:
    """Return the folder that `--out` names, made. Nothing is tokenised for another."""
    out = Path(asked).expanduser()
    if (out / "header.json").exists():
        raise UserError(
            "--out must be a folder for the stores train and eval; got the token store "
            f"{out}. Name its parent, or another folder."
        )
    with _writing("--out must be a folder that can be written", out):
        out.mkdir(parents=True, exist_ok=True)
    return out


def _stores(asked: str) -> list[Path]:
    """Return the store that a path names, or those of a folder of both splits."""
    folder = Path(asked).expanduser()
    if not folder.is_dir():
        raise UserError(f"a token store must be a folder; got {asked!r}.")
    splits = [folder / split for split in sources.SPLITS]
    found = [split for split in splits if (split / "header.json").exists()]
    return [folder] if (folder / "header.json").exists() or not found else found


@contextlib.contextmanager
def _writing(demand: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{demand}; got {path} ({reason(error)}).") from error


def _met(split: str, met: dict) -> Iterator[str]:
    """Yield what was left out of a packed split, and what was mended."""
    for word in ("skipped", "replaced"):
        for kind, count in met[word].items():
            places = ", ".join(visible(place) for place in met["examples"][kind])
            yield f"  {split}: {word} {count:,} {kind}: {places}"
    if met["empty"]:
        yield f"  {split}: left out {met['empty']:,} without text"


def _next(command: str, flags: Any, data: dict[str, str]) -> None:
    """Print a command that goes on from here, with keys of the data section."""
    keys = (f"--config.data.{key}={shlex.quote(v)}" for key, v in data.items())
    config = shlex.quote(flags.config_file)
    print(f"next:\n  fm {command} --config={config} {' '.join(keys)}")


def _rows(asked: str, size: int) -> range:
    """Return the rows of a batch that `3` or `0:2` stands for; "" for all."""
    first, colon, last = asked.partition(":")
    try:
        start = int(first or 0)
        stop = int(last or size) if colon or not asked else start + 1
    except ValueError:
        start = stop = -1
    if not 0 <= start < stop <= size:
        raise UserError(
            f"--rows must be rows of a batch of {size}, as 3 or 0:2; got {asked!r}."
        )
    return range(start, stop)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
