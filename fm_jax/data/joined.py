"""The shards of all lanes made one store: moved, and their documents' rows strung."""

import collections
import contextlib
import json
import os
import zlib
from pathlib import Path

import numpy as np

from fm_jax import caches
from fm_jax.corpora import paths
from fm_jax.data import headers, shards
from fm_jax.data.arrays import Array, digest
from fm_jax.data.store import COLUMNS
from fm_jax.tokenizers.protocol import Tokenizer

GZIP_BYTES = 1 << 26  # of the first text, where gzip is asked how small that becomes
QUANTILES = (0, 5, 25, 50, 75, 95, 100)


def join(
    building: Path,
    parts: Path,
    records: list[dict],
    *,
    tokenizer: Tokenizer,
    files: list[tuple[str, str]],
) -> dict:
    """Make a store's files in `building`; return what its header says of them.

    records: of the shards that have documents, in order. Killed anywhere it can begin
    again: shards are moved to names that follow from their order, and all else is made
    of what stays in `parts`.
    """
    tokens = _move(building, parts, records, tokenizer)
    digests, found = _string(building, parts, records, tokenizer)
    texts = {
        "pieces.json": json.dumps([[n, paths.suffix_of(path)] for n, path in files]),
        "tokenizer.json": tokenizer.to_json(),
    }
    for name, text in texts.items():
        caches.write_whole(building / name, text)
        digests[name] = digest(text.encode()).hexdigest()
    return {
        "dtype": shards.dtype_of(tokenizer.vocab_size).str,
        "tokenizer": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "end_id": tokenizer.end_id,
        "num_documents": sum(shard["documents"] for shard in tokens),
        "num_tokens": sum(shard["tokens"] for shard in tokens),
        "num_bytes": sum(record["bytes"] for record in records),
        **_gzip(parts, records),
        **found,
        "shards": tokens,
        "arrays": digests,
    }


def _move(building, parts, records, tokenizer) -> list[dict]:
    """Put shards in place and end the stream; return what the header says of each."""
    dtype = shards.dtype_of(tokenizer.vocab_size)
    moved = []
    for number, record in enumerate(records):
        name = headers.shard_name(number)
        with contextlib.suppress(FileNotFoundError):  # it was moved before
            os.rename(parts / f"{record['name']}.tokens", building / name)
        counted = {key: record[key] for key in ("tokens", "documents", "blake2b")}
        moved.append({"file": name} | counted)
    last = moved[-1]
    with open(building / last["file"], "r+b") as stream:
        stream.seek(last["tokens"] * dtype.itemsize)
        stream.write(np.array([tokenizer.end_id], dtype))
        stream.flush()
        os.fsync(stream.fileno())
    last |= {"tokens": last["tokens"] + 1, "blake2b": records[-1]["blake2b_closed"]}
    return moved


def _string(building, parts, records, tokenizer) -> tuple[dict, dict]:
    """Write the arrays; return their digests, and what the header says of them."""
    num_documents = sum(record["documents"] for record in records)
    counts = np.zeros(tokenizer.vocab_size, "<i8")
    counts[tokenizer.end_id] = 1  # the last of the stream
    lengths: collections.Counter = collections.Counter()
    has_leftover, start, last = False, 0, np.empty(0, "<i8")
    with contextlib.ExitStack() as stack:
        columns = {
            name: stack.enter_context(
                Array(building / f"{name}.npy", dtype, (num_documents, *shape))
            )
            for name, (dtype, shape) in COLUMNS.items()
        }
        for record in records:
            for rows in shards.rows(parts, record):
                rows["offsets"] += start
                for name, column in columns.items():
                    column.write(rows[name])
                has_leftover |= bool(rows["leftover"].any())
                _count(lengths, np.concatenate([last, rows["offsets"]]))
                last = rows["offsets"][-1:].copy()
            counts += shards.counts(parts, record)
            start += record["tokens"]
        _count(lengths, np.concatenate([last, [start]]))
        digests = {f"{name}.npy": column.digest for name, column in columns.items()}
    with Array(building / "counts.npy", "<i8", counts.shape) as column:
        column.write(counts)
        digests["counts.npy"] = column.digest
    unknown = tokenizer.unknown_id
    return digests, {
        "has_leftover": has_leftover,
        "quantiles": _quantiles(lengths),
        "vocabulary_used": int(np.count_nonzero(counts)),
        "unknown_ids": int(counts[unknown]) if unknown >= 0 else 0,
    }


def _count(lengths: collections.Counter, offsets: np.ndarray) -> None:
    """Count documents by their tokens, the end id not among them."""
    found, times = np.unique(np.diff(offsets) - 1, return_counts=True)
    for length, count in zip(found.tolist(), times.tolist(), strict=True):
        lengths[length] += count


def _quantiles(lengths: collections.Counter) -> dict[str, int]:
    """Return the tokens of the document that stands at each percent, rounded down."""
    values = sorted(lengths)
    below = np.cumsum([lengths[value] for value in values])
    ranks = [percent * (int(below[-1]) - 1) // 100 for percent in QUANTILES]
    places = np.searchsorted(below, ranks, side="right")
    return {str(q): values[p] for q, p in zip(QUANTILES, places, strict=True)}


def _gzip(parts: Path, records: list[dict]) -> dict[str, int]:
    """Return how small gzip -9 makes the text that was kept, and of how many bytes."""
    packer = zlib.compressobj(9, wbits=31)
    size, left = 0, GZIP_BYTES
    for record in records:
        if record["text"] and left:
            with open(parts / f"{record['name']}.text", "rb") as stream:
                while left and (raw := stream.read(min(left, 1 << 20))):
                    size += len(packer.compress(raw))
                    left -= len(raw)
    of = GZIP_BYTES - left
    return {"gzip_bytes": size + len(packer.flush()) if of else 0, "gzip_of": of}
