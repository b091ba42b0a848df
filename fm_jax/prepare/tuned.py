"""The examples of a config: rows of its source, as the rows that training reads."""

import contextlib
import dataclasses
import datetime
import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from fm_jax.config import Config
from fm_jax.corpora import documents, files, paths, sources
from fm_jax.corpora.documents import Piece, Reading, Source
from fm_jax.data import chats, example_store, labels, sides
from fm_jax.data.example_rows import ExampleRows
from fm_jax.data.example_store import ExampleStore, Row
from fm_jax.data.examples import Maker
from fm_jax.data.sides import Reader
from fm_jax.errors import UserError
from fm_jax.prepare import vocabulary
from fm_jax.tokenizers import special
from fm_jax.tokenizers import template as templates
from fm_jax.tokenizers.protocol import Tokenizer
from fm_jax.tokenizers.template import Template

# What templates are told, so that examples follow from files alone.
TODAY = datetime.datetime(2024, 7, 26)

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Tuned:
    """The rows of both splits, held-out ones by name, and what they were made with.

    `chat_template` is that of chats, "" where there are none. `label_ids` are the
    labels' words. `end_ids` end what a model says.
    """

    tokenizer: Tokenizer
    train: ExampleRows
    eval: dict[str, ExampleRows]
    labels: tuple[str, ...]
    label_ids: tuple[int, ...]
    begin_ids: tuple[int, ...]
    end_ids: tuple[int, ...]
    chat_template: str


def open_examples(config: Config, say: Say, *, may_build: bool = True) -> Tuned:
    """Return the examples of a config, making what the cache does not have.

    Raises UserError on what is no example, and on keys that do not go with examples.
    """
    data = config.data
    _refuse_bpe(config)
    fields = sides.fields(data.examples, data.fields)
    train, held_out = _sources(config, tuple(fields.values()))
    tokenizer = vocabulary.of(config, train, say, may_build=may_build)
    template = _template(config, tokenizer)
    if template and data.examples == "chat":
        say(f"Chats are written by {template.where}")
    reader = Reader(
        data.examples,
        fields,
        template,
        data.prompt,
        end_tokens=special.tokens(tokenizer) if template else (),
    )
    maker = Maker(reader, tokenizer, data.max_length, data.on_long)
    made = _Making(config, maker, train, held_out, say, may_build)
    stores = made.stores()
    found = stores["train"].labels
    rows = {
        name: ExampleRows(store, tokenizer, data.max_length, data.packing)
        for name, store in stores.items()
    }
    words, has_chats = data.label_words, stores["train"].header["num_chats"]
    ends = {i for store in stores.values() for i in store.header["end_ids"]}
    return Tuned(
        tokenizer,
        rows.pop("train"),
        {name.partition("/")[2]: held for name, held in rows.items()},
        labels=found,
        label_ids=labels.ids_of(words, found, tokenizer) if words else (),
        begin_ids=maker.begin_ids,
        end_ids=tuple(sorted({tokenizer.end_id, *ends})),
        chat_template=template.text if template and has_chats else "",
    )


def _refuse_bpe(config: Config) -> None:
    data = config.data
    if data.tokenizer == "bpe":
        raise UserError(
            "data.tokenizer must be the model's when data.examples is "
            f"{data.examples}; got bpe, which would be trained on them. Set "
            "--config.init.model=True, or data.tokenizer to RUN/tokenizer.json or "
            "bytes."
        )


def _sources(
    config: Config, names: tuple[str, ...]
) -> tuple[Source, dict[str, Source]]:
    """Return the source of training, and of each held-out part by its name."""
    data = config.data

    def make(eval_paths: tuple[str, ...]) -> Source:
        return sources.make(
            source=data.source,
            paths=data.paths,
            eval_paths=eval_paths,
            eval_fraction=data.eval_fraction,
            name=data.name,
            tfds_dir=data.tfds_dir,
            split=data.split,
            eval_split=data.eval_split,
            text_field=names,
            synthetic=dataclasses.asdict(config.synthetic),
            cache=Path(data.cache_dir).expanduser(),
        )

    whole = make(data.eval_paths)
    if data.source != "text" or not data.eval_paths:
        return whole, {"all": whole}
    found: dict[str, Source] = {}
    for pattern in data.eval_paths:
        for path in files.matching((pattern,), "data.eval_paths").values():
            name = Path(path).name
            stem = Path(name.removesuffix(paths.packing_of(name))).stem
            if stem in found:
                raise UserError(
                    "held-out files of examples must have names of their own; got two "
                    f"named {stem!r}, {path} among them. Rename one."
                )
            found[stem] = make((path,))
    return whole, found


def _template(config: Config, tokenizer: Tokenizer) -> Template | None:
    """Return the template of chats: the config's, else the tokenizer's, else a plain.

    The tokenizer's stands beside its file or in the run to begin from, or in a folder
    `hf` there, where a run that was imported has what it came with.
    """
    data, how = config.data, {"today": TODAY}
    if data.examples not in ("chat", "preference"):
        return None
    if importlib.util.find_spec("jinja2") is None and data.examples == "preference":
        return None  # of texts, which need none
    beside = [inner for folder in _folders(config) for inner in (folder, folder / "hf")]
    tokens = templates.named_tokens(tokenizer)
    if data.chat_template:
        for folder in reversed(beside):
            tokens |= templates.special_tokens(folder)
        file = Path(data.chat_template).expanduser()
        return Template(templates.read(file), tokens, file, **how)
    for folder in beside:
        if found := templates.find(folder, tokens, **how):
            return found
    return templates.plain(tokenizer, **how)


def _folders(config: Config) -> list[Path]:
    """Return the folders of the tokenizer's file and of what the run begins from."""
    found, given = [], config.init.from_
    if config.data.tokenizer != "bytes":
        found.append(Path(config.data.tokenizer).expanduser().parent)
    if given:
        name, _, _ = given.rpartition("@")
        is_step = name and not Path(given).expanduser().exists()
        found.append(Path(name if is_step else given).expanduser())
    return found


@dataclasses.dataclass(frozen=True)
class _Making:
    """What makes the stores of a config's examples."""

    config: Config
    maker: Maker
    train: Source
    held_out: dict[str, Source]
    say: Say
    may_build: bool

    def stores(self) -> dict[str, ExampleStore]:
        """Return the store of training, `train`, and each held-out one, `eval/name`.

        Labels are those of training, which held-out examples must have.
        """
        found = {"train": self._store("train", self.train, self.maker)}
        known = dataclasses.replace(self.maker, labels=found["train"].labels)
        for name, source in self.held_out.items():
            found[f"eval/{name}"] = self._store(f"eval/{name}", source, known)
        return found

    def _store(self, name: str, source: Source, maker: Maker) -> ExampleStore:
        data, split = self.config.data, name.partition("/")[0]
        reader = maker.reader
        identity = {
            "source": source.identity(split),
            "share": source.share(split),
            "kind": maker.kind,
            "fields": reader.fields,
            "tokenizer": maker.tokenizer.fingerprint,
            "template": reader.template.text if reader.template else "",
            "prompt": reader.prompt,
            "max_length": maker.max_length,
            "on_long": maker.on_long,
            "on_bad_text": data.on_bad_text,
            "max_document_bytes": data.max_document_bytes,
            "deduplicate": data.deduplicate,
            "labels": maker.labels if split == "eval" else (),
        }
        if split == "train" and source.is_held_out_apart:
            identity["without"] = source.identity("eval")
        return example_store.find_or_make(
            Path(data.cache_dir).expanduser() / "examples",
            identity,
            lambda: self._rows(source, split),
            lambda: self._labelled(maker, source) if split == "train" else maker,
            kind=maker.kind,
            split=name,
            skips=data.on_bad_text != "error",
            say=self.say,
            may_build=self.may_build,
        )

    def _labelled(self, maker: Maker, source: Source) -> Maker:
        """Return the maker with the labels of all training rows."""
        if maker.kind != "classify":
            return maker
        found = set()
        for piece, place, row in self._rows(source, "train"):
            # What a row lacks is told when examples are made.
            with contextlib.suppress(chats.BadRow):
                found.add(maker.reader.label_of(row, piece.where(place)))
        return dataclasses.replace(maker, labels=labels.in_order(found))

    def _rows(self, source: Source, split: str) -> Iterator[Row]:
        """Yield the rows of a split; of training none that is held out too."""
        held, seen = set(), set()
        if split == "train" and source.is_held_out_apart:
            for part in self.held_out.values():
                held |= {documents.text_hash(text) for _, _, text in
                         self._texts(part, "eval")}  # fmt: skip
        for piece, place, text in self._texts(source, split):
            if held or self.config.data.deduplicate:
                digest = documents.text_hash(text)
                if digest in held or digest in seen:
                    continue
                if self.config.data.deduplicate:
                    seen.add(digest)
            yield piece, place, json.loads(text, strict=False)

    def _texts(self, source: Source, split: str) -> Iterator[tuple[Piece, int, str]]:
        data = self.config.data
        reading = Reading(
            on_bad_text=data.on_bad_text, max_document_bytes=data.max_document_bytes
        )
        yield from sources.placed(source, split, reading)
        for kind, count in sorted(reading.skipped.items()):
            places = ", ".join(reading.examples[kind])
            self.say(f"WARNING: {split}: {count:,} rows left out, {kind}: {places}")
