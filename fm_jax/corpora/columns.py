"""Parquet files: a document in each row, of a column or of several."""

import contextlib
import dataclasses
from collections.abc import Iterator

from fm_jax.corpora import arrow, documents, fields, paths, streams
from fm_jax.corpora.documents import Piece, Reading
from fm_jax.corpora.fields import TextField
from fm_jax.errors import UserError, reason

BATCH_BYTES = 1 << 23
BATCH_ROWS = 1024
BUFFER_BYTES = 1 << 20


def pieces(whole: Piece, *, text_field: TextField, **_) -> list[Piece]:
    """Return the row groups of a file, small ones together.

    Raises UserError where it has no such column, or one without text; of several, where
    it has none.
    """
    try:
        with streams.open_raw(whole.path) as raw:
            metadata = _open(raw, whole.path, text_field).metadata
    except (OSError, streams.Damaged):  # reading it says so
        return [whole]
    parts, first = [], 0
    for group in range(metadata.num_row_groups):
        told = metadata.row_group(group)
        # Of one column it would be told by what ends the process in damaged files.
        rows, size = told.num_rows, told.total_byte_size
        if parts and parts[-1].size + size <= documents.PIECE_BYTES:
            size += parts[-1].size
            parts[-1] = dataclasses.replace(parts[-1], stop=group + 1, size=size)
        else:
            place = {"start": group, "stop": group + 1, "first": first, "size": size}
            parts.append(dataclasses.replace(whole, **place))
        first += rows
    return parts or [whole]


def read(
    raw, piece: Piece, reading: Reading, *, text_field: TextField
) -> Iterator[tuple[int, str]]:
    """Yield the texts of columns by the numbers of their rows.

    A row group is left where it is damaged, and reading goes on with the next.
    """
    file = _open(raw, piece.path, text_field)
    if not file.metadata.num_rows:
        reading.bad("empty file", piece, None, "no row in it")
    first = piece.first
    stop = file.num_row_groups if piece.stop < 0 else piece.stop
    for group in range(piece.start, stop):
        told = file.metadata.row_group(group)
        together = BATCH_BYTES * told.num_rows // max(1, told.total_byte_size) + 1
        together = min(BATCH_ROWS, together)
        row, last = first, first + told.num_rows
        try:
            for values in _batches(file, group, text_field, together):
                for value in values:
                    for text in reading.texts(value, piece, row):
                        yield row, text
                    row += 1
        except streams.Damaged as error:
            reading.bad("cut short", piece, row, reason(error), count=last - row)
        first = last


def _batches(file, group: int, text_field: TextField, rows: int) -> Iterator[list]:
    """Yield the values of a row group, text as bytes, so many at a time."""
    names = fields.names(text_field)
    with _naming_damage():
        labels = arrow.names_of(file.schema_arrow)
        for batch in file.iter_batches(
            rows, row_groups=[group], columns=list(names), use_threads=False
        ):
            # What it calls a name is a path too: there may be "text.more", or text in
            # "text" in "outer" for "outer.text".
            if fields.is_one(text_field):
                index = batch.schema.get_field_index(text_field)
                yield arrow.values(batch.column(index))
            else:
                yield arrow.rows(batch, names, labels)


def _open(raw, path: str, text_field: TextField):
    """Return the Parquet file; Damaged where it is none, UserError without the text."""
    import pyarrow as pa
    import pyarrow.parquet

    with _naming_damage():
        file = pa.parquet.ParquetFile(
            raw, buffer_size=BUFFER_BYTES, page_checksum_verification=True
        )
        schema = file.schema_arrow
        names = schema.names
    fields.refuse_unknown(text_field, names, paths.shown(path))
    for name in fields.names(text_field):
        if names.count(name) > 1:
            raise UserError(
                f"data.text_field must name one column; got {name!r} of "
                f"{paths.shown(path)}, which has {names.count(name)} of that name. "
                "Rename all but one."
            )
    if not fields.is_one(text_field):
        return file
    held = schema.field(text_field).type
    inner = held.value_type if pa.types.is_dictionary(held) else held
    if not arrow.is_text(inner):
        raise UserError(
            f"data.text_field must name text; got {text_field!r} of "
            f"{paths.shown(path)}, which holds {held}."
        )
    return file


@contextlib.contextmanager
def _naming_damage() -> Iterator[None]:
    """Turn what pyarrow raises on a damaged file into Damaged."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno:  # of the disk, not the file
            raise
        raise streams.Damaged(str(error)) from error
