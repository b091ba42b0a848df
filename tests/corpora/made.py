"""Small corpora, the sources made over them, and what is read from those."""

import gzip
import pathlib
import tempfile

import pytest
import zstandard

from fm_jax.corpora import sources
from fm_jax.corpora.documents import Reading
from fm_jax.errors import UserError

DEFAULTS = {
    "source": "text",
    "paths": (),
    "eval_paths": (),
    "eval_fraction": 0.3,
    "name": "",
    "tfds_dir": "",
    "split": "train",
    "eval_split": "validation",
    "text_field": "text",
    "synthetic": {},
    "cache": None,
}
POLICY = {"on_bad_text": "error", "max_document_bytes": 1 << 22}


def make(**fields):
    return sources.make(**DEFAULTS | fields)


def read(source, split="train", **policy):
    """Return all texts of a split."""
    return list(sources.documents(source, split, **POLICY | policy))


def over(*paths, **fields):
    """Return a source over files, nothing of them held out."""
    with tempfile.TemporaryDirectory() as folder:
        held_out = pathlib.Path(folder, "held_out.txt")
        held_out.write_text("never read")
        paths = tuple(map(str, paths))
        return make(**{"paths": paths, "eval_paths": (str(held_out),)} | fields)


def met(source, **policy):
    """Return the texts of the train split by their places, and what was met."""
    reading = Reading(**POLICY | policy)
    reader = sources.open_reader(source.spec("train"))
    found = [
        (piece.where(place), text)
        for piece in source.pieces("train")
        for place, text in reader(piece, reading)
    ]
    return found, reading.to_json()


def texts(*paths, text_field="text", **policy):
    """Return all the texts of files, in order, nothing held out."""
    return read(over(*paths, text_field=text_field), **policy)


def refusal(function, *args, **kwargs):
    """Return the text of the UserError that a call ends in."""
    with pytest.raises(UserError) as error:
        function(*args, **kwargs)
    return str(error.value)


def zstd(raw):
    return zstandard.ZstdCompressor(write_checksum=True).compress(raw)


PACK = {"": bytes, ".gz": gzip.compress, ".zst": zstd}


def write_corpus(folder, num_files):
    """Write files whose text is their own name."""
    for number in range(num_files):
        path = folder / f"part{number % 3}" / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.relative_to(folder).as_posix())


def write_records(path, records):
    """Write an ArrayRecord file."""
    from array_record.python import array_record_module

    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
