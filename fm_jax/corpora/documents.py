"""Documents: what a source promises of them, and how bad ones are met."""

import collections
import dataclasses
import hashlib
import io
from collections.abc import Callable, Iterator
from typing import Protocol

from fm_jax.corpora import fields, paths
from fm_jax.errors import UserError, unknown

PIECE_BYTES = 1 << 26  # of a large file that is read in parts, about
ON_BAD_TEXT = ("error", "skip", "replace")
SEEN = "--config.data.on_bad_text=skip"
MENDED = f"{SEEN} or =replace"
# What is asked for where text is bad, and the way out, by the kind of bad.
BAD = {
    "bad UTF-8": ("text must be UTF-8", f"Mend it, or set {MENDED}."),
    "broken JSON": (
        "line must be a JSON object with text under data.text_field",
        f"Mend it, or set {SEEN}.",
    ),
    "missing text": (
        "document must have text under data.text_field",
        f"Set --config.data.text_field (of examples: data.fields) or {SEEN}.",
    ),
    "NUL bytes": ("text must hold no NUL", f"Mend it, or set {MENDED}."),
    "too long": (
        "document must have at most data.max_document_bytes",
        f"Raise that, or set {MENDED}.",
    ),
    "cut short": (
        "data file must be whole",
        f"Restore it, take it out of data.paths, or set {SEEN} to leave out what is "
        "damaged.",
    ),
    "empty file": (
        "data file must hold a document",
        f"Take it out of data.paths or set {SEEN}.",
    ),
    "unreadable": (
        "data file must be readable",
        f"Restore it, take it out of data.paths, or set {SEEN}.",
    ),
}
NUM_EXAMPLES = 3  # places that are kept of each kind of bad


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a source, read from its start to its end by one reader.

    `start` and `stop` count bytes of .jsonl, row groups of .parquet, rows elsewhere.
    """

    name: str  # what a person is shown: relative to the corpus, or the dataset's
    path: str = ""  # what is opened: an absolute path or a URL; "": not a file
    start: int = 0
    stop: int = -1  # -1: to the end
    first: int = 0  # number of the first line or row in it, as places count them
    size: int = 0  # bytes that reading it takes, about: for shares of work
    stamp: str = ""  # of the file when its content became known; "": not a file

    def to_json(self) -> dict:
        """Return what `from_json` makes it of again."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: dict) -> "Piece":
        """Return the piece that `to_json` told of."""
        return cls(**fields)

    def where(self, place: int, *, whole: bool = False) -> str:
        """Return a document's place in words; `whole`: with all of the path."""
        return where((whole and self.path) or self.name, place, self.path)


class Source(Protocol):
    """Where text comes from: pieces that any process reads alike."""

    is_held_out_apart: bool  # eval documents come from elsewhere than train's

    def pieces(self, split: str) -> list[Piece]:
        """Return the parts of a split, in order."""

    def share(self, split: str) -> tuple[float, float]:
        """Return [low, high): documents whose `fraction` lies there are the split's."""

    def identity(self, split: str) -> dict:
        """Return what the split's documents follow from, contents included; JSON."""

    def spec(self, split: str) -> dict:
        """Return the JSON from which `sources.open_reader` makes the reader."""


class Reading:
    """How bad text is met while pieces are read, and what was met.

    Under "error" the first bad thing is a UserError. Under "skip" and "replace" it is
    counted, its kind a key of BAD; what "replace" cannot mend it skips.
    """

    def __init__(self, *, on_bad_text: str, max_document_bytes: int):
        if on_bad_text not in ON_BAD_TEXT:
            raise unknown("data.on_bad_text", on_bad_text, ON_BAD_TEXT)
        if max_document_bytes >= 1 << 31:  # what is left over of one is an int32
            raise UserError(
                "data.max_document_bytes must be below 2**31; got "
                f"{max_document_bytes}. Cut longer documents."
            )
        if max_document_bytes < 4:
            raise UserError(
                "data.max_document_bytes must be at least 4, what a character may "
                f"take; got {max_document_bytes}."
            )
        self.on_bad_text, self.max_document_bytes = on_bad_text, max_document_bytes
        self.skipped: collections.Counter = collections.Counter()
        self.replaced: collections.Counter = collections.Counter()
        self.empty = 0  # documents without text
        self.examples: dict[str, list[str]] = {}

    def texts(
        self, found: object, piece: Piece, place: int, *, offset: int = 0
    ) -> tuple[str, ...]:
        """Return the documents in what was found at a place, each with text.

        It should be a str, or UTF-8 bytes, or a dict of fields whose JSON is the text;
        `offset` is where they begin in the file. Most often there is one document; none
        where it is empty or skipped, and several where it is too long and cut, as JSON
        never is. Raises UserError as `bad` does.
        """
        text = self._as_text(found, piece, place, offset)
        if not text:
            self.empty += text is not None
            return ()
        size = len(text) if text.isascii() else len(text.encode())
        if size <= self.max_document_bytes:
            return (text,)
        if isinstance(found, dict):
            self.bad("too long", piece, place, self.too_long)
            return ()
        if not self.mends("too long", piece, place, self.too_long):
            return ()
        stream = io.BytesIO(text.encode())
        limit = self.max_document_bytes
        parts = cut(stream.read(limit + 1), stream.read, limit)
        return tuple(part.decode() for part in parts)

    @property
    def too_long(self) -> str:
        """The problem of a document that is too long, in words."""
        return f"over {self.max_document_bytes:,} bytes"

    def bad(
        self,
        kind: str,
        piece: Piece,
        place: int | None,
        problem: str,
        *,
        count: int = 1,
    ) -> None:
        """Count what cannot be mended; a place of None is the whole file.

        Raises UserError under "error", naming file, place, problem and way out.
        """
        if self.on_bad_text == "error":
            demand, way_out = BAD[kind]
            at = piece.path or piece.name
            at = at if place is None else piece.where(place, whole=True)
            at = paths.shown(at)
            raise UserError(f"{demand}; got {at} ({problem}). {way_out}")
        self._count(self.skipped, kind, piece, place, count)

    def mends(self, kind: str, piece: Piece, place: int, problem: str) -> bool:
        """Return whether the caller is to mend something; else it is counted as bad."""
        if self.on_bad_text != "replace":
            self.bad(kind, piece, place, problem)
            return False
        self._count(self.replaced, kind, piece, place, 1)
        return True

    def to_json(self) -> dict:
        """Return what was met, for `add` to take up."""
        return {
            "skipped": dict(sorted(self.skipped.items())),
            "replaced": dict(sorted(self.replaced.items())),
            "empty": self.empty,
            "examples": {
                kind: [*self.examples[kind]] for kind in sorted(self.examples)
            },
        }

    def add(self, met: dict) -> None:
        """Add what another reading met, after this one, by its `to_json`."""
        self.skipped.update(met["skipped"])
        self.replaced.update(met["replaced"])
        self.empty += met["empty"]
        for kind, places in met["examples"].items():
            known = self.examples.setdefault(kind, [])
            known += places[: NUM_EXAMPLES - len(known)]

    def decoded(self, raw: bytes, piece: Piece, place: int, offset: int) -> str | None:
        """Return UTF-8 bytes as text; None where they are bad and skipped."""
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            problem = f"a bad byte at offset {offset + error.start}"
            if not self.mends("bad UTF-8", piece, place, problem):
                return None
            return raw.decode(errors="replace")

    def _as_text(self, found, piece, place, offset) -> str | None:
        """Return what was found as text that has UTF-8 and no NUL; None: skipped."""
        kind = "null" if found is None else type(found).__name__
        problem = f"{kind} in its place"
        if isinstance(found, dict):
            problem = f"none of the fields {', '.join(map(repr, found))}"
            found = fields.as_text(found)
        if isinstance(found, bytes):
            found = self.decoded(found, piece, place, offset)
        elif not isinstance(found, str):
            self.bad("missing text", piece, place, problem)
            found = None
        elif not found.isascii():
            try:
                found.encode()
            except UnicodeEncodeError as error:  # JSON may spell half of a pair
                problem = f"half a surrogate pair at character {error.start}"
                if not self.mends("bad UTF-8", piece, place, problem):
                    return None
                found = found.encode(errors="replace").decode()
        if found and "\0" in found:
            problem = f"one at character {found.index(chr(0))}"
            if not self.mends("NUL bytes", piece, place, problem):
                return None
            found = found.replace("\0", "\ufffd")
        return found

    def _count(self, counter, kind, piece, place, count) -> None:
        counter[kind] += count
        places = self.examples.setdefault(kind, [])
        if len(places) < NUM_EXAMPLES:
            places.append(piece.name if place is None else piece.where(place))


Reader = Callable[[Piece, Reading], Iterator[tuple[int, str]]]


def where(name: str, place: int, path: str = "") -> str:
    """Return a document's place in words: "a.jsonl line 7", "a.txt", "squad row 3".

    name: as it is shown. path: of the file, whose suffix says what is counted.
    """
    suffix = paths.suffix_of(path)
    if suffix in paths.LINES:
        return f"{name} line {place}"
    if suffix in paths.TEXT:
        return f"{name} part {place + 1}" if place else name
    return f"{name} row {place}"


def cut(held: bytes, read: Callable[[int], bytes], limit: int) -> Iterator[bytes]:
    """Yield what is held and what `read` gives more, in parts of at most `limit` bytes.

    No more than one part is held. It ends after the last line end in it; without one,
    before a character that would not fit.
    """
    while len(held) > limit:
        stop = held.rfind(b"\n", 0, limit) + 1
        if not stop:
            starts = (n for n in range(limit, limit - 4, -1) if held[n] & 0xC0 != 0x80)
            stop = next(starts, limit)
        yield held[:stop]
        held = held[stop:]
        held += read(limit + 1 - len(held))
    if held:
        yield held


def share(split: str, eval_fraction: float) -> tuple[float, float]:
    """Return the range of hashes, as fractions of 1, of a split's documents.

    A fraction of 0 is of splits that share no text: all of it.
    """
    if not eval_fraction:
        return 0.0, 1.0
    return (0.0, eval_fraction) if split == "eval" else (eval_fraction, 1.0)


def text_hash(text: str) -> bytes:
    """Return the 16 bytes that stand for a document's text."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def fraction(digest: bytes) -> float:
    """Return a hash as a number in [0, 1), by its first 8 bytes."""
    # The largest would round up to 1, and lie in no split.
    return min(int.from_bytes(digest[:8], "big") / 2**64, 1 - 2**-53)
