"""Files of JSON lines: a document in a field of each."""

import codecs
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path

from fm_jax.corpora import digests, documents, fields, paths, streams
from fm_jax.corpora.documents import Piece, Reading
from fm_jax.corpora.fields import TextField

LINE_BYTES = 1 << 24  # of a line are always held, whatever a document may have
BLOCK_BYTES = 1 << 20


def pieces(whole: Piece, *, cache: Path | None, **_) -> list[Piece]:
    """Return the parts of a file: several where it is large, plain and here."""
    whole = dataclasses.replace(whole, first=1)
    is_plain = not (paths.packing_of(whole.path) or paths.is_remote(whole.path))
    if whole.size <= documents.PIECE_BYTES or not is_plain:
        return [whole]
    try:
        here = {whole.path: os.stat(whole.path)}
    except OSError:  # gone since: reading it says so
        return [whole]
    what = f"line ends at {documents.PIECE_BYTES}"
    cuts = digests.facts(here, what, line_ends, cache).get(whole.path)
    if not cuts:
        return [whole]
    starts = [(0, 1), *cuts]
    stops = [start for start, _ in cuts] + [whole.size]
    return [
        dataclasses.replace(
            whole, start=start, stop=stop, first=first, size=stop - start
        )
        for (start, first), stop in zip(starts, stops, strict=True)
    ]


def line_ends(path: str) -> list[tuple[int, int]]:
    """Return where a file is cut: offsets of lines, and the lines' numbers from 1.

    The first line that begins PIECE_BYTES or more after the cut before. Raises OSError.
    """
    cuts, offset, number, wanted = [], 0, 1, documents.PIECE_BYTES
    with streams.open_raw(path) as raw:
        while block := raw.read(BLOCK_BYTES):
            counted = 0
            while (start := max(counted, wanted - 1 - offset)) < len(block):
                end = block.find(b"\n", start) + 1
                if not end:
                    break
                number += block.count(b"\n", counted, end)
                cuts.append((offset + end, number))
                counted, wanted = end, offset + end + documents.PIECE_BYTES
            number += block.count(b"\n", counted)
            offset += len(block)
    return [cut for cut in cuts if cut[0] < offset]


def read(
    raw, piece: Piece, reading: Reading, *, text_field: TextField
) -> Iterator[tuple[int, str]]:
    """Yield the texts of lines by their numbers.

    A line is held up to `max_document_bytes`, or LINE_BYTES where that is more.
    """
    stream = streams.unpacked(raw, piece.path)
    if piece.start:
        raw.seek(piece.start)
    limit = max(reading.max_document_bytes, LINE_BYTES)
    offset, number, has_row = piece.start, piece.first, False
    while offset != piece.stop and (line := stream.readline(limit + 1)):
        size = len(line)
        offset += size
        is_whole = size <= limit or line.endswith(b"\n")
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)  # that some editors write
        if not is_whole:
            has_row = True
            reading.bad("too long", piece, number, f"over {limit:,} bytes in a line")
            del line
            offset += _pass_line(stream)
        elif not line or line.isspace():
            reading.empty += 1
        else:
            has_row = True
            start = offset - len(line)
            found = _found(line, piece, number, start, reading, text_field)
            if found is not None:
                for text in reading.texts(found, piece, number):
                    yield number, text
        number += 1
    if not has_row and piece.start == 0 and piece.stop == -1:
        reading.bad("empty file", piece, None, "no line in it")


def _found(line, piece, number, offset, reading, text_field) -> str | dict | None:
    """Return the text or fields of a line; None where it is bad and skipped."""
    decoded = reading.decoded(line, piece, number, offset)
    if decoded is None:
        return None
    try:
        row = json.loads(decoded)
    except json.JSONDecodeError as error:
        problem = f"{error.msg}: character {error.pos}"
    except (ValueError, RecursionError) as error:
        problem = str(error)
    else:
        found = fields.taken(row, text_field)
        if isinstance(found, str) or not fields.is_one(text_field):
            return found
        problem = f"no text under {text_field!r}"
        reading.bad("missing text", piece, number, problem)
        return None
    reading.bad("broken JSON", piece, number, problem)
    return None


def _pass_line(stream) -> int:
    """Read to the end of a line and return the bytes passed."""
    passed = 0
    while block := stream.readline(BLOCK_BYTES):
        passed += len(block)
        if block.endswith(b"\n"):
            break
    return passed
