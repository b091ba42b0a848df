"""Tests of lanes: how pieces are grouped, and what is read of them from any place."""

import functools

import numpy as np
import pytest

from fm_jax.corpora import documents
from fm_jax.corpora.documents import Piece, Reading
from fm_jax.data import lanes
from fm_jax.data.lanes import Hashes, Lane, Place, Sieve, Sizes
from tests.data.made import refusal

TINY = Sizes(lane_bytes=100, small_lane_bytes=10, num_lanes=4)


def pieces(*sizes):
    return [Piece(f"{n}.txt", f"/{n}.txt", size=size) for n, size in enumerate(sizes)]


def sizes_of(planned):
    return [[piece.size for piece in lane.pieces] for lane in planned]


# Grouping.


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([], []),
        ([0], [[0]]),
        ([3, 4, 3, 1], [[3, 4, 3], [1]]),  # small lanes of a small corpus
        ([11, 1, 9, 0, 1], [[11], [1, 9, 0], [1]]),  # one may be larger
        ([30] * 8, [[30, 30]] * 4),  # a quarter each
        ([70] * 8, [[70]] * 8),  # at most 100
        ([300, 50, 50, 1], [[300], [50, 50], [1]]),
    ],
)
def test_pieces_are_grouped_in_order_up_to_a_size(sizes, expected):
    planned = lanes.plan(pieces(*sizes), TINY)
    assert sizes_of(planned) == expected
    assert [lane.number for lane in planned] == list(range(len(expected)))
    assert [lane.size for lane in planned] == [sum(lane) for lane in expected]


def test_a_file_has_one_number_however_many_pieces_it_has():
    parts = [
        Piece("a", "/a", stop=50, size=50),
        Piece("a", "/a", start=50, size=60),
        Piece("b", "/b", size=10),
        Piece("a", "/other/a", size=10),
    ]
    planned = lanes.plan(parts, TINY)
    assert [lane.files for lane in planned] == [(0,), (0,), (1, 2)]
    assert lanes.files(planned) == [("a", "/a"), ("b", "/b"), ("a", "/other/a")]


# Which documents.


def hashes_of(texts):
    raw = b"".join(documents.text_hash(text) for text in texts)
    return np.frombuffer(raw, "<u8").reshape(-1, 2)


@pytest.mark.parametrize("share", [(0.0, 0.25), (0.25, 1.0), (0.0, 1.0), (0.5, 0.5)])
def test_the_sieve_keeps_the_documents_whose_fraction_is_in_the_share(share):
    texts = [f"text {n}" for n in range(300)]
    is_kept, held_out = Sieve(share)(hashes_of(texts))
    fractions = [documents.fraction(documents.text_hash(text)) for text in texts]
    assert is_kept.tolist() == [share[0] <= f < share[1] for f in fractions]
    assert held_out == 0


def test_the_largest_hash_is_in_the_last_share():
    largest = np.full((1, 2), 2**64 - 1, np.uint64)
    assert Sieve((0.25, 1.0))(largest)[0].tolist() == [True]
    assert Sieve((0.0, 0.25))(largest)[0].tolist() == [False]


def test_hashes_are_in_a_set_by_both_words():
    words = np.array([[5, 1], [5, 2], [7, 1], [0, 0], [5, 9]], np.uint64)
    asked = np.array([[5, 9], [5, 3], [7, 1], [1, 5], [0, 0], [8, 1]], np.uint64)
    found = Hashes(words).have(asked)
    assert found.tolist() == [True, False, True, False, True, False]
    assert not Hashes(np.empty((0, 2), np.uint64)).have(asked).any()


def test_documents_that_another_store_has_are_counted_within_the_share():
    texts = [f"text {n}" for n in range(300)]
    share = (0.25, 1.0)
    sieve = Sieve(share, Hashes(hashes_of(texts[:100])))
    is_kept, held_out = sieve(hashes_of(texts))
    expected = Sieve(share)(hashes_of(texts))[0]
    assert held_out == expected[:100].sum() > 50
    assert not is_kept[:100].any()
    assert (is_kept[100:] == expected[100:]).all()


# Reading.


TEXTS = {
    "a": ["one", "bad", "", "two two two", "three"],
    "b": [],
    "c": ["bad"],
    "d": [f"number {n}" * (n % 4) for n in range(20)] + ["bad", "é", "bad"],
}


def read(piece, reading):
    """Read TEXTS by name; "bad" is skipped, and no text empty."""
    for number, text in enumerate(TEXTS[piece.name]):
        if text == "bad":
            reading.bad("missing text", piece, number, "bad")
        elif text:
            yield number, text
        else:
            reading.empty += 1


LANE = Lane(3, tuple(Piece(name, size=30) for name in TEXTS), (4, 5, 6, 7))
ALL = [
    (text, (file, number))
    for file, texts in zip(LANE.files, TEXTS.values(), strict=True)
    for number, text in enumerate(texts)
    if text not in ("", "bad")
]


def batches(place=None, *, sieve=None, batch_bytes=12, report=lambda *_: None, by=read):
    skip = {"on_bad_text": "skip", "max_document_bytes": 99}
    return lanes.batches(
        LANE,
        place or Place(),
        read=by,
        open_reading=functools.partial(Reading, **skip),
        sieve=sieve or Sieve(),
        batch_bytes=batch_bytes,
        report=report,
    )


def told(batch):
    return [
        (text, tuple(origin))
        for text, origin in zip(batch.texts, batch.origins.tolist(), strict=True)
    ]


def test_a_lanes_batches_are_all_of_its_documents_in_order():
    found = list(batches())
    assert [pair for batch in found for pair in told(batch)] == ALL
    assert len(found) > 9
    for batch in found[:-1]:
        assert 12 <= sum(map(len, batch.texts)) < 12 + 30
    for batch in found:
        assert batch.raws == [text.encode() for text in batch.texts]
        assert (batch.hashes == hashes_of(batch.texts)).all()
    assert found[-1].after.piece == len(LANE.pieces)


def test_reading_from_any_place_gives_the_batches_that_come_after_it():
    whole = list(batches())
    for number, batch in enumerate(whole[:-1]):
        rest = list(batches(batch.after))
        assert [told(b) for b in rest] == [told(b) for b in whole[number + 1 :]]
        assert [b.after for b in rest] == [b.after for b in whole[number + 1 :]]
    assert whole[-1].after.met == {
        "skipped": {"missing text": 4},
        "replaced": {},
        "empty": 6,
        "examples": {"missing text": ["a row 1", "c row 0", "d row 20"]},
    }


def test_what_the_sieve_leaves_out_moves_no_batch():
    sieve = Sieve((0.5, 1.0), Hashes(hashes_of(["three", "é", "number 1"])))
    whole, sieved = list(batches()), list(batches(sieve=sieve))
    assert len(whole) == len(sieved)
    num_sieved = num_held_out = 0
    for one, two in zip(whole, sieved, strict=True):
        is_kept, held_out = sieve(one.hashes)
        kept = [pair for pair, keep in zip(told(one), is_kept, strict=True) if keep]
        assert told(two) == kept
        assert two.raws == [text.encode() for text, _ in kept]
        assert (two.hashes == hashes_of(two.texts)).all()
        num_sieved, num_held_out = num_sieved + len(kept), num_held_out + held_out
        assert two.num_held_out == held_out
        assert two.after.num_sieved == num_sieved
    assert 3 < num_sieved < len(ALL) - 3
    assert num_held_out >= 1


def test_reports_add_up_to_what_was_read():
    reports = []
    whole = list(batches(report=lambda *told: reports.append(told)))
    texts = [text for text, _ in ALL]
    assert sum(documents for _, documents, _, _ in reports) == len(texts)
    assert sum(size for _, _, size, _ in reports) == len("".join(texts).encode())
    assert sum(done for _, _, _, done in reports) == LANE.size
    assert all(done >= 0 for _, _, _, done in reports)
    assert list(dict.fromkeys(piece.name for piece, *_ in reports)) == list(TEXTS)
    before = len(reports)
    place = next(batch.after for batch in whole if batch.after.piece == 3)
    list(batches(place, report=lambda *told: reports.append(told)))
    assert sum(done for _, _, _, done in reports[before:]) == 30


def test_a_reader_that_fails_is_no_fault_of_the_stores_disk():
    def fail(piece, reading):
        yield 0, "text"
        raise PermissionError(13, "Permission denied")

    assert refusal(list, batches(by=fail)) == (
        "data file must be readable; got a (Permission denied). Restore it or take it "
        "out of data.paths."
    )


def test_a_piece_that_has_become_shorter_than_it_was_is_refused(monkeypatch):
    place = Place(piece=3, document=15)
    assert list(batches(place))
    monkeypatch.setitem(TEXTS, "d", TEXTS["d"][:9])
    assert refusal(lambda: list(batches(place))) == (
        "data must not change while it is read; got other documents in a to d than at "
        "first. Start again when nothing writes it."
    )
