"""Text datasets of Hugging Face, from the hub or a folder, read from Arrow files."""

import dataclasses
import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path

from fm_jax.corpora import arrow, digests, fields, rows, streams
from fm_jax.corpora.documents import Reader
from fm_jax.corpora.fields import TextField
from fm_jax.errors import UserError, reason, unknown

NAME = re.compile(r"(?P<path>[^:@]+)(:(?P<subset>[^:@]+))?(@(?P<revision>[^:@]+))?")
SAVED = ("dataset_dict.json", "state.json")  # either is in what save_to_disk wrote


@dataclasses.dataclass(frozen=True, kw_only=True)
class HuggingFace:
    """A text dataset of the library `datasets`.

    `name` is org/name[:subset][@revision] on the hub, or a folder: of save_to_disk, or
    of data files. `cache`: the folder that keeps what files hold.
    """

    name: str
    text_field: TextField
    cache: Path | None

    @property
    def shown(self) -> str:
        """The name; of a folder's, what does not depend on where it lies."""
        folder = Path(self.name).expanduser()
        return folder.resolve().name if folder.is_dir() else self.name

    def parts(self, asked: str, key: str) -> list[rows.Part]:
        """Return where a split's rows stand; UserError where there is none such."""
        parts = []
        sizes = {name: len(dataset) for name, dataset in self._loaded.items()}
        for named in asked.split("+"):
            name, *_ = named.split("[")
            if name not in sizes:
                raise unknown(key, name, sizes)
        try:
            found = _library().ReadInstruction.from_spec(asked).to_absolute(sizes)
        except (ValueError, AssertionError) as error:
            raise UserError(
                f"{key} must be a split or a slice of one, as train[:5%]; got "
                f"{asked!r} ({reason(error)})."
            ) from error
        for taken in found:
            first = 0
            for part in self._stored(taken.splitname):
                parts.append(part.sliced(taken.from_ - first, taken.to - first))
                first += part.rows
        return parts

    def told(self) -> dict:
        """Return nothing: the files tell of labels themselves."""
        return {}

    def _stored(self, name: str) -> list[rows.Part]:
        """Return where all rows of a split of the dataset stand."""
        dataset = self._loaded[name]
        self._check_field(dataset.features.arrow_schema)
        paths = [file["filename"] for file in dataset.cache_files]
        files = {path: os.stat(path) for path in paths}
        # Their batches are counted once, as their digests are.
        what = f"arrow rows and bytes of {self.text_field!r}"
        counts = digests.facts(
            files, what, lambda path: _counts(path, self.text_field), self.cache
        )
        parts = [rows.Part(p, 0, *counts[p]) for p in paths if counts.get(p)]
        if sum(part.rows for part in parts) != len(dataset):
            raise UserError(
                f"Hugging Face dataset must be stored as it is read; got {self.name!r} "
                f"split {name!r}. Save it anew: dataset.flatten_indices()"
                ".save_to_disk(folder)."
            )
        return parts

    def _check_field(self, schema) -> None:
        import pyarrow as pa

        place = "" if fields.is_one(self.text_field) else self.name
        fields.refuse_unknown(self.text_field, schema.names, place)
        if not fields.is_one(self.text_field):
            return
        held = schema.field(self.text_field).type
        if not (pa.types.is_string(held) or pa.types.is_large_string(held)):
            raise UserError(
                f"data.text_field must name text; got {self.text_field!r} of "
                f"{self.name!r}, which holds {held}."
            )

    @functools.cached_property
    def _loaded(self) -> dict:
        """The library's datasets by the names of their splits."""
        datasets = _library()
        try:
            found = self._load(datasets)
        except Exception as error:
            told = reason(error.__cause__ or error)
            raise UserError(
                "data.name must be a folder of a Hugging Face dataset, or one on the "
                f"hub as org/name[:subset][@revision]; got {self.name!r} ({told})."
            ) from error
        if isinstance(found, datasets.Dataset):  # saved by itself
            return {str(found.split or "train"): found}
        return {str(name): dataset for name, dataset in found.items()}

    def _load(self, datasets):
        folder, options = Path(self.name).expanduser(), {"keep_in_memory": False}
        if self.name and any((folder / file).is_file() for file in SAVED):
            return datasets.load_from_disk(str(folder), **options)
        if self.name and folder.is_dir():
            return datasets.load_dataset(str(folder), **options)
        told = NAME.fullmatch(self.name)
        if not told or self.name.startswith((".", "/", "~")):
            raise FileNotFoundError("there is no such folder")
        options["revision"] = told["revision"]
        return datasets.load_dataset(told["path"], told["subset"], **options)


def make(
    *,
    name: str,
    split: str,
    eval_split: str,
    eval_fraction: float,
    text_field: TextField,
    cache: Path | None,
) -> rows.RowSource:
    """Return the source; nothing is loaded before it is asked for."""
    return rows.RowSource(
        kind="hf",
        dataset=HuggingFace(name=name, text_field=text_field, cache=cache),
        splits={"train": split, "eval": eval_split},
        eval_fraction=eval_fraction,
        text_field=text_field,
        cache=cache,
    )


def reader(spec: dict) -> Reader:
    """Return the reader of pieces, by a source's `spec`; it needs no `datasets`."""
    field = spec["text_field"]

    def values(raw, path, start, stop, together) -> Iterator[object]:
        first = 0
        for batch in _batches(path, field):
            last = first + batch.num_rows
            if last > start:
                taken = batch.slice(max(0, start - first), stop - max(first, start))
                for n in range(0, taken.num_rows, together):
                    yield from _values(taken.slice(n, together), field)
            if last >= stop:
                return
            first = last
        raise streams.Damaged(f"the file ends at row {first} of {stop}")

    return rows.reader(spec["parts"], values)


def _library():
    """Return the module `datasets`; UserError without it."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            "data.source=hf must have the library `datasets` installed; got none. "
            "pip install 'fm_jax[hf]'."
        ) from error
    return datasets


def _values(batch, field: TextField) -> list:
    """Return what rows hold: text as bytes, several fields as dicts."""
    if fields.is_one(field):
        return arrow.values(batch.column(batch.schema.get_field_index(field)))
    return arrow.rows(batch, fields.names(field), arrow.names_of(batch.schema))


def _counts(path: str, field: TextField) -> list[int]:
    """Return the rows of an Arrow file and the bytes of columns; [] without any."""
    count = size = 0
    try:
        for batch in _batches(path, field):
            count += batch.num_rows
            size += batch.nbytes
    except (KeyError, streams.Damaged):
        return []
    return [count, size]


def _batches(path: str, field: TextField) -> Iterator:
    """Yield batches of the columns; raises Damaged, KeyError without any of them."""
    import pyarrow as pa

    try:
        with pa.memory_map(path) as mapped, pa.ipc.open_stream(mapped) as stream:
            names = [n for n in fields.names(field) if n in stream.schema.names]
            if not names:
                raise KeyError(field)
            for batch in stream:
                yield batch.select(names)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # of the disk, not the file
            raise
        raise streams.Damaged(reason(error)) from error
