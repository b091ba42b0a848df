"""Documents whose text stands earlier: found by their hashes, in bounded memory."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np


def first_seen(
    parts: Sequence[np.ndarray], *, memory_rows: int = 1 << 24
) -> list[np.ndarray]:
    """Return, for each part, which of its rows stand in no row before, bool [n].

    parts: uint64 [n, 2], a hash of two words a row, in the order of the documents; they
    may be mapped files. The range of hashes is cut into pieces of about `memory_rows`
    rows, and all parts are read once for each piece: beside the masks, memory is some
    75 bytes for each of `memory_rows`, however many rows there are or repeat.
    """
    masks = [np.zeros(len(part), bool) for part in parts]
    num_pieces = max(1, -(-sum(map(len, parts)) // memory_rows))
    edges = [piece * 2**64 // num_pieces for piece in range(num_pieces + 1)]
    for low, high in itertools.pairwise(edges):
        seen = np.empty((0, 2), np.uint64)
        for found in _gathered(parts, low, high, memory_rows):
            seen = _mark(masks, seen, found)
    return masks


def _gathered(parts, low: int, high: int, memory_rows: int) -> Iterator[list]:
    """Yield lists of (part, rows, hashes) from `low` to below `high`, in order."""
    found, size = [], 0
    for number, part in enumerate(parts):
        for start in range(0, len(part), memory_rows):
            rows_N2 = np.asarray(part[start : start + memory_rows])
            words_N = rows_N2[:, 0]
            chosen = np.flatnonzero(
                (words_N >= np.uint64(low)) & (words_N <= np.uint64(high - 1))
            )
            found.append((number, start + chosen, rows_N2[chosen]))
            size += len(chosen)
            if size >= memory_rows:
                yield found
                found, size = [], 0
    yield found


def _mark(masks, seen_M2: np.ndarray, found: list) -> np.ndarray:
    """Mark the rows of `found` that are not in `seen` or before; return both, once."""
    rows_N2 = np.concatenate([seen_M2, *(hashes for _, _, hashes in found)])
    is_first_N = _firsts(rows_N2)
    start = len(seen_M2)
    for number, places, _ in found:
        masks[number][places] = is_first_N[start : start + len(places)]
        start += len(places)
    return rows_N2[is_first_N]


def _firsts(rows_N2: np.ndarray) -> np.ndarray:
    """Return which rows equal none before them, bool [N]."""
    # Sorting by one word takes a third of the time of two; it is enough unless rows
    # agree in that word alone.
    for by_both in (False, True):
        words_N = rows_N2[:, 0]
        order_N = (
            np.lexsort((rows_N2[:, 1], words_N))
            if by_both
            else np.argsort(words_N, kind="stable")
        )
        sorted_N2 = rows_N2[order_N]
        agree = sorted_N2[1:] == sorted_N2[:-1]
        if by_both or not np.any(agree[:, 0] & ~agree[:, 1]):
            break
    is_first_N = np.ones(len(rows_N2), bool)
    is_first_N[order_N[1:]] = ~agree.all(1)
    return is_first_N
