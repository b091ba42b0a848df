"""Shards in the making: ids and a row for each document, whole once they have a record.

A shard in the making is three files of one name, and the record that says they are on
the disk: `.tokens` has ids as they lie in the store, `.rows` a DOCUMENT for each
document and then how often each id stands in it (int64), `.text` the first bytes of
text where those are wanted, `.json` is the record.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from fm_jax import caches
from fm_jax.data import arrays
from fm_jax.data.store import COLUMNS
from fm_jax.tokenizers.protocol import Tokenizer

# `offsets` are counted from the shard's start here.
DOCUMENT = np.dtype([(name, *spec) for name, spec in COLUMNS.items()])
PARTS = ("tokens", "rows", "text")
CHUNK_DOCUMENTS = 1 << 16


def dtype_of(vocab_size: int) -> np.dtype:
    """Return what ids are written as."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def records(folder: Path, lane: int) -> list[dict]:
    """Return the records of a lane's finished shards, in order."""
    found = []
    while (file := folder / f"{_name(lane, len(found))}.json").exists():
        found.append(json.loads(file.read_text()) | {"name": file.stem})
    return found


def rows(folder: Path, record: dict) -> Iterator[np.ndarray]:
    """Yield the rows of a finished shard's documents, some at a time."""
    with open(folder / f"{record['name']}.rows", "rb") as stream:
        for start in range(0, record["documents"], CHUNK_DOCUMENTS):
            count = min(CHUNK_DOCUMENTS, record["documents"] - start)
            yield np.fromfile(stream, DOCUMENT, count)


def counts(folder: Path, record: dict) -> np.ndarray:
    """Return how often each id stands in a finished shard."""
    file = folder / f"{record['name']}.rows"
    return np.fromfile(file, "<i8", offset=record["documents"] * DOCUMENT.itemsize)


class Shard:
    """Takes a lane's documents in their order, and is there only when closed.

    Files have names of this process until then, so that what one killed process left
    is never taken for a shard. OSError comes out, of a full disk among others.
    """

    def __init__(
        self, folder: Path, *, lane: int, shard: int, tokenizer: Tokenizer, room: int
    ):
        """room: how many bytes of text are to be kept; the first ones are."""
        self.num_documents = self.num_tokens = self.num_bytes = self.num_text = 0
        self._folder, self._name, self._room = folder, _name(lane, shard), room
        self._tokenizer, self._dtype = tokenizer, dtype_of(tokenizer.vocab_size)
        self._end = np.array([tokenizer.end_id], self._dtype)
        self._counts = np.zeros(tokenizer.vocab_size, "<i8")
        self._digest = arrays.digest(b"")
        self._files = {
            part: open(self._beside(part), "wb")  # noqa: SIM115, __exit__ closes
            for part in PARTS[: 3 if room else 2]
        }

    def add(
        self,
        ids: Sequence[np.ndarray],
        *,
        raws: Sequence[bytes],
        hashes: np.ndarray,
        origins: np.ndarray,
    ) -> None:
        """Append documents: their ids, texts, hashes [N, 2] and places [N, 2]."""
        if not len(ids):
            return
        with_ends = [part for own in ids for part in (self._end, own)]
        stream = np.concatenate(with_ends, dtype=self._dtype, casting="same_kind")
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        starts = np.cumsum(lengths + 1) - lengths - 1
        sizes = np.fromiter(map(len, raws), np.int64, len(raws))
        counts = np.bincount(stream, minlength=len(self._counts))
        told = np.empty(len(ids), DOCUMENT)
        told["offsets"] = self.num_tokens + starts
        told["leftover"] = self._leftover(stream, starts, sizes, counts)
        told["hashes"], told["origins"] = hashes, origins
        self._counts += counts
        self._digest.update(stream)
        self._files["tokens"].write(stream)
        self._files["rows"].write(told)
        if self.num_text < self._room:
            kept = b"".join(raws)[: self._room - self.num_text]
            self._files["text"].write(kept)
            self.num_text += len(kept)
        self.num_documents += len(ids)
        self.num_tokens += len(stream)
        self.num_bytes += int(sizes.sum())

    def _leftover(self, stream, starts, sizes, counts) -> np.ndarray | int:
        """Return the bytes of each document that its ids do not stand for."""
        lengths_V = self._tokenizer.byte_lengths
        if self._tokenizer.is_exact and counts @ lengths_V == sizes.sum():
            return 0
        stood_for = np.add.reduceat(lengths_V[stream], starts, dtype=np.int64)
        return sizes - stood_for + lengths_V[self._tokenizer.end_id]

    def close(self, **rest) -> None:
        """Put the shard in place, on the disk, with `rest` in its record."""
        self._files["rows"].write(self._counts)
        for stream in self._files.values():
            stream.flush()
            os.fsync(stream.fileno())
            stream.close()
        for part in self._files:
            os.replace(self._beside(part), self._folder / f"{self._name}.{part}")
        arrays.sync(self._folder)
        closed = self._digest.copy()
        closed.update(self._end)
        record = {
            "documents": self.num_documents,
            "tokens": self.num_tokens,
            "bytes": self.num_bytes,
            "text": self.num_text,
            "blake2b": self._digest.hexdigest(),
            "blake2b_closed": closed.hexdigest(),  # with the end id of the last shard
        }
        file = self._folder / f"{self._name}.json"
        caches.write_whole(file, json.dumps(record | rest))

    def __enter__(self) -> "Shard":
        return self

    def __exit__(self, *_) -> None:
        """Remove what was not put in place: all of it, or nothing if it was closed."""
        for part, stream in self._files.items():
            # A full disk fails a second time, on what is still to be written.
            with contextlib.suppress(OSError):
                stream.close()
            self._beside(part).unlink(missing_ok=True)

    def _beside(self, part: str) -> Path:
        return self._folder / f".{self._name}.{part}.{os.getpid()}"


def _name(lane: int, shard: int) -> str:
    return f"{lane:05d}-{shard:05d}"
