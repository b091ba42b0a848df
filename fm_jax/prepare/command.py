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

    if config.data.examples != "text":
        _build_examples(config, flags)
        return
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


def _build_examples(config: Config, flags: Any) -> None:
    """Make the examples of a config in the cache, and print what they are."""
    from fm_jax.data import example_store

    if flags.out:
        raise UserError(
            "--out must be of data.examples=text; got "
            f"{config.data.examples}, whose examples stay in data.cache_dir."
        )
    data = opened.open_data(config, _say)
    named = zip(data.eval.names, data.eval.stores, strict=True)
    found = {"train": data.train.stores[0], **{f"eval/{n}": s for n, s in named}}
    if flags.json:
        told = {name: {"path": str(s.path), **s.header} for name, s in found.items()}
        print(json.dumps(told, indent=1))
        return
    for name, held in found.items():
        print(f"{name}: {held.path}")
        for line in example_store.lines(held.header, name):
            print(f"  {line.removeprefix(f'{name}: ')}")


def show(config: Config, flags: Any) -> None:
    """Print what a step trains on, row by row, decoded. Flags: step, rows, colour."""
    from fm_jax.prepare import show as shown

    size = config.train.batch_size
    last = config.train.steps or None
    if flags.step < 0 or (last and flags.step >= last):
        most = f" and below train.steps={last}" if last else ""
        raise UserError(f"--step must be at least 0{most}; got {flags.step}.")
    rows, colour = shown.chosen(flags.rows, size), shown.in_colour(flags.colour)
    data = opened.open_data(config, _say)
    every = np.arange(size)
    plan = opened.train_plan(data, config, num_steps=flags.step + 1, rows=every)
    told = {"names": data.train.names, "labels": data.labels, "colour": colour}
    for line in shown.lines(plan, data.tokenizer, flags.step, rows=rows, **told):
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


def toy(flags: Any) -> None:
    """Write toy data. Flags: kind, out, seed, size, draw, spurious."""
    from fm_jax.prepare import toys

    knobs = {"draw": flags.draw} if flags.draw else {}
    knobs |= {"spurious": flags.spurious} if flags.spurious != -1 else {}
    out = Path(flags.out).expanduser()
    made = toys.make(flags.kind, out, seed=flags.seed, size=flags.size, **knobs)
    for path in made.values():
        with open(path, "rb") as lines:
            print(f"{path}: {sum(1 for _ in lines):,} rows")
    flags.config_file = "configs/quickstart.py"
    _next("data show", flags, toys.data_keys(flags.kind, made))


def _source(config: Config):
    if config.data.source == "store":
        raise UserError(
            "data.source must be one of text, as text, hf or stdlib; got store, whose "
            "text is ids already."
        )
    if config.data.examples != "text":
        raise UserError(
            "data.examples must be text where documents are asked for; got "
            f"{config.data.examples}. Set --config.data.examples=text."
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
    """Print a command that goes on from here, with keys of the data section.

    Those of others have a dot: "finetune.preference".
    """
    named = {key if "." in key else f"data.{key}": v for key, v in data.items()}
    keys = (f"--config.{key}={shlex.quote(v)}" for key, v in named.items())
    config = shlex.quote(flags.config_file)
    print(f"next:\n  fm {command} --config={config} {' '.join(keys)}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
