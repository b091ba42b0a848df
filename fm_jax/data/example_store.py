"""Examples as flat arrays on the disk: made once from their source, then mapped."""

import dataclasses
import functools
import hashlib
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from fm_jax import caches
from fm_jax.corpora import documents, paths
from fm_jax.corpora.documents import Piece
from fm_jax.data import store
from fm_jax.data.arrays import Growing, digest, mapped, sync
from fm_jax.data.chats import BadRow
from fm_jax.data.examples import Maker
from fm_jax.errors import UserError, reason

VERSION = 3
# Of all segments one after the other; `offsets` has where each begins, and the end.
ARRAYS = {"tokens": "<i4", "targets": "<i4", "weights": "|u1", "offsets": "<i8",
          "origins": "<i8"}  # fmt: skip
AT_ONCE = 2048  # rows that are encoded together
NUM_PLACES = 3  # of rows left out that are told

Row = tuple[Piece, int, dict]


@dataclasses.dataclass(frozen=True, eq=False)
class ExampleStore:
    """Examples of one split, mapped into memory.

    Segment s has places offsets[s] to offsets[s + 1] of `tokens`, `targets` and
    `weights`; an example has `num_segments` of them, one after the other. `origins`
    [examples, 2] are (index into `pieces`, place in that).
    """

    path: Path
    header: dict
    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    offsets: np.ndarray
    origins: np.ndarray

    def __len__(self) -> int:
        return self.header["num_examples"]

    @property
    def num_segments(self) -> int:
        """Segments of an example."""
        return self.header["num_segments"]

    @property
    def num_bytes(self) -> int:
        """Bytes of text that is trained on."""
        return self.header["num_bytes"]

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels that targets are the indices of, where examples have any."""
        return tuple(self.header["labels"])

    @functools.cached_property
    def pieces(self) -> list[list[str]]:
        """The [name, suffix] of each file or dataset, in the order of reading."""
        return json.loads((self.path / "pieces.json").read_text(encoding="utf-8"))

    def where(self, example: int) -> str:
        """Return where an example stood: "chats.jsonl line 7"."""
        piece, place = (int(number) for number in self.origins[example])
        name, suffix = self.pieces[piece]
        return documents.where(name, place, f"x{suffix}")


def find_or_make(
    folder: Path,
    identity: dict,
    rows: Callable[[], Iterator[Row]],
    maker: Callable[[], Maker],
    *,
    kind: str,
    split: str,
    skips: bool,
    say: Callable[[str], None],
    may_build: bool = True,
) -> ExampleStore:
    """Return the store of `identity` under `folder`, made of `rows` if it is not there.

    identity: JSON of all that the examples follow from. maker: gives what makes them,
    of that kind. skips: leave rows out that are no examples. Raises UserError on these
    otherwise, where no example is left, and on a disk that is full.
    """
    told = json.dumps([VERSION, identity], sort_keys=True)
    digest = hashlib.blake2b(told.encode(), digest_size=10).hexdigest()
    path = folder / f"{kind}-{digest}"
    if not path.exists():
        caches.require(may_build, path)
        try:
            with caches.made_by_one(path):
                if not path.exists():
                    say(f"Making examples of {split} ({kind})")
                    _write(path, rows(), maker(), split=split, skips=skips)
        except OSError as error:
            raise UserError(
                f"data.cache_dir must be writable and have room; got {path} "
                f"({reason(error)}). Free space or set --config.data.cache_dir."
            ) from error
    found = _open(path)
    for line in lines(found.header, split):
        say(line)
    return found


def lines(header: dict, split: str) -> Iterator[str]:
    """Yield what a store holds and what was left out of it, for people."""
    per = header["num_tokens"] / header["num_examples"]
    yield (
        f"{split}: {header['num_examples']:,} examples of {per:,.1f} tokens, "
        f"{header['num_tokens']:,} in all, {header['num_trained']:,} trained on"
    )
    told = {
        "cut": "longer than data.max_length, cut",
        "dropped": "longer than data.max_length, left out",
        "skipped": "bad, left out",
    }
    for name, what in told.items():
        if count := header[name]:
            places = ", ".join(header["places"][name])
            yield f"WARNING: {split}: {count:,} examples {what}: {places}"


def _write(
    path: Path, rows: Iterator[Row], maker: Maker, *, split: str, skips: bool
) -> None:
    """Write a store that is never seen half-written."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as made:
        building = Path(made) / "store"
        building.mkdir()
        writing = _Writing(building, maker)
        try:
            while some := list(itertools.islice(rows, AT_ONCE)):
                writing.add(some, skips=skips)
            if not writing.counts["num_examples"]:
                left = writing.counts["dropped"] + writing.counts["skipped"]
                raise UserError(
                    f"the data must have an example in its {split} split; got none"
                    f"{f', and {left:,} that were left out' if left else ''}. See "
                    "data.paths, data.eval_fraction, data.max_length and data.on_long."
                )
            writing.finish(path.name)
        finally:
            for file in writing.files.values():
                file.stream.close()
        try:
            building.rename(path)
        except OSError:
            if not path.exists():  # else another process was first
                raise
        sync(path.parent)


class _Writing:
    """The files of a store in the making."""

    def __init__(self, folder: Path, maker: Maker):
        self.folder, self.maker = folder, maker
        self.files = {name: Growing(folder / f"{name}.npy", kind)
                      for name, kind in ARRAYS.items()}  # fmt: skip
        self.files["offsets"].append(np.zeros(1))
        names = ("num_examples", "num_chats", "num_tokens", "num_trained", "num_bytes",
                 "cut", "dropped", "skipped")  # fmt: skip
        self.counts = dict.fromkeys(names, 0)
        self.places: dict[str, list[str]] = {"cut": [], "dropped": [], "skipped": []}
        self.ends: set[int] = set()
        self.pieces: dict[tuple[str, str], int] = {}
        special = np.zeros(maker.tokenizer.vocab_size, bool)
        special[list(maker.tokenizer.special_ids)] = True
        self._is_special_V = special

    def add(self, rows: list[Row], *, skips: bool) -> None:
        """Write what becomes of rows."""
        told = [(row, piece.where(place)) for piece, place, row in rows]
        made = self.maker.make(told)
        segments, origins = [], []
        for (piece, place, _), (_, where), one in zip(rows, told, made, strict=True):
            if isinstance(one, BadRow):
                if not skips:
                    raise one
                self._tell("skipped", where)
            elif not one.segments:
                self._tell("dropped", where)
            else:
                if one.is_cut:
                    self._tell("cut", where)
                segments += one.segments
                self.counts["num_chats"] += one.is_chat
                origins.append((self._piece(piece), place))
        if not segments:
            return
        arrays = {
            name: np.concatenate([getattr(segment, name) for segment in segments])
            for name in ("tokens", "targets", "weights")
        }
        for name, array in arrays.items():
            self.files[name].append(array)
        stops = np.cumsum([len(segment) for segment in segments])
        self.files["offsets"].append(self.counts["num_tokens"] + stops)
        self.files["origins"].append(np.array(origins).reshape(-1))
        self.counts["num_examples"] += len(origins)
        self.counts["num_tokens"] += int(stops[-1])
        self._count(arrays["targets"], arrays["weights"] > 0, stops)

    def finish(self, name: str) -> None:
        """Write what is told of all, and have it on the disk."""
        for file in self.files.values():
            file.finish()
        names = json.dumps([*map(list, self.pieces)])
        caches.write_whole(self.folder / "pieces.json", names)
        header = self.counts | {
            "version": VERSION,
            "name": name,
            "kind": self.maker.kind,
            "num_segments": 2 if self.maker.kind == "preference" else 1,
            "labels": list(self.maker.labels),
            "tokenizer": self.maker.tokenizer.fingerprint,
            "end_ids": sorted(self.ends),
            "places": self.places,
            "digests": {name: file.digest for name, file in self.files.items()},
            "has_leftover": False,
            "gzip_of": 0,
            "gzip_bytes": 0,
        }
        caches.write_whole(self.folder / "header.json", json.dumps(header, indent=1))

    def _count(self, targets, is_trained, stops) -> None:
        self.counts["num_trained"] += int(is_trained.sum())
        if self.maker.kind == "classify":  # a label is no text
            return
        bytes_V = self.maker.tokenizer.byte_lengths
        self.counts["num_bytes"] += int(bytes_V[targets[is_trained]].sum())
        # Special tokens that end what is trained on.
        goes_on = np.append(is_trained[1:], False)
        goes_on[stops - 1] = False
        last = np.unique(targets[is_trained & ~goes_on])
        self.ends |= {*last[self._is_special_V[last]].tolist()}

    def _tell(self, what: str, where: str) -> None:
        self.counts[what] += 1
        if len(self.places[what]) < NUM_PLACES:
            self.places[what].append(where)

    def _piece(self, piece: Piece) -> int:
        named = (piece.name, paths.suffix_of(piece.path))
        return self.pieces.setdefault(named, len(self.pieces))


def _open(path: Path) -> ExampleStore:
    try:
        header = json.loads((path / "header.json").read_text(encoding="utf-8"))
        arrays = {name: mapped(path / f"{name}.npy") for name in ARRAYS}
    except (OSError, ValueError) as error:
        raise _not_whole(path, reason(error)) from error
    # Slices of np.memmap itself take thrice the time of an array's over the map.
    found = {name: np.asarray(array) for name, array in arrays.items()}
    if sum(array.nbytes for array in found.values()) <= store.READ_AT_START:
        for name, array in found.items():
            if digest(array).hexdigest() != header["digests"][name]:
                got = f"{name}.npy is not as it was written: its blake2b is another"
                raise _not_whole(path, got)
    found["origins"] = found["origins"].reshape(-1, 2)
    num_segments = header["num_examples"] * header["num_segments"]
    sizes = {name: found[name].size for name in ("tokens", "targets", "weights")}
    if {*sizes.values()} != {header["num_tokens"]}:
        raise _not_whole(path, f"{sizes} for {header['num_tokens']} tokens")
    if found["offsets"].size != num_segments + 1:
        got = f"{found['offsets'].size} offsets of {num_segments} segments"
        raise _not_whole(path, got)
    return ExampleStore(path, header, **found)


def _not_whole(path: Path, got: str) -> UserError:
    return UserError(
        f"stored examples must be whole; got {path} ({got}). Delete it and start "
        "again: they will be made again."
    )
