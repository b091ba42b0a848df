"""Small corpora, and the sources made over them."""

import gzip
import pathlib
import tempfile

import pytest
import zstandard

from fm_jax.corpora import sources
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
    "on_bad_text": "error",
    "synthetic": {},
}


def make(**fields):
    return sources.make(**DEFAULTS | fields)


def texts(*paths, **fields):
    """Return all the texts of files, in order, nothing held out."""
    paths = tuple(map(str, paths))
    with tempfile.TemporaryDirectory() as folder:
        held_out = pathlib.Path(folder, "held_out.txt")
        held_out.write_text("never read")
        source = make(**{"paths": paths, "eval_paths": (str(held_out),)} | fields)
        return list(source.documents("train"))


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


# What is read.
