"""Datasets whose rows stand in files, one file after another."""

import bisect
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from fm_jax.corpora import digests, documents, fields, paths, streams
from fm_jax.corpora.documents import Piece, Reader, Reading
from fm_jax.corpora.fields import TextField
from fm_jax.errors import reason

BATCH_BYTES = 1 << 22
BATCH_ROWS = 1024


@dataclasses.dataclass(frozen=True)
class Part:
    """Rows of a dataset that stand one after another in a file."""

    path: str
    skip: int  # rows of the file before them
    rows: int
    size: int  # bytes of their text, about

    def sliced(self, start: int, stop: int) -> "Part":
        """Return rows `start` to `stop` of it, cut off at its ends."""
        start, stop = max(0, start), min(self.rows, stop)
        rows = max(0, stop - start)
        size = self.size * rows // max(1, self.rows)
        return Part(self.path, self.skip + start, rows, size)


# Yields rows [start, stop) of an open file of this path, as str, bytes, a dict of
# fields, None where there is no text, or Damaged; the last number is how many to hold
# together.
Values = Callable[[object, str, int, int, int], Iterator[object]]


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of a split: where they stand, and what the files there hold.

    `name`: the dataset's, as a person is shown it.
    """

    name: str
    parts: tuple[Part, ...]
    known: dict[str, digests.Known]

    @classmethod
    def of(cls, name: str, parts: list[Part], cache: Path | None) -> "Rows":
        """Return rows whose files are read now, for their digests."""
        files = sorted({part.path for part in parts})
        return cls(name, tuple(p for p in parts if p.rows), digests.known(files, cache))

    def pieces(self) -> list[Piece]:
        """Return ranges of rows in order, of PIECE_BYTES or less; none is in two files.

        `start` and `stop` count the rows of the split.
        """
        found, first = [], 0
        for part in self.parts:
            # One that is far away is copied to be read.
            is_here = not paths.is_remote(part.path)
            count = math.ceil(part.size / documents.PIECE_BYTES) if is_here else 1
            count = max(1, min(part.rows, count))
            ends = [first + part.rows * n // count for n in range(count + 1)]
            options = {
                "name": self.name,
                "size": part.size // count,
                "stamp": self.known[part.path].stamp,
            }
            for start, stop in itertools.pairwise(ends):
                found.append(Piece(start=start, stop=stop, first=start, **options))
            first = ends[-1]
        return found

    def identity(self) -> list:
        """Return [file's name, first row, number of rows, file's digest] in order."""
        return [
            [p.path.rpartition("/")[2], p.skip, p.rows, self.known[p.path].digest]
            for p in self.parts
        ]

    def to_json(self) -> list:
        """Return what `reader` finds the rows by."""
        return [dataclasses.astuple(part) for part in self.parts]


class Dataset(Protocol):
    """A library's dataset: how a person is shown it, and where its rows stand."""

    @property
    def shown(self) -> str:
        """Its name, in which nothing depends on where it lies."""

    def parts(self, asked: str, key: str) -> list[Part]:
        """Return where the rows of a split or slice stand; `key` is what asks for it.

        Raises UserError where there is no such split, or no such text in it.
        """

    def told(self) -> dict:
        """Return what else reading several fields follows from; JSON."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowSource:
    """The documents of a dataset, as a Source.

    `splits` gives the dataset's split for each of ours, a slice as `train[:5%]` too;
    where they are the same, a hash of a document's text decides. `kind` is that of
    `sources.READERS`. `cache`: the folder that keeps what files hold.
    """

    kind: str
    dataset: Dataset
    splits: dict[str, str]
    eval_fraction: float
    text_field: TextField
    cache: Path | None
    _found: dict = dataclasses.field(default_factory=dict, init=False, compare=False)

    @property
    def is_held_out_apart(self) -> bool:
        """Whether eval documents come from another split than train's."""
        return self.splits["train"] != self.splits["eval"]

    def pieces(self, split: str) -> list[Piece]:
        """Return ranges of rows in the dataset's order."""
        return self._rows(split).pieces()

    def share(self, split: str) -> tuple[float, float]:
        """Return the range of hashes, as fractions of 1, of the split's documents."""
        apart = self.is_held_out_apart
        return documents.share(split, 0.0 if apart else self.eval_fraction)

    def identity(self, split: str) -> dict:
        """Return what the split's documents follow from, contents included.

        A version alone would not do: it stays when a dataset is prepared again from
        other text.
        """
        return {
            self.kind: self.dataset.shown,
            "split": self.splits[split],
            "files": self._rows(split).identity(),
            **self._fields(),
        }

    def spec(self, split: str) -> dict:
        """Return what the kind's `reader` makes the reader from."""
        parts = self._rows(split).to_json()
        return {"kind": self.kind, "parts": parts, **self._fields()}

    def _fields(self) -> dict:
        """Return which fields are read, and what else that follows from."""
        told = {"text_field": fields.told(self.text_field)}
        return told if fields.is_one(self.text_field) else told | self.dataset.told()

    def _rows(self, split: str) -> Rows:
        """Return a split's rows; their files are read when it is first asked for."""
        if split not in self._found:
            key = {"train": "data.split", "eval": "data.eval_split"}[split]
            parts = self.dataset.parts(self.splits[split], key)
            self._found[split] = Rows.of(self.dataset.shown, parts, self.cache)
        return self._found[split]


def reader(told: list, values: Values) -> Reader:
    """Return the reader of pieces of rows, by their `to_json`; a place is a row.

    Besides what the reading refuses, it raises UserError on a file that changed since
    its piece was made, or cannot be read although it could then.
    """
    parts = [Part(*fields) for fields in told]
    firsts = [0, *itertools.accumulate(part.rows for part in parts)]

    def read(piece: Piece, reading: Reading) -> Iterator[tuple[int, str]]:
        index = bisect.bisect_right(firsts, piece.start) - 1
        part, first = parts[index], firsts[index]
        together = BATCH_BYTES * part.rows // max(1, part.size) + 1
        together = min(BATCH_ROWS, together)
        row, before = piece.start, part.skip - first

        def bad(error: streams.Damaged, count: int) -> None:
            problem = f"{paths.shown(part.path)}: {reason(error)}"
            reading.bad(error.kind, piece, row, problem, count=count)

        try:
            with streams.watched(part.path, piece.stamp) as raw:
                where = row + before, piece.stop + before
                for value in values(raw, part.path, *where, together):
                    if isinstance(value, streams.Damaged):
                        bad(value, 1)
                    else:
                        for text in reading.texts(value, piece, row):
                            yield row, text
                    row += 1
        except streams.Damaged as error:
            bad(error, piece.stop - row)

    return read
