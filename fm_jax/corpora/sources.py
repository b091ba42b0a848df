"""Where text comes from: documents with names, split into train and held-out."""

import dataclasses
import functools
import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from fm_jax.corpora import files as text_files
from fm_jax.corpora import synthetic as synthetic_text
from fm_jax.errors import UserError, unknown

SPLITS = ("train", "eval")
KINDS = ("stdlib", "text", "tfds", "synthetic")
ON_BAD_TEXT = ("error", "skip", "replace")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Files:
    """Text files: a document each, or a document a line for .jsonl.

    `files[split]` maps a document's name to its path. When `eval_fraction` is positive
    both splits list the same files, and a hash of the document's name decides.
    """

    files: dict[str, dict[str, Path]]
    eval_fraction: float
    text_field: str
    on_bad_text: str

    def documents(self, split: str) -> Iterator[str]:
        """Yield the texts of a split, in name order.

        Raises UserError naming file, place and remedy for what cannot be read.
        """
        for name, path in self.files[split].items():
            for document, text in self._texts(name, path):
                if self.eval_fraction and not self._is_in(document, split):
                    continue
                yield text

    def identity(self, split: str) -> dict:
        """Return what the split's documents follow from, contents included."""
        files = self.files[split]
        return {
            "files": {name: self._digests[path] for name, path in files.items()},
            "split": split if self.eval_fraction else "all",
            "split_by": "blake2b of names",
            "eval_fraction": self.eval_fraction,
            "text_field": self.text_field,
            "on_bad_text": self.on_bad_text,
        }

    @functools.cached_property
    def _digests(self) -> dict[Path, str]:
        """Digests of all files, each read once even where the splits share it."""
        paths = {p for files in self.files.values() for p in files.values()}
        return {path: text_files.digest(path) for path in sorted(paths)}

    def _is_in(self, document: str, split: str) -> bool:
        held_out = name_fraction(document) < self.eval_fraction
        return held_out == (split == "eval")

    def _texts(self, name: str, path: Path) -> Iterator[tuple[str, str]]:
        is_lines = text_files.text_suffix(path) == ".jsonl"
        with text_files.open_text(path) as stream:
            try:
                if not is_lines:
                    text = self._decode(stream.read(), path, 0)
                    if text:
                        yield name, text
                    return
                offset = 0
                for number, line in enumerate(stream, start=1):
                    text = self._line_text(line, path, number, offset)
                    offset += len(line)
                    if text:
                        yield f"{name}#{number}", text
            except (OSError, EOFError, zlib.error) as error:
                raise UserError(
                    f"data file must be readable; got {path} ({error}). "
                    "Restore it or take it out of data.paths."
                ) from error

    def _decode(self, raw: bytes, path: Path, offset: int) -> str | None:
        return decode(raw, self.on_bad_text, "data file", f"{path}", offset)

    def _line_text(self, line: bytes, path, number, offset) -> str | None:
        decoded = self._decode(line, path, offset)
        if not decoded or not decoded.strip():
            return None
        problem = None
        try:
            row = json.loads(decoded)
            if isinstance(row, dict) and isinstance(row.get(self.text_field), str):
                text = row[self.text_field]
                if self.on_bad_text == "replace":
                    return text.encode("utf-8", "replace").decode()
                text.encode()
                return text
            problem = f"no text under {self.text_field!r}"
        except UnicodeEncodeError as error:  # JSON may spell half of a surrogate pair
            problem = f"not UTF-8: {error}"
        except (ValueError, RecursionError) as error:
            problem = f"not JSON: {error}"
        if self.on_bad_text == "skip":
            return None
        raise UserError(
            f"data line must be an object with text under {self.text_field!r}; got "
            f"{path} line {number} ({problem}). Set --config.data.text_field or "
            "--config.data.on_bad_text=skip."
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tfds:
    """A text dataset of TensorFlow Datasets, read by random access, without TensorFlow.

    `splits` gives the TFDS split of each of ours; equal ones are split by a hash.
    """

    name: str
    data_dir: str
    splits: dict[str, str]
    eval_fraction: float
    text_field: str
    on_bad_text: str

    def documents(self, split: str) -> Iterator[str]:
        """Yield the texts of a split in the dataset's order."""
        is_shared = self.splits["train"] == self.splits["eval"]
        for index, row in enumerate(self._open(split)):
            if is_shared:
                held_out = name_fraction(f"{self.name}#{index}") < self.eval_fraction
                if held_out != (split == "eval"):
                    continue
            if self.text_field not in row:
                raise unknown("data.text_field", self.text_field, row)
            text = row[self.text_field]
            if isinstance(text, bytes):
                text = decode(
                    text, self.on_bad_text, "TFDS text", f"{self.name} {index}", 0
                )
                if text is None:
                    continue
            if not isinstance(text, str):
                raise UserError(
                    f"data.text_field must name text; got {self.text_field!r} of "
                    f"{self.name!r}, which holds {type(text).__name__}."
                )
            if text:
                yield text

    def identity(self, split: str) -> dict:
        """Return what the split's documents follow from."""
        info = self._builder().info
        parts = {
            name: [part.num_examples, part.num_bytes, list(part.shard_lengths)]
            for name, part in sorted(info.splits.items())
        }
        return {
            "tfds": info.full_name,
            "parts": parts,
            "splits": self.splits,
            "split": split,
            "split_by": "blake2b of names",
            "eval_fraction": self.eval_fraction,
            "text_field": self.text_field,
            "on_bad_text": self.on_bad_text,
        }

    def _builder(self):
        import tensorflow_datasets as tfds

        try:
            return tfds.builder(self.name, data_dir=self.data_dir or None)
        except (
            tfds.core.DatasetNotFoundError,
            FileNotFoundError,
            ValueError,  # a name that does not parse, or an unknown config
            AssertionError,  # an unknown version
        ) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"data.name must be a TFDS dataset; got {self.name!r} "
                f"({reason}). See tensorflow.org/datasets."
            ) from error

    def _open(self, split: str):
        builder = self._builder()
        try:
            return builder.as_data_source(split=self.splits[split])
        except Exception as error:
            raise UserError(
                f"TFDS dataset must be prepared as ArrayRecord; got {self.name!r} "
                f"split {self.splits[split]!r} "
                f"({str(error).strip().splitlines()[0]}). Run "
                f"tfds.builder({self.name!r}, file_format='array_record')"
                ".download_and_prepare() first."
            ) from error


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
    text_field: str,
    on_bad_text: str,
    synthetic: dict,
) -> Files | Tfds | synthetic_text.Synthetic:
    """Return the source that the data section of a config describes.

    synthetic: the fields of that section, for the source of this name.
    """
    if on_bad_text not in ON_BAD_TEXT:
        raise unknown("data.on_bad_text", on_bad_text, ON_BAD_TEXT)
    by_hash = {
        "stdlib": True,
        "text": not eval_paths,
        "tfds": split == eval_split,
    }
    if by_hash.get(source) and not 0 < eval_fraction < 1:
        raise UserError(
            "data.eval_fraction must be between 0 and 1 when documents are split by a "
            f"hash of their names; got {eval_fraction}."
        )
    options = {"text_field": text_field, "on_bad_text": on_bad_text}
    if source == "stdlib":
        files = text_files.stdlib_files()
        both = {"train": files, "eval": files}
        return Files(files=both, eval_fraction=eval_fraction, **options)
    if source == "text":
        train = text_files.matching(paths, "data.paths")
        held = (
            text_files.matching(eval_paths, "data.eval_paths") if eval_paths else train
        )
        shared = sorted(set(train.values()) & set(held.values()))
        if eval_paths and shared:
            raise UserError(
                "data.eval_paths must not be trained on; got a file of data.paths: "
                f"{shared[0]}. Take it out of one."
            )
        fraction = 0.0 if eval_paths else eval_fraction
        both = {"train": train, "eval": held}
        return Files(files=both, eval_fraction=fraction, **options)
    if source == "tfds":
        splits = {"train": split, "eval": eval_split}
        return Tfds(
            name=name,
            data_dir=tfds_dir,
            splits=splits,
            eval_fraction=eval_fraction,
            **options,
        )
    if source == "synthetic":
        return synthetic_text.make(**synthetic)
    raise unknown("data.source", source, KINDS)


def decode(
    raw: bytes, on_bad_text: str, thing: str, where: str, offset: int
) -> str | None:
    """Return UTF-8 bytes as text; None where bad text is skipped.

    Raises UserError with the place, `offset` added, where it is an error.
    """
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        if on_bad_text == "skip":
            return None
        if on_bad_text == "replace":
            return raw.decode("utf-8", errors="replace")
        raise UserError(
            f"{thing} must be UTF-8; got {where} with a bad byte at offset "
            f"{offset + error.start}. Mend it, or set "
            "--config.data.on_bad_text=skip or =replace."
        ) from error


def name_fraction(name: str) -> float:
    """Return a fixed number in [0, 1) for a name."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
