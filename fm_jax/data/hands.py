"""Hands: what works lanes, in this process or in another.

What a lane's shards hold does not depend on whose hand it was, or on how often it began
again: batches and shards begin where the last finished shard ended.
"""

import collections
import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from fm_jax.corpora import sources
from fm_jax.corpora.documents import Reading
from fm_jax.data import arrays, lanes, shards, store
from fm_jax.data.lanes import Hashes, Lane, Place, Report, Sieve, Sizes
from fm_jax.tokenizers.protocol import Tokenizer

AHEAD = 2  # batches that threads encode while others are read and written


@dataclasses.dataclass(frozen=True)
class Work:
    """What is the same for all lanes of a build, as JSON can say it."""

    folder: str  # where shards in the making lie
    source: dict  # the spec of the source's reader
    share: tuple[float, float]
    without: str  # the store whose documents are left out; "": none
    on_bad_text: str
    max_document_bytes: int
    deduplicate: bool
    sizes: Sizes

    @classmethod
    def from_json(cls, fields: dict) -> "Work":
        """Return the work that `dataclasses.asdict` told of."""
        sizes = Sizes(**fields["sizes"])
        return cls(**fields | {"sizes": sizes, "share": tuple(fields["share"])})


class Hand:
    """Works lanes, one after another."""

    def __init__(self, work: Work, tokenizer: Tokenizer, *, num_threads: int):
        self._work, self._folder = work, Path(work.folder)
        self._tokenizer, self._num_threads = tokenizer, num_threads
        held_out = None
        if work.without:
            held_out = Hashes(store.open_store(Path(work.without)).hashes)
        self._batches = functools.partial(
            lanes.batches,
            read=sources.open_reader(work.source),
            open_reading=functools.partial(
                Reading,
                on_bad_text=work.on_bad_text,
                max_document_bytes=work.max_document_bytes,
            ),
            sieve=Sieve(work.share, held_out),
            batch_bytes=work.sizes.batch_bytes,
        )

    def hash(self, lane: Lane, report: Report) -> None:
        """Write the hashes of a lane's documents, to be told which are duplicates."""
        file = hashes_file(self._folder, lane.number)
        beside = file.with_name(f".{file.name}.{os.getpid()}")
        with open(beside, "wb") as stream:
            for batch in self._batches(lane, Place(), report=report):
                stream.write(batch.hashes)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(beside, file)

    def tokenize(self, lane: Lane, room: int, report: Report) -> None:
        """Write a lane's shards, from where they end; keep `room` bytes of its text.

        Raises UserError on bad text, and OSError of the disk that is written to.
        """
        done = shards.records(self._folder, lane.number)
        place = Place(**done[-1]["next"]) if done else Place()
        number, room = len(done), room - sum(record["text"] for record in done)
        with contextlib.closing(self._encoded(lane, place, report)) as encoded:
            while place.piece < len(lane.pieces):
                place, num_text = self._write(lane, number, encoded, place, room)
                number, room = number + 1, room - num_text

    def _write(self, lane, number: int, encoded, place: Place, room: int):
        """Write a shard; return the place after it, and how much text it kept."""
        dropped = {"duplicates": 0, "held_out_elsewhere": 0}
        with shards.Shard(
            self._folder,
            lane=lane.number,
            shard=number,
            tokenizer=self._tokenizer,
            room=max(0, room),
        ) as shard:
            for batch, kept, ids in encoded:
                rows = {"hashes": kept.hashes, "origins": kept.origins}
                shard.add(ids, raws=kept.raws, **rows)
                dropped["duplicates"] += len(batch.texts) - len(kept.texts)
                dropped["held_out_elsewhere"] += batch.num_held_out
                place = batch.after
                if self._is_full(shard):
                    break
            shard.close(next=dataclasses.asdict(place), **dropped)
        return place, shard.num_text

    def _is_full(self, shard: shards.Shard) -> bool:
        sizes = self._work.sizes
        return (
            shard.num_tokens >= sizes.shard_tokens
            or shard.num_documents >= sizes.shard_documents
        )

    def _firsts(self, lane: Lane) -> Callable[[lanes.Batch, Place], np.ndarray]:
        """Return what says which documents of a batch, from a place on, stay.

        It raises UserError where they are not those that duplicates were sought among.
        """
        is_first = arrays.mapped(first_file(self._folder, lane.number))
        hashes = np.fromfile(hashes_file(self._folder, lane.number), "<u8")
        hashes = hashes.reshape(-1, 2)

        def stay(batch: lanes.Batch, place: Place) -> np.ndarray:
            those = slice(place.num_sieved, batch.after.num_sieved)
            if not np.array_equal(hashes[those], batch.hashes):
                raise lanes.changed(lane)
            return is_first[those]

        return stay

    def _encoded(self, lane, place, report) -> Iterator[tuple]:
        """Yield (batch, what is kept of it, its ids); read on while others encode."""
        firsts = self._firsts(lane) if self._work.deduplicate else None
        # One thread is this one, always: the first that has tiktoken's regex runs in it
        # has a fifth less to do than any other that ever does.
        ahead = AHEAD if self._num_threads > 1 else 0
        waiting: collections.deque = collections.deque()
        pool = ThreadPoolExecutor(AHEAD)
        try:
            for batch in self._batches(lane, place, report=report):
                kept = batch.only(firsts(batch, place)) if firsts else batch
                place = batch.after
                ids = functools.partial(self._encode, kept.texts)
                waiting.append((batch, kept, pool.submit(ids).result if ahead else ids))
                if len(waiting) > ahead:
                    *done, ids = waiting.popleft()
                    yield *done, ids()
            for *done, ids in waiting:
                yield *done, ids()
        finally:
            pool.shutdown(cancel_futures=True)

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        return self._tokenizer.encode_batch(texts, num_threads=self._num_threads)


def hashes_file(folder: Path, lane: int) -> Path:
    """Return where the hashes of a lane's documents are put, uint64 [N, 2]."""
    return folder / f"{lane:05d}.hashes"


def first_file(folder: Path, lane: int) -> Path:
    """Return where it says which of a lane's documents are no duplicates, bool [N]."""
    return folder / f"{lane:05d}.first.npy"
