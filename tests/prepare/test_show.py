"""Tests of a step's rows decoded: against the texts, and lines written by hand."""

import re
from unittest import mock

import numpy as np
import pytest

from fm_jax.data.batches import TrainBatches
from fm_jax.data.mixtures import Mixture
from fm_jax.data.windows import PACKINGS, Windows
from fm_jax.prepare import show
from fm_jax.tokenizers.plain import ByteTokenizer
from tests.data import made

BYTES = ByteTokenizer()
ONE = Mixture(((0, (1.0,)),))


def batches_of(*stores, length=4, packing="split", size=3, mixture=ONE, num_steps=50):
    windows = tuple(Windows(s, BYTES, length, True, packing) for s in stores)
    return TrainBatches(windows, mixture, size, 5, num_steps, np.arange(size))


def epoch_of(batches):
    """Return the lines of each window of one component, by its number."""
    found = {}
    for row in range(len(batches.windows[0])):
        step, place = divmod(row, batches.batch_size)
        head, *rest = show.lines(batches, BYTES, step, rows=[place])
        window = int(re.search(r"window ([\d,]+) of", head)[1].replace(",", ""))
        found[window] = [re.sub(r"^row \d+, epoch 0, ", "", head), *rest]
    return found


def said(lines, label):
    """Return the text behind a label, and behind the blank ones that follow it."""
    text, last = "", ""
    for line in lines:
        if found := re.match(r"    (trained|seen|       ) *([|:]) (.*)$", line):
            last = found[1].strip() or last
            if last == label:
                text += found[3] if found[2] == "|" else "\N{END OF TEXT}"
    return text.replace("␊", "\n")


def test_rows_cut_from_the_stream_are_shown_as_they_stand_in_it(tmp_path):
    found = epoch_of(
        batches_of(made.build(tmp_path, ["ab\n", "", "c\n\nde", "f"], BYTES))
    )
    assert [found[window] for window in range(4)] == [
        [
            "window 0 of 4: targets trained on 4, padding 0",
            "  made row 0: tokens 1 to 3 of 3 and its end",
            "    trained | ab␊",
            "            : end of document",
        ],
        [
            "window 1 of 4: targets trained on 4, padding 0",
            "  made row 1: no tokens, and its end",
            "    trained : end of document",
            "  made row 2: tokens 1 to 3 of 5; it goes on in another row",
            "    trained | c␊",
            "            | ␊",
        ],
        [
            "window 2 of 4: targets trained on 4, padding 0",
            "  made row 2: tokens 4 to 5 of 5 and its end; it began in another row",
            "    seen    | ␊",
            "    trained | de",
            "            : end of document",
            "  made row 3: tokens 1 to 1 of 1; its end is in another row",
            "    trained | f",
        ],
        [
            "window 3 of 4: targets trained on 1, padding 3",
            "  made row 3: its end alone, after token 1; it began in another row",
            "    seen    | f",
            "    trained : end of document",
        ],
    ]


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("length", [1, 3, 7, 64])
def test_an_epoch_trains_on_each_text_and_its_end_just_once(tmp_path, packing, length):
    texts = ["one\ntwo", "", "abcdefghijklm", "x", "\n", "last " * 20]
    batches = batches_of(
        made.build(tmp_path, texts, BYTES), length=length, packing=packing
    )
    found = epoch_of(batches)
    parts = {}
    for window, (head, *lines) in found.items():
        counts = re.search(r": targets trained on (\d+), padding (\d+)$", head)
        trained = 0
        for name, part in split_by_document(lines):
            first = re.search(r"tokens (\d+) to", part[0])
            place = 0 if "no tokens" in part[0] else int(first[1]) if first else 10**9
            text = said(part, "trained")
            parts.setdefault(name, []).append((place, text))
            trained += len(text)
            is_cut = "began in another row" in part[0]
            assert len(said(part, "seen")) == is_cut
        assert int(counts[1]) == trained, window
        assert int(counts[1]) + int(counts[2]) == length
    whole = [
        "".join(text for _, text in sorted(parts[f"made row {k}"])) for k in range(6)
    ]
    assert whole == [f"{text}\N{END OF TEXT}" for text in texts]


def split_by_document(lines):
    """Return (name, its lines) of each document of a row."""
    parts = []
    for line in lines:
        if not line.startswith("    "):
            parts.append((line.split(":")[0].strip(), []))
        parts[-1][1].append(line)
    return parts


def test_a_character_cut_by_a_row_is_shown_as_replaced(tmp_path):
    found = epoch_of(batches_of(made.build(tmp_path, ["abcéd"], BYTES), length=4))
    assert found[0][2:] == ["    trained | abc\N{REPLACEMENT CHARACTER}"]
    assert found[1][2:] == [
        "    seen    | \N{REPLACEMENT CHARACTER}",
        "    trained | \N{REPLACEMENT CHARACTER}d",
        "            : end of document",
    ]


def test_nothing_that_commands_a_terminal_is_printed(tmp_path):
    text = "\x1b[31m\x00\r\t\x07\x9b2J\u202e\x7f|"
    held = made.build(tmp_path, [text, "x"], BYTES, name="a\x1b]0;")
    batches = batches_of(held, length=99, packing="single", size=2)
    lines = list(show.lines(batches, BYTES, 0, rows=[0, 1]))
    assert all(line.isprintable() for line in lines)
    assert "    trained | ␛[31m␀␍␉␇<U+009B>2J<U+202E>␡|" in lines
    assert any(line.startswith("  a␛]0; row 0: ") for line in lines)


def test_targets_without_weight_are_shown_as_seen(tmp_path):
    batches = batches_of(
        made.build(tmp_path, ["abcdef"], BYTES), packing="single", length=9
    )
    read = Windows.rows

    def half(self, indices):
        batch = read(self, indices)
        batch["loss_weights"][:, 1:3] = 0
        return batch

    with mock.patch.object(Windows, "rows", half):
        head, _, *lines = show.lines(batches, BYTES, 0, rows=[0])
    assert head.endswith(": targets trained on 5, padding 2")
    assert lines == [
        "    trained | a",
        "    seen    | bc",
        "    trained | def",
        "            : end of document",
    ]


def test_rows_of_several_components_say_which_and_in_which_epoch(tmp_path):
    stores = [
        made.build(tmp_path, ["aaaaaa"], BYTES),
        made.build(tmp_path, ["bbb", "b"], BYTES),
    ]
    mixture = Mixture(((0, (0.25, 0.75)),))
    batches = batches_of(*stores, mixture=mixture, packing="single", size=8)
    components, windows = batches.indices(2)
    names = ["web", "co\x1bde"]
    for row in range(8):
        (head, *_), (plain, *_) = (
            list(show.lines(batches, BYTES, 2, rows=[row], names=told))
            for told in (names, ())
        )
        component, number = mixture.components(np.array([16 + row]))
        which, size = int(component[0]), len(batches.windows[component[0]])
        start = f"epoch {number[0] // size}, window {windows[row]} of {size}: "
        assert which == components[row]
        assert head.startswith(f"row {row}, {['web', 'co␛de'][which]}, {start}")
        assert plain.startswith(f"row {row}, component {which}, {start}")
    assert set(components) == {0, 1}


def test_rows_come_in_the_order_asked_for_whoever_reads_them(tmp_path):
    batches = batches_of(
        made.build(tmp_path, ["abcdefghijklmnop"], BYTES), length=2, size=4
    )
    every = [list(show.lines(batches, BYTES, 1, rows=[row])) for row in range(4)]
    asked = list(show.lines(batches, BYTES, 1, rows=[3, 0]))
    assert asked == every[3] + every[0]
    with pytest.raises(IndexError):
        list(show.lines(batches, BYTES, 50, rows=[0]))
