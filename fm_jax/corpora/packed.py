"""Any source's text made a dataset of TensorFlow Datasets, without TensorFlow."""

import contextlib
import io
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from fm_jax import caches
from fm_jax.corpora import documents, sources
from fm_jax.corpora.documents import Reading, Source
from fm_jax.errors import UserError, reason

SPLITS = {"train": "train", "validation": "eval"}  # ours, by TFDS's names
FORMAT = "array_record"
SHARD_ROWS = 1 << 17
BATCH_BYTES, BATCH_ROWS = 1 << 22, 1 << 14


def pack(
    source: Source,
    *,
    out: Path,
    name: str,
    version: str = "1.0.0",
    on_bad_text: str,
    max_document_bytes: int,
) -> Path:
    """Write a source's splits to `out/name/version` as ArrayRecord; return that folder.

    Rows are {"text", "origin"}, in the source's order: `tfds.data_source(name,
    data_dir=out)` reads them, as data.source=tfds does. What was met of bad text is in
    its metadata.json. The folder is whole or not there.

    Raises UserError on a name that TFDS would not find, a dataset that is there, a
    split without text, a full disk, and as the source's reader does.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name):
        raise UserError(
            "name of a dataset must be small letters, digits and single underscores; "
            f"got {name!r}. Example: my_text."
        )
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        raise UserError(
            f"version of a dataset must be three numbers; got {version!r}. Example: "
            "1.0.0."
        )
    out = out.expanduser()
    path, building = out / name / version, out / f".{name}-{version}.packing"
    reading = {"on_bad_text": on_bad_text, "max_document_bytes": max_document_bytes}
    try:
        with caches.made_by_one(out / f"{name}-{version}", is_cache=False):
            if path.exists():
                raise UserError(
                    f"dataset must be packed to a new folder; got {path}, which is "
                    "there. Delete it or choose another name."
                )
            shutil.rmtree(building, ignore_errors=True)
            try:
                _write(building, name, version, source, reading)
                path.parent.mkdir(exist_ok=True)
                os.rename(building / name / version, path)
                _sync(path.parent)
            finally:
                shutil.rmtree(building, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"--out must be writable and have room; got {out} "
            f"({reason(error)}). Free space or name another folder."
        ) from error
    return path


def _write(folder: Path, name: str, version: str, source: Source, reading) -> None:
    """Write the dataset under `folder`, on the disk on return."""
    import tensorflow_datasets as tfds

    met = {split: Reading(**reading) for split in SPLITS}
    options = {"data_dir": str(folder), "file_format": FORMAT}
    builder = _builder(name, version, source, met)(**options)
    with contextlib.redirect_stdout(io.StringIO()):  # it names this folder as final
        builder.download_and_prepare()
    written = tfds.builder_from_directory(str(folder / name / version))
    for part in written.info.splits.values():
        # A shard that the disk had no room for has no records.
        if len(written.as_data_source(part.name)) != part.num_examples:
            raise OSError(f"split {part.name} is cut short")
    for file in sorted((folder / name).rglob("*")):
        _sync(file)


def _builder(name: str, version: str, source: Source, met: dict[str, Reading]):
    """Return the class of TFDS that writes a source's text.

    `met` are the readings of its splits. Made here, because TFDS takes a while to
    import and a class has one name.
    """
    import tensorflow_datasets as tfds

    class Packed(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Documents of text, and where each came from."""

        # TFDS looks by this for files beside the class; there are none.
        __module__ = "__main__"
        VERSION = tfds.core.Version(version)

        def _info(self):
            text = tfds.features.Text()
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict({"text": text, "origin": text}),
                metadata=tfds.core.MetadataDict(),
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in SPLITS}

        def _generate_examples(self, split):
            for number, (text, origin) in enumerate(_texts(source, split, met[split])):
                yield number, {"text": text, "origin": origin}

        def _download_and_prepare(self, dl_manager, download_config):
            # Not by TFDS's own writer: it has TensorFlow shuffle what is over a
            # gigabyte. This one keeps the order, and holds no more than a batch of it.
            info = self._info()  # of the folder in which it is being made
            writer = tfds.core.SequentialWriter(info, SHARD_ROWS, file_format=FORMAT)
            for split, rows in self._split_generators(dl_manager).items():
                writer.initialize_splits([split])
                for batch in _batches(row for _, row in rows):
                    _written(writer.add_examples, {split: batch})
                _written(writer.close_splits, [split])
                if not info.splits[split].num_examples:
                    raise UserError(
                        f"the corpus must have text; got no document of its {split} "
                        "split with any in it. Check data.paths and data.eval_fraction."
                    )
                self.info.metadata[split] = met[split].to_json()
            self.info.set_splits(info.splits)

    Packed.name = name
    return Packed


def _texts(source: Source, split: str, reading: Reading) -> Iterator[tuple[str, str]]:
    """Yield the documents of a split, and where each came from."""
    wanted = SPLITS[split]
    held_out = set()
    if source.is_held_out_apart and wanted == "train":
        held_out = {
            documents.text_hash(text)
            for text in sources.documents(
                source,
                "eval",
                on_bad_text=reading.on_bad_text,
                max_document_bytes=reading.max_document_bytes,
            )
        }
    for piece, place, text in sources.placed(source, wanted, reading):
        if not held_out or documents.text_hash(text) not in held_out:
            yield text, piece.where(place)


def _batches(rows: Iterator[dict]) -> Iterator[list[dict]]:
    """Yield rows together: with each batch the description is written anew."""
    batch, size = [], 0
    for row in rows:
        batch.append(row)
        size += len(row["text"])
        if size >= BATCH_BYTES or len(batch) >= BATCH_ROWS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _written(write: Callable, what: object) -> None:
    """Write with ArrayRecord's writer, whose errors are of the disk."""
    try:
        write(what)
    except RuntimeError as error:
        raise OSError(reason(error)) from error


def _sync(path: Path) -> None:
    """Have a file or folder on the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
