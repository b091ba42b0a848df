"""How files of each format are cut into pieces, and the reader of them all."""

from collections.abc import Iterator
from pathlib import Path

from fm_jax.corpora import columns, fields, lines, paths, plain, records, streams
from fm_jax.corpora.digests import Known
from fm_jax.corpora.documents import Piece, Reader, Reading
from fm_jax.corpora.fields import TextField
from fm_jax.errors import UserError

FORMATS = (
    (paths.TEXT, plain),
    (paths.LINES, lines),
    (paths.COLUMNS, columns),
    (paths.RECORDS, records),
)
WITH_FIELDS = (lines, columns)
BY_SUFFIX = {suffix: form for suffixes, form in FORMATS for suffix in suffixes}


def pieces(
    name: str, path: str, known: Known, *, text_field: TextField, cache: Path | None
) -> list[Piece]:
    """Return the pieces of a file, in order; those of a large one have PIECE_BYTES.

    Raises UserError on a Parquet file without the column, and where fields are asked of
    a file that has none.
    """
    options = {"path": path, "size": known.size, "stamp": known.stamp}
    whole = Piece(name=paths.shown(name), **options)
    if known.stamp == streams.UNREADABLE:
        return [whole]
    form = BY_SUFFIX[paths.suffix_of(path)]
    if not fields.is_one(text_field) and form not in WITH_FIELDS:
        raise UserError(
            "files of examples must have fields, as .jsonl and .parquet do; got "
            f"{paths.shown(path)}. Write its examples as .jsonl, an object a line, or "
            "set --config.data.examples=text."
        )
    return form.pieces(whole, text_field=text_field, cache=cache)


def reader(text_field: TextField) -> Reader:
    """Return the reader of pieces of files.

    Besides what the reading refuses, it raises UserError on a file that changed since
    its piece was made, or cannot be read although it could then.
    """

    def read(piece: Piece, reading: Reading) -> Iterator[tuple[int, str]]:
        form = BY_SUFFIX[paths.suffix_of(piece.path)]
        try:
            with streams.watched(piece.path, piece.stamp) as raw:
                yield from form.read(raw, piece, reading, text_field=text_field)
        except streams.Damaged as error:
            reading.bad(error.kind, piece, None, str(error))

    return read
