"""The token store: flat little-endian ids in shards, an array a file, a JSON header.

A store is written once, beside its final place, and renamed there when whole, so a
folder with a header is a store that was finished. Three lines of NumPy read one:

    header = json.load(open("header.json"))
    tokens = np.memmap("tokens-00000.bin", header["dtype"], "r")
    offsets = np.load("offsets.npy")
"""

import dataclasses
import functools
import hashlib
from pathlib import Path

import numpy as np

from fm_jax import jsonfiles
from fm_jax.corpora import documents
from fm_jax.data import arrays, headers
from fm_jax.errors import UserError
from fm_jax.tokenizers.protocol import Tokenizer

READ_AT_START = 1 << 29  # bytes of a store, which take a second
# Of each document: where its leading end id stands in the stream; the bytes that its
# ids do not stand for; its text's hash; its place, as (index into pieces.json, number).
COLUMNS = {
    name: (headers.FILES[f"{name}.npy"][0], headers.FILES[f"{name}.npy"][1][1:])
    for name in ("offsets", "leftover", "hashes", "origins")
}


@dataclasses.dataclass(frozen=True)
class TokenStore:
    """A finished store, mapped into memory.

    The stream is `end d1 end d2 ... end`: `offsets[k]` is where document k's leading
    end id stands, and the last id of the stream is an end id too. `leftover[k]` is the
    bytes of document k that its ids do not stand for (0 for byte-exact tokenizers). A
    document lies in one shard; `starts[i]` is where shard i begins in the stream.
    """

    path: Path
    header: dict
    shards: tuple[np.ndarray, ...]
    starts: np.ndarray
    offsets: np.ndarray
    leftover: np.ndarray

    def __len__(self) -> int:
        return self.header["num_tokens"]

    @property
    def num_bytes(self) -> int:
        """Bytes of text."""
        return self.header["num_bytes"]

    @property
    def tokenizer(self) -> str:
        """The fingerprint of the tokenizer that made the ids."""
        return self.header["tokenizer"]

    @functools.cached_property
    def hashes(self) -> np.ndarray:
        """Each document's `text_hash` as two words, uint64 [documents, 2]."""
        return _array(self.path, "hashes", self.header["num_documents"])

    @functools.cached_property
    def origins(self) -> np.ndarray:
        """Each document's (index into `pieces`, place), int64 [documents, 2]."""
        return _array(self.path, "origins", self.header["num_documents"])

    @functools.cached_property
    def pieces(self) -> list[list[str]]:
        """The [name, suffix] of each file or dataset, in the order of reading."""
        file = self.path / "pieces.json"
        try:
            found = jsonfiles.parse(jsonfiles.text(file))
        except (OSError, ValueError) as error:
            raise not_whole(self.path, f"{file} ({error})") from error
        jsonfiles.check(found, [[str]], str(file))
        return found

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return ids `start` to `stop` of the stream, across shards."""
        shard = int(np.searchsorted(self.starts, start, side="right")) - 1
        offset = start - int(self.starts[shard])
        parts = [self.shards[shard][offset : offset + stop - start]]
        missing = stop - start - len(parts[0])
        while missing > 0:
            shard += 1
            parts.append(self.shards[shard][:missing])
            missing -= len(parts[-1])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def place(self, position: int) -> str:
        """Return a place of the stream in words, with the shard it is in."""
        shard = int(np.searchsorted(self.starts, position, side="right")) - 1
        return f"{self.path / headers.shard_name(shard)} at {position:,} of the stream"

    def require_unchanged(self) -> None:
        """Raise UserError where a shard is not as it was written, by its digest.

        A store of more than READ_AT_START bytes is left to `verify`.
        """
        if sum(shard.nbytes for shard in self.shards) > READ_AT_START:
            return
        for shard, ids in zip(self.header["shards"], self.shards, strict=True):
            stated = shard["blake2b"]
            if hashlib.blake2b(ids, digest_size=len(stated) // 2).hexdigest() != stated:
                file = self.path / shard["file"]
                raise not_whole(
                    self.path,
                    f"{file}, which is not as it was written: its blake2b is another",
                )

    def documents_of(self, positions: np.ndarray) -> np.ndarray:
        """Return which document each place of the stream is of, int64.

        The end id before a document is the document's own; the last of the stream is
        the last document's.
        """
        return np.searchsorted(self.offsets, positions, side="right") - 1

    def origin(self, document: int) -> str:
        """Return where a document stood: "a/b.jsonl line 7", "x.parquet row 3"."""
        piece, place = (int(number) for number in self.origins[document])
        if not 0 <= piece < len(self.pieces) or len(self.pieces[piece]) != 2:
            raise not_whole(self.path, f"an origin in piece {piece}")
        name, suffix = self.pieces[piece]
        return documents.where(name, place, f"x{suffix}")


def open_store(path: Path, tokenizer: Tokenizer | None = None) -> TokenStore:
    """Return the store at `path`, made with `tokenizer` or, at None, with any.

    Raises UserError when it was made with another one, its header is not as it was
    written, or a file in it does not have the size that its header states.
    """
    path = Path(path)
    try:
        header = headers.read(path)
    except headers.Unsound as error:
        raise not_whole(path, f"{path / headers.NAME} ({error})") from error
    if tokenizer is not None and header["tokenizer"] != tokenizer.fingerprint:
        raise UserError(
            f"token store must be made with the tokenizer in use; got {path} made with "
            f"{header['tokenizer']}, in use {tokenizer.fingerprint}."
        )
    shards = []
    for shard in header["shards"]:
        file = path / shard["file"]
        try:
            size = headers.plain(file).stat().st_size
        except headers.Unsound as error:
            raise not_whole(path, f"{file}, which {error}") from error
        if size != shard["tokens"] * np.dtype(header["dtype"]).itemsize:
            raise not_whole(path, f"{file} with {size} bytes")
        # An ndarray over the map: slices of np.memmap itself take thrice the time.
        shards.append(np.asarray(np.memmap(file, header["dtype"], "r")))
    counts = np.array([0, *(shard["tokens"] for shard in header["shards"])], np.int64)
    return TokenStore(
        path=path,
        header=header,
        shards=tuple(shards),
        starts=np.cumsum(counts)[:-1],
        offsets=_array(path, "offsets", header["num_documents"]),
        leftover=_array(path, "leftover", header["num_documents"]),
    )


def not_whole(path: Path, got: str) -> UserError:
    """Return the error for a store in which something is missing or cut."""
    return UserError(
        f"token store must be whole; got {got}. "
        f"Delete {path} and build it again, as the same command does."
    )


def _array(path: Path, name: str, num_documents: int) -> np.ndarray:
    file, (dtype, shape) = path / f"{name}.npy", COLUMNS[name]
    try:
        found = arrays.mapped(headers.plain(file))
    except (headers.Unsound, OSError, ValueError) as error:
        raise not_whole(path, f"{file} ({error})") from error
    if found.shape != (num_documents, *shape) or found.dtype != np.dtype(dtype):
        raise not_whole(path, f"{file} of {found.dtype} {list(found.shape)}")
    return np.asarray(found)
