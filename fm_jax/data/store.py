"""The token store: flat little-endian ids in shards, document offsets, a JSON header.

A store is written once, beside its final place, and renamed there when whole, so a
folder with a header is a store that was finished. Three lines of NumPy read one:

    header = json.load(open("header.json"))
    tokens = np.memmap("tokens-00000.bin", header["dtype"], "r")
    offsets = np.load("offsets.npy")
"""

import dataclasses
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from fm_jax import caches
from fm_jax.errors import UserError
from fm_jax.tokenizers.all import Tokenizer

FORMAT = 1
SHARD_TOKENS = 1 << 28
BATCH_BYTES = 1 << 22  # text handed to the tokenizer's threads at a time


@dataclasses.dataclass(frozen=True)
class TokenStore:
    """A finished store, mapped into memory.

    The stream is `end d1 end d2 ... end`: `offsets[k]` is where document k's leading
    end id stands, and the last id of the stream is an end id too. `leftover[k]` is the
    bytes of document k that its ids do not stand for (0 for byte-exact tokenizers).
    """

    path: Path
    header: dict
    shards: tuple[np.ndarray, ...]
    offsets: np.ndarray
    leftover: np.ndarray

    def __len__(self) -> int:
        return self.header["num_tokens"]

    @property
    def num_bytes(self) -> int:
        """Bytes of text."""
        return self.header["num_bytes"]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return ids `start` to `stop` of the stream, across shards."""
        size = self.header["shard_tokens"]
        parts = []
        while start < stop:
            shard, offset = divmod(start, size)
            part = self.shards[shard][offset : min(size, offset + stop - start)]
            parts.append(part)
            start += len(part)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def find_or_build(
    cache: Path,
    documents: Callable[[], Iterable[str]],
    tokenizer: Tokenizer,
    *,
    identity: dict,
    say: Callable[[str], None],
    may_build: bool = True,
) -> TokenStore:
    """Return the store of these documents, from the cache or built into it.

    Its name is a digest of the source's identity, the tokenizer and the format, so a
    changed input is another store. Raises UserError on an empty corpus or a full disk,
    and on what is not there unless it may be built.
    """
    key = {"format": FORMAT, "source": identity, "tokenizer": tokenizer.fingerprint}
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    path = cache / "stores" / name
    if not (path / "header.json").exists():
        caches.require(may_build, path)
        try:
            with caches.made_by_one(path):
                if not (path / "header.json").exists():
                    say(f"Building a token store in {path}")
                    _build(path, documents(), tokenizer, say)
        except OSError as error:
            raise UserError(
                f"data.cache_dir must be writable and have room; got {path} "
                f"({error.strerror or error}). Free space or set "
                "--config.data.cache_dir."
            ) from error
    return open_store(path, tokenizer)


def open_store(path: Path, tokenizer: Tokenizer) -> TokenStore:
    """Return the store at `path`.

    Raises UserError when it was made with another tokenizer, or a file in it does not
    have the size that its header states.
    """
    try:
        header = json.loads((path / "header.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"token store must be whole; got {path}/header.json ({error}). "
            f"Delete {path} and start again: it will be rebuilt."
        ) from error
    if header["tokenizer"] != tokenizer.fingerprint:
        raise UserError(
            f"token store must be made with the tokenizer in use; got {path} made with "
            f"{header['tokenizer']}, in use {tokenizer.fingerprint}."
        )
    shards = []
    for index, count in enumerate(header["shards"]):
        file = path / f"tokens-{index:05d}.bin"
        size = file.stat().st_size if file.exists() else 0
        if size != count * np.dtype(header["dtype"]).itemsize:
            raise UserError(
                f"token store must be whole; got {file} with {size} bytes. "
                f"Delete {path} and start again: it will be rebuilt."
            )
        shards.append(np.memmap(file, header["dtype"], "r"))
    arrays = {}
    for name in ("offsets", "leftover"):
        file = path / f"{name}.npy"
        try:
            arrays[name] = np.load(file, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise UserError(
                f"token store must be whole; got {file} ({error}). "
                f"Delete {path} and start again: it will be rebuilt."
            ) from error
    return TokenStore(path=path, header=header, shards=tuple(shards), **arrays)


def _build(path: Path, documents: Iterable[str], tokenizer, say) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(f".{path.name}.building-*"):
        if not _is_other_alive(int(stale.name.rsplit("-", 1)[1])):
            shutil.rmtree(stale, ignore_errors=True)
    building = path.parent / f".{path.name}.building-{os.getpid()}"
    building.mkdir()
    try:
        header = _write(building, documents, tokenizer)
        if not header["num_documents"]:
            raise UserError(
                "the corpus must have text; got no document with any in "
                "it. Check data.paths and data.eval_fraction."
            )
        (building / "header.json").write_text(json.dumps(header, indent=1))
        for file in building.iterdir():
            _sync(file)
        try:
            building.rename(path)
        except OSError:
            if not (path / "header.json").exists():  # else another process was first
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    say(
        f"  {header['num_documents']:,} documents, {header['num_bytes']:,} bytes, "
        f"{header['num_tokens']:,} tokens"
    )


def _write(building: Path, documents: Iterable[str], tokenizer) -> dict:
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    writer = _ShardWriter(building, dtype)
    gzipped, gzip_bytes = zlib.compressobj(9, wbits=31), 0
    offsets, leftover, num_bytes = [], [], 0
    end = np.array([tokenizer.end_id], dtype)
    for texts in _batches(documents):
        for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
            raw = text.encode()
            offsets.append(writer.total)
            leftover.append(len(raw) - int(tokenizer.byte_lengths[ids].sum()))
            writer.write(end)
            writer.write(ids.astype(dtype))
            gzip_bytes += len(gzipped.compress(raw))
            num_bytes += len(raw)
    writer.write(end)
    writer.close()
    _save(building / "offsets.npy", np.array(offsets, np.int64))
    _save(building / "leftover.npy", np.array(leftover, np.int32))
    return {
        "format": FORMAT,
        "dtype": dtype.str,
        "tokenizer": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "end_id": tokenizer.end_id,
        "num_documents": len(offsets),
        "num_tokens": writer.total,
        "num_bytes": num_bytes,
        "gzip_bytes": gzip_bytes + len(gzipped.flush()),
        "shard_tokens": SHARD_TOKENS,
        "shards": writer.counts,
        "has_leftover": bool(np.any(leftover)),
    }


class _ShardWriter:
    """Appends ids to shards of SHARD_TOKENS each."""

    def __init__(self, folder: Path, dtype: np.dtype):
        self.folder, self.dtype = folder, dtype
        self.counts: list[int] = []
        self._file = None

    @property
    def total(self) -> int:
        return sum(self.counts)

    def write(self, ids: np.ndarray) -> None:
        while len(ids):
            if self._file is None or self.counts[-1] == SHARD_TOKENS:
                self.close()
                name = f"tokens-{len(self.counts):05d}.bin"
                self._file = open(self.folder / name, "wb")  # noqa: SIM115
                self.counts.append(0)
            room = SHARD_TOKENS - self.counts[-1]
            self._file.write(ids[:room].tobytes())
            self.counts[-1] += len(ids[:room])
            ids = ids[room:]

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    texts, size = [], 0
    for text in documents:
        texts.append(text)
        size += len(text)
        if size >= BATCH_BYTES:
            yield texts
            texts, size = [], 0
    if texts:
        yield texts


def _save(file: Path, array: np.ndarray) -> None:
    """Write an .npy. np.save goes by C's buffers and misses a disk that is full."""
    with open(file, "wb") as stream:
        described = np.lib.format.header_data_from_array_1_0(array)
        np.lib.format.write_array_header_1_0(stream, described)
        stream.write(array.data)


def _sync(file: Path) -> None:
    with open(file, "rb") as stream:
        os.fsync(stream.fileno())


def _is_other_alive(pid: int) -> bool:
    if pid == os.getpid():  # left by one of the same id: in containers all are 1
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
