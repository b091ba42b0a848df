"""A token store held against its header: each file that is not as written is named."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fm_jax.data import headers
from fm_jax.data.headers import Unsound
from fm_jax.errors import UserError
from fm_jax.tokenizers import load
from fm_jax.tokenizers.protocol import Tokenizer

BLOCK_BYTES = 1 << 20


def verify(path: Path) -> list[str]:
    """Return what is wrong with the store at `path`, a line a file; [] when sound.

    All of it is read once, in bounded memory. A file is blamed by its own digest; those
    that are as they were written are then held against each other. Nothing that the
    header says is taken as a path.
    """
    path, found = Path(path), _Found()
    header = found.take(headers.NAME, headers.read, path)
    if header is None:
        return found.problems
    files = {}  # of those without a problem: the array that the file is, or its path
    for name in headers.FILES:
        opened = found.take(name, _opened, path / name, header)
        if opened is not None:
            files[name] = opened
    offsets = files.get("offsets.npy")
    if offsets is not None and not found.take("offsets.npy", _rising, offsets, header):
        offsets = None
    counts = _shards(_Stream(path, header, offsets, "counts.npy" in files), found)
    if counts is not None:
        found.take("counts.npy", _same_counts, files["counts.npy"], counts)
    tokenizer = None
    if file := files.get("tokenizer.json"):
        tokenizer = found.take("tokenizer.json", _tokenizer, file, header)
    if "leftover.npy" in files:
        args = files["leftover.npy"], header, counts, tokenizer
        found.take("leftover.npy", _leftover, *args)
    if file := files.get("pieces.json"):
        num_pieces = found.take("pieces.json", _num_pieces, file)
        if num_pieces is not None and "origins.npy" in files:
            found.take("origins.npy", _origins, files["origins.npy"], num_pieces)
    return found.problems


class _Found:
    """What is wrong, a line a file."""

    def __init__(self):
        self.problems: list[str] = []

    def take(self, name: str, function, *args):
        """Return what a function returns; None where it finds its file unsound."""
        try:
            return function(*args)
        except Unsound as error:
            self.problems.append(f"{name}: {error}")
        except OSError as error:
            self.problems.append(f"{name}: cannot be read ({error.strerror or error})")
        return None


def _opened(file: Path, header: dict) -> Path | np.ndarray:
    """Return a file that is as it was written, where it is an array as that."""
    stated = header["arrays"][file.name]
    digest = hashlib.blake2b(digest_size=len(stated) // 2)
    for block in _blocks(file):
        digest.update(block)
    _require_digest(digest, stated)
    return _mapped(file, header) if headers.FILES[file.name] else file


def _blocks(file: Path) -> Iterator[memoryview]:
    held = memoryview(bytearray(BLOCK_BYTES))
    with open(headers.plain(file), "rb") as stream:
        while size := stream.readinto(held):
            yield held[:size]


def _require_digest(digest, stated: str) -> None:
    if digest.hexdigest() != stated:
        raise Unsound("is not as it was written: its blake2b is another")


def _require_size(file: Path, whole: int) -> None:
    size = headers.plain(file).stat().st_size
    if size != whole:
        raise Unsound(f"must have {whole:,} bytes; has {size:,}")


def _mapped(file: Path, header: dict) -> np.ndarray:
    """Return the array of an .npy that has the dtype, shape and size it must have."""
    dtype, names = headers.FILES[file.name]
    shape = tuple(n if isinstance(n, int) else header[n] for n in names)
    with open(file, "rb") as stream:
        try:
            if np.lib.format.read_magic(stream) != (1, 0):
                raise ValueError("it is not of version 1.0")
            found = np.lib.format.read_array_header_1_0(stream)
        except Exception as error:  # a hostile one ends NumPy's parser in many ways
            raise Unsound(f"must be an array of NumPy ({error})") from error
        offset = stream.tell()
    if found != (shape, False, np.dtype(dtype)):
        is_turned = ", in Fortran's order" if found[1] else ""
        raise Unsound(
            f"must be {dtype} {list(shape)}; got {found[2].str} {list(found[0])}"
            f"{is_turned}"
        )
    _require_size(file, offset + np.dtype(dtype).itemsize * int(np.prod(shape)))
    return np.memmap(file, dtype, "r", offset, shape)


def _parts(array: np.ndarray) -> Iterator[np.ndarray]:
    rows = BLOCK_BYTES // 8
    return (np.asarray(array[i : i + rows]) for i in range(0, len(array), rows))


def _rising(offsets: np.ndarray, header: dict) -> bool:
    """Return True where documents follow each other from the start, within the end."""
    before, last = -1, header["num_tokens"] - 1
    for part in _parts(offsets):
        if np.any(np.diff(part, prepend=before) <= 0):
            raise Unsound("must rise from document to document")
        before = int(part[-1])
    if offsets[0] != 0 or before >= last:
        raise Unsound(
            f"must lie from 0 to below the last end id's {last:,}; got {offsets[0]:,} "
            f"to {before:,}"
        )
    return True


def _shards(stream: "_Stream", found: _Found) -> np.ndarray | None:
    """Check all shards; return how often each id stands in them, if all are sound."""
    total, start, is_sound = 0, 0, True
    for number, shard in enumerate(stream.header["shards"]):
        name = headers.shard_name(number)
        counts = found.take(name, stream.check, number, start)
        is_sound = is_sound and counts is not None
        total = total + counts if is_sound else None
        start += shard["tokens"]
    return total if stream.is_counted else None


@dataclasses.dataclass(frozen=True)
class _Stream:
    """The shards, the offsets to hold them against, and whether ids are counted."""

    path: Path
    header: dict
    offsets: np.ndarray | None
    is_counted: bool

    def check(self, number: int, start: int) -> np.ndarray | int:
        """Check the shard that begins at `start` of the stream; return its counts."""
        shard, dtype = self.header["shards"][number], np.dtype(self.header["dtype"])
        file = self.path / headers.shard_name(number)
        _require_size(file, shard["tokens"] * dtype.itemsize)
        digest = hashlib.blake2b(digest_size=len(shard["blake2b"]) // 2)
        problem, counts = self._num_documents(shard, start), 0
        for block in _blocks(file):
            digest.update(block)
            ids = np.frombuffer(block, dtype)
            problem = problem or self._too_big(ids, start) or self._ends(ids, start)
            if not problem and self.is_counted:
                counts += np.bincount(ids, minlength=self.header["vocab_size"])
            start += len(ids)
        _require_digest(
            digest, shard["blake2b"]
        )  # what is damaged is no more than that
        if problem:
            raise Unsound(problem)
        return counts

    def _num_documents(self, shard: dict, start: int) -> str:
        if self.offsets is None:
            return ""
        edges = start, start + shard["tokens"]
        begun = int(np.diff(np.searchsorted(self.offsets, edges))[0])
        if begun == shard["documents"]:
            return ""
        return f"must have {shard['documents']:,} documents; {begun:,} begin in it"

    def _too_big(self, ids: np.ndarray, start: int) -> str:
        vocab_size = self.header["vocab_size"]
        if ids.max() < vocab_size:
            return ""
        place = int(np.argmax(ids >= vocab_size))
        return (
            f"ids must be below {vocab_size:,}; got {ids[place]:,} at "
            f"{start + place:,} of the stream"
        )

    def _ends(self, ids: np.ndarray, start: int) -> str:
        if self.offsets is None:
            return ""
        found = start + np.flatnonzero(ids == self.header["end_id"])
        first, last = np.searchsorted(self.offsets, (start, start + len(ids)))
        stated = self.offsets[first:last]
        if start + len(ids) == self.header["num_tokens"]:
            stated = np.append(stated, self.header["num_tokens"] - 1)
        if np.array_equal(found, stated):
            return ""
        place = int(np.setxor1d(found, stated)[0])
        words = ("an", "none") if place in found else ("no", "one")
        return f"has {words[0]} end id at {place:,} of the stream; must have {words[1]}"


def _same_counts(stated: np.ndarray, counts: np.ndarray) -> None:
    if len(wrong := np.flatnonzero(stated != counts)):
        which = int(wrong[0])
        raise Unsound(
            f"must have how often each id stands in the shards; got {stated[which]:,} "
            f"of id {which:,}, counted {counts[which]:,}"
        )


def _tokenizer(file: Path, header: dict) -> Tokenizer:
    try:
        tokenizer = load.load(file, end_id=header["end_id"])
    except UserError as error:
        raise Unsound(f"must be a tokenizer; {error}") from error
    for name, mine in (
        ("tokenizer", tokenizer.fingerprint),
        ("vocab_size", tokenizer.vocab_size),
    ):
        if mine != header[name]:
            raise Unsound(f"must have the header's {name} {header[name]}; got {mine}")
    return tokenizer


def _leftover(leftover, header, counts, tokenizer) -> None:
    num_bytes, has_any = 0, False
    for part in _parts(leftover):
        num_bytes += int(part.sum(dtype=np.int64))
        has_any |= bool(part.any())
    if has_any != header["has_leftover"]:
        stated = header["has_leftover"]
        raise Unsound(f"must agree with the header's has_leftover {stated}")
    if counts is not None and tokenizer is not None:
        num_bytes += int(counts @ tokenizer.byte_lengths.astype(np.int64))
        if num_bytes != header["num_bytes"]:
            raise Unsound(
                "must make up, with the bytes that ids stand for, the header's "
                f"num_bytes {header['num_bytes']:,}; got {num_bytes:,}"
            )


def _num_pieces(file: Path) -> int:
    try:
        pieces = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise Unsound(f"must be JSON ({error})") from error
    is_list = isinstance(pieces, list) and all(
        isinstance(p, list) and len(p) == 2 and all(isinstance(x, str) for x in p)
        for p in pieces
    )
    if not is_list:
        raise Unsound("must be a list of [name, path]")
    return len(pieces)


def _origins(origins: np.ndarray, num_pieces: int) -> None:
    for part in _parts(origins):
        if part.min() < 0 or part[:, 0].max() >= num_pieces:
            raise Unsound(f"must point into the {num_pieces:,} of pieces.json")
