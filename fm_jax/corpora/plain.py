"""Files that are one document each: prose and source code."""

from collections.abc import Iterator

from fm_jax.corpora import documents, paths, streams
from fm_jax.corpora.documents import Piece, Reading

FIRST_BYTES = 1 << 20  # most files have fewer


def pieces(whole: Piece, **_) -> list[Piece]:
    """Return the one piece that a file is."""
    return [whole]


def read(raw, piece: Piece, reading: Reading, **_) -> Iterator[tuple[int, str]]:
    """Yield the text of a file; where it is too long and cut, its parts by number."""
    stream, limit = streams.unpacked(raw, piece.path), reading.max_document_bytes
    held = stream.read(min(limit + 1, FIRST_BYTES))
    if len(held) == FIRST_BYTES:
        held += stream.read(limit + 1 - FIRST_BYTES)
    if not held and paths.packing_of(piece.path):
        reading.bad("empty file", piece, None, "nothing in it")
        return
    parts = iter([held])
    if len(held) > limit:
        if not reading.mends("too long", piece, 0, reading.too_long):
            return
        parts = documents.cut(held, stream.read, limit)
    offset = 0
    for place, part in enumerate(parts):
        for text in reading.texts(part, piece, place, offset=offset):
            yield place, text
        offset += len(part)
