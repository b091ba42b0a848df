"""ArrayRecord files: a document a record."""

import contextlib
import dataclasses
import itertools
import math
import os
import shutil
import tempfile
from collections.abc import Iterator

from fm_jax.corpora import documents, paths, streams
from fm_jax.corpora.documents import Piece, Reading
from fm_jax.errors import UserError, reason

BATCH_BYTES = 1 << 22
BATCH_RECORDS = 1024


def pieces(whole: Piece, **_) -> list[Piece]:
    """Return the parts of a file: several where it is large and here."""
    if whole.size <= documents.PIECE_BYTES or paths.is_remote(whole.path):
        return [whole]
    try:
        with open_records(whole.path) as file:
            records = file.num_records()
    except streams.Damaged:  # reading it says so
        return [whole]
    count = max(1, min(records, math.ceil(whole.size / documents.PIECE_BYTES)))
    ends = [records * part // count for part in range(count + 1)]
    size = whole.size // count
    return [
        dataclasses.replace(whole, start=start, stop=stop, first=start, size=size)
        for start, stop in itertools.pairwise(ends)
    ]


def read(raw, piece: Piece, reading: Reading, **_) -> Iterator[tuple[int, str]]:
    """Yield the texts of records by their numbers; a damaged record alone is lost."""
    with local(raw, piece.path) as path, open_records(path) as file:
        records = file.num_records()
        if not records:
            reading.bad("empty file", piece, None, "no record in it")
        together = BATCH_BYTES * records // max(1, os.path.getsize(path)) + 1
        together = min(BATCH_RECORDS, together)
        stop = records if piece.stop < 0 else piece.stop
        for start in range(piece.start, stop, together):
            row = start
            for value in values(file, start, min(stop, start + together)):
                if isinstance(value, streams.Damaged):
                    reading.bad("cut short", piece, row, reason(value))
                else:
                    for text in reading.texts(value, piece, row):
                        yield row, text
                row += 1


def values(file, start: int, stop: int) -> list:
    """Return records `start` to `stop`, with Damaged in place of those that are."""
    with contextlib.suppress(RuntimeError):  # what the library raises on damage
        return file.read(start, stop)
    found = []
    for row in range(start, stop):
        try:
            found += file.read([row])
        except RuntimeError as error:
            found.append(streams.Damaged(str(error)))
    return found


@contextlib.contextmanager
def open_records(path: str) -> Iterator:
    """Open an ArrayRecord file; Damaged where it is none."""
    try:
        from array_record.python import array_record_module
    except ImportError as error:
        raise UserError(
            f".array_record must have its library installed; got {path}. "
            "pip install array_record."
        ) from error
    # Without threads: there is a process for each core.
    options = "readahead_buffer_size:0,max_parallelism:0"
    file = array_record_module.ArrayRecordReader(path, options)
    if not file.ok():  # else it would seem to be one without records
        try:
            file.close()
        except RuntimeError as error:
            raise streams.Damaged(str(error) or "no footer") from error
    try:
        yield file
    finally:
        with contextlib.suppress(RuntimeError):
            file.close()


@contextlib.contextmanager
def local(raw, path: str) -> Iterator[str]:
    """Yield the path of a file, or of a copy for as long: the library takes no URL."""
    if not paths.is_remote(path):
        yield path
        return
    with tempfile.NamedTemporaryFile(suffix=".array_record") as copy:
        shutil.copyfileobj(raw, copy)
        copy.flush()
        yield copy.name
