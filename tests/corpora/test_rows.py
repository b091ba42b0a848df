"""Tests of rows that stand in files: where they are cut, found, and lost."""

import itertools
import json
from pathlib import Path

import pytest

from fm_jax.corpora import documents, rows, streams
from fm_jax.corpora.documents import Reading
from fm_jax.corpora.rows import Part, Rows
from tests.corpora.made import POLICY, refusal

COUNTS = (5, 1, 11)  # rows of each file


@pytest.fixture
def parts(tmp_path):
    """Return the parts of three files, a row a line: "0.0", "0.1", ..."""
    found = []
    for number, count in enumerate(COUNTS):
        path = tmp_path / f"{number}.rows"
        lines = [f"{number}.{row}" for row in range(count)]
        path.write_text("\n".join(lines))
        found.append(Part(str(path), 0, count, 100 * count))
    return found


def values(raw, path, start, stop, together):
    lines = raw.read().decode().split("\n")
    for line in lines[start:stop]:
        yield streams.Damaged("a hole\nand more") if line == "hole" else line
        if line == "end":
            raise streams.Damaged("no more")


def of(parts, cache=None):
    return Rows.of("talk", parts, cache)


def read(table, pieces=None, told=values, **policy):
    """Return what is read of pieces by their places, and what was met."""
    reader = rows.reader(json.loads(json.dumps(table.to_json())), told)
    reading = Reading(**POLICY | policy)
    found = [
        (piece.where(place), text)
        for piece in (pieces or table.pieces())
        for place, text in reader(piece, reading)
    ]
    return found, reading.to_json()


EVERY = [f"{file}.{row}" for file, count in enumerate(COUNTS) for row in range(count)]


@pytest.mark.parametrize("size", [1, 250, 1 << 26])
def test_pieces_are_the_rows_in_order_none_in_two_files(parts, size, monkeypatch):
    monkeypatch.setattr(documents, "PIECE_BYTES", size)
    table = of(parts)
    pieces = table.pieces()
    ends = [pieces[0].start, *(piece.stop for piece in pieces)]
    assert ends == sorted({*ends}) and ends[0] == 0 and ends[-1] == 17
    assert all(a.stop == b.start for a, b in itertools.pairwise(pieces))
    assert {5, 6} <= {*ends}
    assert len(pieces) == {1: 17, 250: 2 + 1 + 5, 1 << 26: 3}[size]
    assert read(table)[0] == [(f"talk row {n}", text) for n, text in enumerate(EVERY)]
    each = [[text for _, text in read(table, [piece])[0]] for piece in pieces]
    assert [*itertools.chain(*each)] == EVERY


def test_a_slice_is_cut_off_at_the_ends_of_its_file():
    part = Part("a", 10, 4, 100)
    assert part.sliced(1, 3) == Part("a", 11, 2, 50)
    assert part.sliced(-7, 2) == Part("a", 10, 2, 50)
    assert part.sliced(3, 99).rows == 1
    assert part.sliced(4, 9).rows == part.sliced(-9, 0).rows == 0


def test_rows_of_slices_are_numbered_from_0(parts):
    table = of([parts[2].sliced(3, 5), parts[1].sliced(1, 1), parts[0].sliced(4, 9)])
    texts = ["2.3", "2.4", "0.4"]
    assert read(table)[0] == [(f"talk row {n}", text) for n, text in enumerate(texts)]
    assert [told[:3] for told in table.identity()] == [
        ["2.rows", 3, 2],
        ["0.rows", 4, 1],
    ]


def test_identity_is_the_content_wherever_it_lies(parts, tmp_path):
    before = of(parts).identity()
    (tmp_path / "moved").mkdir()
    moved = []
    for part in parts:
        there = tmp_path / "moved" / part.path.rpartition("/")[2]
        there.write_text(Path(part.path).read_text())
        moved.append(Part(str(there), *(part.skip, part.rows, part.size)))
    assert of(moved).identity() == before
    there.write_text(there.read_text().replace("2.7", "2.X"))
    changed = of(moved).identity()
    assert changed[:2] == before[:2]
    assert changed[2][:3] == before[2][:3] and changed[2][3] != before[2][3]


# What is lost, and refused.


def holed(parts, which, text):
    """Write another row in the last file, and return its rows."""
    path = Path(parts[2].path)
    lines = path.read_text().split("\n")
    lines[which] = text
    path.write_text("\n".join(lines))
    return of(parts[2:])


def test_a_damaged_row_alone_is_lost(parts):
    found, met = read(holed(parts, 4, "hole"), on_bad_text="skip")
    assert [text for _, text in found] == [f"2.{n}" for n in range(11) if n != 4]
    assert met["skipped"] == {"cut short": 1}
    assert met["examples"] == {"cut short": ["talk row 4"]}


def test_a_file_without_an_end_loses_the_rest_of_its_piece(parts):
    found, met = read(holed(parts, 4, "end"), on_bad_text="skip")
    assert [text for _, text in found] == [*(f"2.{n}" for n in range(4)), "end"]
    assert met["skipped"] == {"cut short": 6}


def test_damage_is_refused_with_row_and_file(parts):
    assert refusal(read, holed(parts, 4, "hole")) == (
        f"data file must be whole; got talk row 4 ({parts[2].path}: a hole). Restore "
        "it, take it out of data.paths, or set --config.data.on_bad_text=skip to leave "
        "out what is damaged."
    )


def test_a_file_that_changes_after_its_digest_is_refused(parts):
    table = of(parts)
    Path(parts[1].path).write_text("other")
    for policy in ("error", "skip", "replace"):
        text = refusal(read, table, on_bad_text=policy)
        assert text.startswith(
            f"data file must not change until it is read; got {parts[1].path} ("
        )


def test_a_file_that_changes_while_it_is_read_is_refused(parts):
    def slow(raw, path, *where):
        for value in values(raw, path, *where):
            Path(parts[2].path).write_text("other")
            yield value

    text = refusal(read, of(parts[2:]), told=slow, on_bad_text="skip")
    assert text.startswith("data file must not change until it is read; got ")


def test_a_file_that_goes_after_its_digest_is_refused(parts, tmp_path):
    table = of(parts)
    (tmp_path / "0.rows").unlink()
    assert refusal(read, table, on_bad_text="skip") == (
        "data file must not change until it is read; got "
        f"{parts[0].path} (No such file or directory). Start again when nothing writes "
        "to it."
    )


def test_the_rows_of_a_file_that_never_could_be_read_are_skipped(parts, tmp_path):
    (tmp_path / "0.rows").unlink()
    found, met = read(of(parts), on_bad_text="skip")
    assert [text for _, text in found] == EVERY[5:]
    assert met["skipped"] == {"unreadable": 5}
    assert refusal(read, of(parts)) == (
        f"data file must be readable; got talk row 0 ({parts[0].path}: No such file or "
        "directory). Restore it, take it out of data.paths, or set "
        "--config.data.on_bad_text=skip."
    )


def test_a_disk_that_fails_is_refused(parts):
    def failing(*_):
        yield "a"
        raise OSError(5, "Input/output error")

    assert refusal(read, of(parts), told=failing, on_bad_text="skip") == (
        f"data file must be readable to its end; got {parts[0].path} (Input/output "
        "error). Restore it."
    )
