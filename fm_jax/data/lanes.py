"""Lanes: runs of a source's pieces, each read from its start to its end by one hand."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from fm_jax.corpora.documents import Piece, Reader, Reading
from fm_jax.errors import UserError

# Takes the piece that is read, and how many documents, bytes of their text and bytes of
# the lane's `size` were read since it was called last.
Report = Callable[[Piece, int, int, int], None]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Where a corpus is cut to be worked on. What is read of a store is the same."""

    lane_bytes: int = 1 << 28  # a lane's most, but for a larger piece
    small_lane_bytes: int = 1 << 23  # its least where there would be few lanes
    num_lanes: int = 32  # how many are few
    shard_tokens: int = 1 << 26  # a shard's least, but for a lane's last one
    shard_documents: int = 1 << 22  # or so many documents
    batch_bytes: int = 1 << 20  # text that is handed to the tokenizer at a time
    process_bytes: int = 1 << 23  # a corpus below this is worked on in one process


@dataclasses.dataclass(frozen=True)
class Lane:
    """Pieces in order; `files[i]` is the number in pieces.json of piece i's file."""

    number: int
    pieces: tuple[Piece, ...]
    files: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes that reading it takes, about."""
        return sum(piece.size for piece in self.pieces)

    @classmethod
    def from_json(cls, fields: dict) -> "Lane":
        """Return the lane that `dataclasses.asdict` told of."""
        pieces = tuple(map(Piece.from_json, fields["pieces"]))
        return cls(fields["number"], pieces, tuple(fields["files"]))


def plan(pieces: Sequence[Piece], sizes: Sizes) -> list[Lane]:
    """Group pieces into lanes, in order; a function of both and of nothing else."""
    total = sum(piece.size for piece in pieces)
    most = max(total // sizes.num_lanes, sizes.small_lane_bytes)
    most = min(most, sizes.lane_bytes)
    numbers: dict[tuple[str, str], int] = {}
    groups: list[list[tuple[Piece, int]]] = []
    size = 0
    for piece in pieces:
        if not groups or size + piece.size > most:
            groups.append([])
            size = 0
        file = numbers.setdefault((piece.name, piece.path), len(numbers))
        groups[-1].append((piece, file))
        size += piece.size
    return [
        Lane(number, *zip(*group, strict=True)) for number, group in enumerate(groups)
    ]


def files(lanes: Sequence[Lane]) -> list[tuple[str, str]]:
    """Return the (name, path) of each file of the lanes, by their numbers."""
    pieces = (piece for lane in lanes for piece in lane.pieces)
    return list(dict.fromkeys((piece.name, piece.path) for piece in pieces))


@dataclasses.dataclass(frozen=True)
class Place:
    """How far a lane has been read: its first pieces, and documents of the next one.

    `met` is what was met in those pieces, as Reading says it; `num_sieved` are the
    documents up to here that came through the sieve.
    """

    piece: int = 0
    document: int = 0
    met: dict | None = None
    num_sieved: int = 0


@dataclasses.dataclass(frozen=True)
class Sieve:
    """Which documents are of a split: by their share, and not in the other's store."""

    share: tuple[float, float] = (0.0, 1.0)
    held_out: "Hashes | None" = None

    def __call__(self, hashes: np.ndarray) -> tuple[np.ndarray, int]:
        """Return which of `hashes` [N, 2] to keep, and how many are held out."""
        low, high = self.share
        is_kept = np.ones(len(hashes), bool)
        if (low, high) != (0.0, 1.0):
            # As documents.fraction has it.
            fractions = hashes[:, 0].astype("<u8").byteswap() / 2.0**64
            fractions = np.minimum(fractions, 1 - 2**-53)
            is_kept = (low <= fractions) & (fractions < high)
        if self.held_out is None:
            return is_kept, 0
        is_held_out = is_kept & self.held_out.have(hashes)
        return is_kept & ~is_held_out, int(is_held_out.sum())


class Hashes:
    """A set of hashes, uint64 [N, 2], in twice their memory."""

    def __init__(self, hashes: np.ndarray):
        order = np.lexsort((hashes[:, 1], hashes[:, 0]))
        self._first, self._second = hashes[order, 0], hashes[order, 1]

    def have(self, hashes: np.ndarray) -> np.ndarray:
        """Return which of `hashes` are in the set, bool [N]."""
        low = np.searchsorted(self._first, hashes[:, 0], side="left")
        high = np.searchsorted(self._first, hashes[:, 0], side="right")
        found = np.zeros(len(hashes), bool)
        for row in np.flatnonzero(low < high):  # few: they are found, nearly for sure
            found[row] = hashes[row, 1] in self._second[low[row] : high[row]]
        return found


@dataclasses.dataclass(frozen=True)
class Batch:
    """Documents of the split that stand one after another in a lane."""

    texts: list[str]
    raws: list[bytes]
    hashes: np.ndarray
    origins: np.ndarray
    num_held_out: int  # left out before or between them
    after: Place

    def only(self, which: np.ndarray) -> "Batch":
        """Return the documents of which `which` is true."""
        if which.all():
            return self
        rows = np.flatnonzero(which)
        return dataclasses.replace(
            self,
            texts=[self.texts[row] for row in rows],
            raws=[self.raws[row] for row in rows],
            hashes=self.hashes[rows],
            origins=self.origins[rows],
        )


def batches(
    lane: Lane,
    place: Place,
    *,
    read: Reader,
    open_reading: Callable[[], Reading],
    sieve: Sieve,
    batch_bytes: int,
    report: Report,
) -> Iterator[Batch]:
    """Yield a lane's documents from a place on; the last batch may have none.

    Where a batch ends is decided by what was read since the last one, sieved or not, so
    that reading from there again gives the same batches.
    """
    num_sieved = place.num_sieved
    for texts, origins, after, piece, done in _read(
        lane, place, read, open_reading, batch_bytes, report
    ):
        raws = [text.encode() for text in texts]
        # As documents.text_hash, of bytes that are there already.
        digests = [hashlib.blake2b(raw, digest_size=16).digest() for raw in raws]
        hashes = np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2)
        is_kept, num_held_out = sieve(hashes)
        num_sieved += int(is_kept.sum())
        place = dataclasses.replace(after, num_sieved=num_sieved)
        report(piece, len(texts), sum(map(len, raws)), done)
        yield Batch(texts, raws, hashes, origins, num_held_out, place).only(is_kept)


def changed(lane: Lane) -> UserError:
    """Return the error for a lane that has other documents than when it was read."""
    first, last = lane.pieces[0].name, lane.pieces[-1].name
    where = first if first == last else f"{first} to {last}"
    return UserError(
        f"data must not change while it is read; got other documents in {where} than "
        "at first. Start again when nothing writes it."
    )


def _read(lane, place, read, open_reading, batch_bytes, report) -> Iterator:
    """Yield (texts, origins [N, 2], the place after them, its piece, bytes since)."""
    before = open_reading()
    if place.met:
        before.add(place.met)
    texts, origins, size = [], [], 0
    finished = told = sum(piece.size for piece in lane.pieces[: place.piece])
    for index in range(place.piece, len(lane.pieces)):
        piece, file = lane.pieces[index], lane.files[index]
        passed = place.document if index == place.piece else 0
        reading, in_piece, count = open_reading(), -size, 0
        report(piece, 0, 0, 0)
        for count, (number, text) in enumerate(_documents(read, piece, reading), 1):
            if count <= passed:
                continue
            texts.append(text)
            origins.append((file, number))
            size += len(text)
            if size >= batch_bytes:
                after = Place(index, count, before.to_json())
                in_piece += size
                now = finished + min(in_piece, piece.size)
                yield texts, np.array(origins, "<i8"), after, piece, now - told
                texts, origins, size, told = [], [], 0, now
        if count < passed:
            raise changed(lane)
        before.add(reading.to_json())
        finished += piece.size
    after = Place(len(lane.pieces), 0, before.to_json())
    origins = np.array(origins, "<i8").reshape(-1, 2)
    yield texts, origins, after, lane.pieces[-1], finished - told


def _documents(read: Reader, piece: Piece, reading: Reading) -> Iterator:
    """Yield what a reader does; its troubles are not the store's."""
    try:
        yield from read(piece, reading)
    except OSError as error:
        raise UserError(
            f"data file must be readable; got {piece.path or piece.name} "
            f"({error.strerror or error}). Restore it or take it out of data.paths."
        ) from error
