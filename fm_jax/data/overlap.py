"""How much of one store's text stands in another's: n-grams of ids that both have."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from fm_jax.data.store import TokenStore
from fm_jax.data.visible import visible
from fm_jax.errors import UserError

MOST = 64
NUM_WORST = 10
CHUNK = 1 << 14  # ids at a time: what is made of them stays in the processor's cache
ODD = np.uint64(0x9E3779B97F4A7C15)
HALF = np.uint64(32)
NONE = np.empty(0, np.uint64)


@dataclasses.dataclass(frozen=True)
class Shared:
    """A document of which much stands elsewhere: its share of shared n-grams."""

    origin: str
    share: float
    num_grams: int
    seen_in: str  # the document with most of them; the earliest, where each stands


@dataclasses.dataclass(frozen=True)
class Overlap:
    """What of the n-grams of `of` stands in `within`; a gram is n ids of one document.

    `num_grams` counts places, of which `share` is shared; `num_distinct` counts grams.
    """

    n: int
    of: str
    within: str
    num_grams: int
    num_shared: int
    share: float
    num_distinct: int
    num_distinct_shared: int
    num_documents: int
    num_too_short: int  # documents of fewer than n ids, which have no gram
    num_with_any: int
    worst: tuple[Shared, ...]


def overlap(a: TokenStore, b: TokenStore, *, n: int = 13) -> Overlap:
    """Return how many of the n-grams of `b`, the held-out text, stand in `a`.

    Grams are told apart by 64 bits of a hash: of a billion grams against a billion, one
    in twenty runs sees one too many. `a` is streamed; memory is some 60 bytes for each
    id of `b`. Raises UserError on stores of two tokenizers, or an n out of range.
    """
    if not 1 <= n <= MOST:
        raise UserError(f"n must be from 1 to {MOST} ids; got {n}.")
    if a.header["tokenizer"] != b.header["tokenizer"]:
        raise UserError(
            "stores must share a tokenizer to share n-grams of ids; got "
            f"{a.path} made with {a.header['tokenizer']}, {b.path} with "
            f"{b.header['tokenizer']}. Build them with one tokenizer."
        )
    words = _distinct(b, n)
    place_in_a, num_distinct = _first_places(a, _Set(words), n), len(words)
    words, place_in_a = words[place_in_a >= 0], place_in_a[place_in_a >= 0]
    shared = _Set(words)
    edges = np.append(b.offsets, len(b) - 1)
    grams_D = np.maximum(0, np.diff(edges) - n)  # one id of each is the end before it
    shared_D = np.zeros(len(grams_D), np.int64)
    for start, some, is_gram in _grams(b, n, 0, len(b)):
        documents = b.documents_of(start + shared.find(some, is_gram)[0])
        which, times = np.unique(documents, return_counts=True)
        shared_D[which] += times
    num_grams, num_shared = int(grams_D.sum()), int(shared_D.sum())
    return Overlap(
        n=n,
        of=str(b.path),
        within=str(a.path),
        num_grams=num_grams,
        num_shared=num_shared,
        share=num_shared / num_grams if num_grams else 0.0,
        num_distinct=num_distinct,
        num_distinct_shared=len(words),
        num_documents=len(grams_D),
        num_too_short=int((grams_D == 0).sum()),
        num_with_any=int((shared_D > 0).sum()),
        worst=tuple(_worst(a, b, n, grams_D, shared_D, shared, place_in_a)),
    )


def lines(found: Overlap) -> list[str]:
    """Return an overlap in words, aligned."""
    n, documents = found.n, found.num_documents - found.num_too_short
    text = [
        f"of         {found.of}",
        f"within     {found.within}",
        f"{n}-grams".ljust(11)
        + f"{found.num_shared:,} of {found.num_grams:,} shared ({found.share:.2%}); "
        f"distinct: {found.num_distinct_shared:,} of {found.num_distinct:,}",
        f"documents  {found.num_with_any:,} of {documents:,} have a shared one",
    ]
    if found.num_too_short:
        text.append(
            f"too short  {found.num_too_short:,} documents, of fewer than {n} ids"
        )
    if found.worst:
        text.append("worst      share  its grams  document < where most of them stand")
    text += [
        f"           {w.share:>5.0%}  {w.num_grams:>9,}  "
        + visible(f"{w.origin} < {w.seen_in}")
        for w in found.worst
    ]
    return text


class _Set:
    """Distinct words in order, found by their first bits; few others get that far."""

    def __init__(self, words: np.ndarray):
        self.words = words
        # A bucket for each word or for half a one, and 16 bits of the filter for each.
        bits = max(8, len(words).bit_length())
        self._bucket, self._bit = np.uint64(64 - bits), np.uint64(64 - bits - 4)
        buckets = (words >> self._bucket).view(np.int64)
        sizes = np.bincount(buckets, minlength=1 << bits)
        self._longest = int(sizes.max())
        self._starts = np.cumsum(sizes) - sizes
        self._filter = np.zeros(1 << (bits + 1), np.uint8)
        np.bitwise_or.at(self._filter, *self._byte_and_bit(words))

    def find(
        self, words: np.ndarray, is_asked: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return where the words asked for that are in the set stand, and which."""
        byte, bit = self._byte_and_bit(words)
        is_likely = (self._filter.take(byte) & bit) != 0
        places = np.flatnonzero(is_likely & is_asked)
        words = words[places]
        index = self._starts[(words >> self._bucket).view(np.int64)]
        for _ in range(self._longest):
            index += self.words.take(index, mode="clip") < words
        is_in = self.words.take(index, mode="clip") == words
        return places[is_in], index[is_in]

    def _byte_and_bit(self, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the byte of the filter, and the bit in it, that each word sets."""
        bits = words >> self._bit
        byte = (bits >> np.uint64(3)).view(np.int64)
        return byte, np.uint8(1) << (bits.astype(np.uint8) & np.uint8(7))


def _grams(
    store: TokenStore, n: int, begin: int, end: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield a place, the words of the n ids from each on, and which lie in a document.

    uint64 [m] and bool [m]; all of the n ids of a word lie within `begin` to `end`.
    """
    back_n = np.arange(n)
    for start in range(begin, end - n + 1, CHUNK):
        ids = store.read(start, min(start + CHUNK + n - 1, end))
        ends = np.flatnonzero(ids == store.header["end_id"])
        is_cut = np.zeros(len(ids) + n, bool)  # at a gram's last id
        is_cut[ends[:, None] + back_n] = True
        yield start, _words(ids, n), ~is_cut[n - 1 : len(ids)]


def _distinct(store: TokenStore, n: int) -> np.ndarray:
    grams = _grams(store, n, 0, len(store))
    words = np.concatenate([NONE, *(words[is_gram] for _, words, is_gram in grams)])
    words.sort()  # np.unique, by hashing, takes twenty times the time
    is_first = np.ones(len(words), bool)
    is_first[1:] = words[1:] != words[:-1]
    return words[is_first]


def _words(ids: np.ndarray, n: int) -> np.ndarray:
    """Return a word for the n ids from each on, uint64 [len - n + 1].

    Words of 1, 2, 4, ... ids are made of two of half as many, and those of n ids of the
    powers of two that n is the sum of.
    """
    power, width, found, reach = _mixed(ids.astype(np.uint64), np.uint64(1)), 1, None, 0
    while True:
        if n & width:
            later = power[reach:]
            found = later if found is None else _mixed(found[: len(later)], later)
            reach += width
        if reach == n:
            return found[: len(ids) - n + 1]
        power = _mixed(power[:-width], power[width:])
        width *= 2


def _mixed(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return words of words: all bits of both decide, and not by a sum alone."""
    words = x * ODD
    words += y
    words ^= words >> HALF
    words *= ODD
    return words


def _first_places(a: TokenStore, sought: _Set, n: int) -> np.ndarray:
    """Return where in `a` each word sought stands first; -1 where in no place."""
    first = np.full(len(sought.words), -1, np.int64)
    for start, words, is_gram in _grams(a, n, 0, len(a)):
        places, index = sought.find(words, is_gram)
        is_new = first[index] < 0
        # Of equal indices the last is kept: the earliest place has to come last.
        first[index[is_new][::-1]] = start + places[is_new][::-1]
    return first


def _worst(
    a: TokenStore,
    b: TokenStore,
    n: int,
    grams_D: np.ndarray,
    shared_D: np.ndarray,
    shared: _Set,
    place_in_a: np.ndarray,
) -> Iterator[Shared]:
    some = np.flatnonzero(shared_D)
    share = shared_D[some] / grams_D[some]
    for k in some[np.lexsort((-grams_D[some], -share))][:NUM_WORST]:
        stop = b.offsets[k + 1] if k + 1 < len(b.offsets) else len(b) - 1
        grams = _grams(b, n, int(b.offsets[k]), int(stop))
        found = [shared.find(words, is_gram)[1] for _, words, is_gram in grams]
        documents = a.documents_of(place_in_a[np.concatenate(found)])
        which, times = np.unique(documents, return_counts=True)
        yield Shared(
            origin=b.origin(int(k)),
            share=float(shared_D[k] / grams_D[k]),
            num_grams=int(grams_D[k]),
            seen_in=a.origin(int(which[np.argmax(times)])),
        )
