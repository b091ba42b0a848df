"""Where text comes from, by the data section of a config."""

import dataclasses
import functools
import os
from collections.abc import Iterator
from pathlib import Path

from fm_jax.corpora import digests, fields, files, formats, huggingface, tfds
from fm_jax.corpora import documents as shared
from fm_jax.corpora import synthetic as synthetic_text
from fm_jax.corpora.documents import Piece, Reader, Reading, Source
from fm_jax.corpora.fields import TextField
from fm_jax.errors import UserError, unknown

SPLITS = ("train", "eval")
KINDS = ("stdlib", "text", "tfds", "hf", "store", "synthetic")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Files:
    """Files of text, here or under URLs.

    `files[split]` maps a file's name to its path. When `eval_fraction` is positive both
    splits list the same files, and a hash of a document's text decides. `cache`: the
    folder that keeps what the files hold, so that they are hashed once.
    """

    files: dict[str, dict[str, str]]
    eval_fraction: float
    text_field: TextField
    cache: Path | None

    @property
    def is_held_out_apart(self) -> bool:
        """Whether eval documents come from other files than train's."""
        return not self.eval_fraction

    def pieces(self, split: str) -> list[Piece]:
        """Return the files' pieces, in order of the names.

        Raises UserError on a Parquet file without the column.
        """
        options = {"text_field": self.text_field, "cache": self.cache}
        return [
            piece
            for name, path in self.files[split].items()
            for piece in formats.pieces(name, path, self._known[path], **options)
        ]

    def share(self, split: str) -> tuple[float, float]:
        """Return the range of hashes, as fractions of 1, of the split's documents."""
        return shared.share(split, self.eval_fraction)

    def identity(self, split: str) -> dict:
        """Return what the split's documents follow from, contents included."""
        named = self.files[split]
        return {
            "files": {name: self._known[path].digest for name, path in named.items()},
            "split": split if self.eval_fraction else "all",
            "split_by": "blake2b of texts",
            "eval_fraction": self.eval_fraction,
            "text_field": fields.told(self.text_field),
        }

    def spec(self, split: str) -> dict:
        """Return what `open_reader` makes the reader from."""
        return {"kind": "files", "text_field": fields.told(self.text_field)}

    @functools.cached_property
    def _known(self) -> dict[str, digests.Known]:
        """What all files hold, each read once even where the splits share it."""
        every = {path for named in self.files.values() for path in named.values()}
        return digests.known(sorted(every), self.cache)


def make(
    *,
    source: str,
    paths: tuple[str, ...],
    eval_paths: tuple[str, ...],
    eval_fraction: float,
    name: str,
    tfds_dir: str,
    split: str,
    eval_split: str,
    text_field: TextField,
    synthetic: dict,
    cache: Path | None,
) -> Source:
    """Return the source that the data section of a config describes.

    text_field: the name of the text; or several, of which the JSON object of those that
    a row has is its text. synthetic: the fields of that section, for the source of this
    name. cache: where digests of files are kept. Raises UserError on files that are not
    there, or an unknown source; a ready store is opened, not made.
    """
    splits = {"name": name, "split": split, "eval_split": eval_split}
    options = {"text_field": text_field, "cache": cache, "eval_fraction": eval_fraction}
    makers = {
        "stdlib": lambda: _stdlib(**options),
        "text": lambda: _text(paths, eval_paths, **options),
        "tfds": lambda: tfds.make(data_dir=tfds_dir, **splits, **options),
        "hf": lambda: huggingface.make(**splits, **options),
        "synthetic": lambda: synthetic_text.make(**synthetic),
    }
    by_hash = {
        "stdlib": True,
        "text": not eval_paths,
        "tfds": split == eval_split,
        "hf": split == eval_split,
    }
    if source not in makers:
        raise unknown("data.source", source, KINDS)
    if by_hash.get(source) and not 0 < eval_fraction < 1:
        raise UserError(
            "data.eval_fraction must be between 0 and 1 when documents are split by a "
            f"hash of their text; got {eval_fraction}."
        )
    if source == "synthetic" and not fields.is_one(text_field):
        raise UserError(
            "data.source of examples must be one of text, tfds and hf; got synthetic, "
            "whose documents have no fields. fm data toy makes examples."
        )
    return makers[source]()


def open_reader(spec: dict) -> Reader:
    """Return the reader of a source's pieces, by its spec, in whatever process."""
    return READERS[spec["kind"]](spec)


def documents(
    source: Source,
    split: str,
    *,
    on_bad_text: str,
    max_document_bytes: int,
    at_most: int | None = None,
) -> Iterator[str]:
    """Yield the texts of a split, read in this process: all, or about `at_most` bytes.

    Raises UserError as the source's reader and a Reading do.
    """
    reading = Reading(on_bad_text=on_bad_text, max_document_bytes=max_document_bytes)
    for _, _, text in placed(source, split, reading, at_most=at_most):
        yield text


def placed(
    source: Source, split: str, reading: Reading, *, at_most: int | None = None
) -> Iterator[tuple[Piece, int, str]]:
    """Yield the texts of a split, each with its piece and its place in that.

    Of a corpus larger than `at_most` each piece gives its beginning, so that what has
    been taken keeps the pace of what has been passed. Raises UserError as the source's
    reader does.
    """
    read, (low, high) = open_reader(source.spec(split)), source.share(split)
    has_all = (low, high) == (0.0, 1.0)
    pieces, pace = source.pieces(split), 1.0
    if at_most is not None:
        pace = at_most / max(at_most, sum(piece.size for piece in pieces))
    taken = passed = 0
    for piece in pieces:
        passed += piece.size
        for place, text in read(piece, reading):
            if pace < 1 and taken >= pace * passed:
                break
            if has_all or low <= shared.fraction(shared.text_hash(text)) < high:
                taken += len(text)
                yield piece, place, text


def _stdlib(*, eval_fraction: float, **options) -> Files:
    found = files.stdlib_files()
    both = {"train": found, "eval": found}
    return Files(files=both, eval_fraction=eval_fraction, **options)


def _text(paths, eval_paths, *, eval_fraction: float, **options) -> Files:
    train = files.matching(paths, "data.paths")
    if not eval_paths:
        both = {"train": train, "eval": train}
        return Files(files=both, eval_fraction=eval_fraction, **options)
    held = files.matching(eval_paths, "data.eval_paths")
    real = {os.path.realpath(path) for path in train.values()}
    for path in held.values():
        if os.path.realpath(path) in real:
            raise UserError(
                "data.eval_paths must not be trained on; got a file of data.paths: "
                f"{path}. Take it out of one."
            )
    both = {"train": train, "eval": held}
    return Files(files=both, eval_fraction=0.0, **options)


READERS = {
    "files": lambda spec: formats.reader(spec["text_field"]),
    "tfds": tfds.reader,
    "hf": huggingface.reader,
    "synthetic": synthetic_text.reader,
}
