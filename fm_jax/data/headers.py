"""The header of a token store: sealed when it is written, read as a stranger's."""

import hashlib
import json
import re
import stat
from pathlib import Path

FORMAT = 2
NAME = "header.json"
# What a store has beside its shards and its header: (dtype, shape) of arrays, with the
# names of the header's counts for their sizes.
FILES = {
    "offsets.npy": ("<i8", ("num_documents",)),
    "leftover.npy": ("<i4", ("num_documents",)),
    "hashes.npy": ("<u8", ("num_documents", 2)),
    "origins.npy": ("<i8", ("num_documents", 2)),
    "counts.npy": ("<i8", ("vocab_size",)),
    "pieces.json": None,
    "tokenizer.json": None,
}
COUNTS = ("vocab_size", "end_id", "num_documents", "num_tokens", "num_bytes")
MOST_IDS = 1 << 24  # memory is taken for each id before any is read
MOST_BYTES = 1 << 26
MOST_LETTERS = 60
HEX = re.compile(r"(?:[0-9a-f]{2}){8,64}")


class Unsound(Exception):
    """A file of a store that is not what it must be, in words that follow its name."""


def shard_name(number: int) -> str:
    """Return the name of a store's shard."""
    return f"tokens-{number:05d}.bin"


def seal(header: dict) -> str:
    """Return the text of header.json, with the digest of its own bytes in it."""
    text = json.dumps({**header, "digest": ""}, indent=1)
    return text[: -len('"\n}')] + f'{_digest(text.encode())}"\n}}'


def read(folder: Path) -> dict:
    """Return the header of the store in `folder`, each field of it safe to use.

    Sizes are not negative and add up, names of files are those that the format gives,
    digests are digests. Raises Unsound on anything else, and on a changed seal.
    """
    raw, header = _parsed(plain(folder / NAME))
    _require(header.get("format") == FORMAT, "format", FORMAT, header.get("format"))
    _require_seal(raw, header.get("digest"))
    for name in COUNTS:
        _count(name, header.get(name))
    vocab_size, end_id = header["vocab_size"], header["end_id"]
    demand = f"from 1 to {MOST_IDS}"
    _require(1 <= vocab_size <= MOST_IDS, "vocab_size", demand, vocab_size)
    _require(end_id < vocab_size, "end_id", f"below {vocab_size}", end_id)
    dtype = "<u2" if vocab_size <= 1 << 16 else "<u4"
    _require(header.get("dtype") == dtype, "dtype", dtype, header.get("dtype"))
    _require(header["num_documents"] >= 1, "num_documents", "1 or more", 0)
    kinds = {"tokenizer": str, "name": str, "has_leftover": bool}
    for name, kind in kinds.items():
        value = header.get(name)
        _require(isinstance(value, kind), name, f"a {kind.__name__}", value)
    # Files of the cache are called after it.
    is_one = header["name"].isprintable() and len(header["name"]) <= MOST_LETTERS
    _require(is_one, "name", f"printable, of {MOST_LETTERS} letters", header["name"])
    for name in ("gzip_of", "gzip_bytes"):  # of older stores there are none
        _count(name, header.get(name, 0))
    _shards(header)
    arrays = header.get("arrays")
    names = list(arrays) if isinstance(arrays, dict) else arrays
    is_whole = isinstance(arrays, dict) and set(arrays) == set(FILES)
    _require(is_whole, "arrays", f"digests of {', '.join(FILES)}", names)
    for name, digest in arrays.items():
        _hex(f"arrays[{name!r}]", digest)
    return header


def plain(file: Path) -> Path:
    """Return `file`; raise Unsound where it is missing or no plain file."""
    try:
        mode = file.stat().st_mode
    except OSError as error:
        is_missing = isinstance(error, FileNotFoundError)
        raise Unsound("is missing" if is_missing else _cannot(error)) from error
    if not stat.S_ISREG(mode):
        raise Unsound("is not a plain file")
    return file


def _parsed(file: Path) -> tuple[bytes, dict]:
    try:
        if file.stat().st_size > MOST_BYTES:
            raise Unsound(f"must have at most {MOST_BYTES:,} bytes")
        raw = file.read_bytes()
    except OSError as error:
        raise Unsound(_cannot(error)) from error
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise Unsound(f"is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise Unsound("is not an object of JSON")
    return raw, header


def _require_seal(raw: bytes, digest) -> None:
    _hex("digest", digest)
    if _digest(raw.replace(f'"{digest}"'.encode(), b'""'), len(digest) // 2) != digest:
        raise Unsound("was changed after it was written: its digest is another")


def _shards(header: dict) -> None:
    shards = header.get("shards")
    is_list = isinstance(shards, list) and shards
    _require(is_list, "shards", "a list of one or more", shards)
    for number, shard in enumerate(shards):
        name = f"shards[{number}]"
        _require(isinstance(shard, dict), name, "an object", shard)
        file = shard_name(number)
        _require(shard.get("file") == file, f"{name}['file']", file, shard.get("file"))
        for count in ("tokens", "documents"):
            _count(f"{name}[{count!r}]", shard.get(count), least=1)
        _hex(f"{name}['blake2b']", shard.get("blake2b"))
    for count in ("tokens", "documents"):
        stated, total = header[f"num_{count}"], sum(shard[count] for shard in shards)
        demand = f"the shards' {total} together"
        _require(stated == total, f"num_{count}", demand, stated)


def _count(name: str, value, least: int = 0) -> None:
    is_count = isinstance(value, int) and not isinstance(value, bool)
    demand = f"a count, at least {least}" if least else "a count"
    _require(is_count and least <= value < 1 << 62, name, demand, value)


def _hex(name: str, value) -> None:
    is_digest = isinstance(value, str) and HEX.fullmatch(value)
    _require(is_digest, name, "a blake2b in hex", value)


def _require(is_so: object, name: str, demand: object, value: object) -> None:
    if not is_so:
        raise Unsound(f"{name} must be {demand}; got {repr(value)[:80]}")


def _digest(raw: bytes, size: int = 16) -> str:
    return hashlib.blake2b(raw, digest_size=size).hexdigest()


def _cannot(error: OSError) -> str:
    return f"cannot be read ({error.strerror or error})"
