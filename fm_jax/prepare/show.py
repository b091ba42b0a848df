"""Just what a training step trains on, decoded: which text, from where, how much."""

import dataclasses
import itertools
import os
import sys
from collections.abc import Iterator, Sequence

import numpy as np

from fm_jax.data.batches import TrainBatches
from fm_jax.data.example_rows import ExampleRows
from fm_jax.data.visible import visible
from fm_jax.data.windows import Windows
from fm_jax.errors import UserError, unknown
from fm_jax.tokenizers import special
from fm_jax.tokenizers.jsonfile import JsonTokenizer
from fm_jax.tokenizers.protocol import Tokenizer

# What a terminal is told: green, faint, bold yellow; underlined where it is no text.
COLOURS = {"trained": "32", "seen": "2", "label": "1;33"}
NO_TEXT = ";4"
WHEN = ("auto", "always", "never")


@dataclasses.dataclass(frozen=True)
class Part:
    """Text of one kind: "trained" on, only "seen", or a "label" that is trained on.

    `is_text`: else it names an id that stands for none.
    """

    kind: str
    text: str
    is_text: bool = True


def lines(
    batches: TrainBatches,
    tokenizer: Tokenizer,
    step: int,
    *,
    rows: Sequence[int],
    names: Sequence[str] = (),
    labels: Sequence[str] = (),
    colour: bool = False,
) -> Iterator[str]:
    """Yield what `rows` of the batch of a step hold, decoded from the batch itself.

    Of each document: where it stood, which of its tokens the row trains on, and their
    text. What stands after `seen` is only read: the token before the first target of a
    document that began in another row, and targets without weight. A document that
    begins in the row is predicted from the end id before it, which is not shown.

    Of each example: where it stood, and all its tokens, those that stand for no text by
    their names; of a preference both sides, of a label its place.

    A line end is shown as its picture, as is all that would command a terminal; bytes
    of a character that is cut are shown as U+FFFD. names: of the components. labels:
    what targets are the indices of, where examples have labels. colour: tell what is
    trained on by colours, and not by words.
    """
    mine = dataclasses.replace(batches, rows=np.array(rows, np.int64))
    batch = mine[step]
    components, numbers = mine.mixture.components(step * mine.batch_size + mine.rows)
    found = zip(rows, components, numbers, mine.indices(step)[1], strict=True)
    write = _coloured if colour else _plain
    if colour:
        told = {"trained": "trained on", "seen": "only seen"}
        yield "  ".join(_painted(kind, text) for kind, text in told.items())
    for place, (row, component, number, index) in enumerate(found):
        windows = mine.windows[component]
        name = names[component] if names else f"component {component}"
        is_mixed = len(mine.windows) > 1
        arrays = {key: array[place] for key, array in batch.items()}
        trained = int((arrays["loss_weights"] > 0).sum())
        if is_examples := isinstance(windows, ExampleRows):
            used = int((arrays["segment_ids"] > 0).sum())
            shown = _examples(arrays, windows, tokenizer, int(index), labels)
        else:
            used = sum(count for _, count in windows.spans(int(index)))
            shown = _documents(arrays, windows, tokenizer, int(index))
        yield (
            f"row {row}, {f'{visible(name)}, ' if is_mixed else ''}"
            f"epoch {number // len(windows)}, "
            f"{'packed row' if is_examples else 'window'} "
            f"{index:,} of {len(windows):,}: "
            f"targets trained on {trained:,}, padding {windows.length - used:,}"
        )
        for head, parts in shown:
            yield f"  {head}"
            yield from write(parts)


def chosen(asked: str, size: int) -> range:
    """Return the rows of a batch that `3` or `0:2` stands for; "" for all.

    Raises UserError on other rows.
    """
    first, colon, last = asked.partition(":")
    try:
        start = int(first or 0)
        stop = int(last or size) if colon or not asked else start + 1
    except ValueError:
        start = stop = -1
    if not 0 <= start < stop <= size:
        raise UserError(
            f"--rows must be rows of a batch of {size}, as 3 or 0:2; got {asked!r}."
        )
    return range(start, stop)


def in_colour(asked: str) -> bool:
    """Return whether to print in colour: "auto" does on a terminal without NO_COLOR.

    Raises UserError on what is none of WHEN.
    """
    if asked not in WHEN:
        raise unknown("--colour", asked, WHEN)
    if asked != "auto":
        return asked == "always"
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def _documents(
    arrays: dict, windows: Windows, tokenizer: Tokenizer, index: int
) -> Iterator[tuple[str, list[Part]]]:
    """Yield a row's documents: what is said of each, and its text."""
    store, column = windows.store, 0
    names = {tokenizer.end_id: "end of document"}
    for first, count in windows.spans(index):
        start, stop = first, first + count
        while start < stop:
            document = int(store.documents_of(np.array([start]))[0])
            begin, end = (int(edge) for edge in _edges(store, document))
            last = min(stop, end)
            here = slice(column, column + last - start)
            told = _which(begin, end, start, last)
            ids = arrays["targets"][here]
            is_trained = arrays["loss_weights"][here] > 0
            if start > begin:
                ids = np.append(arrays["tokens"][here][:1], ids)
                is_trained = np.append(False, is_trained)
            parts = list(_parts(ids, is_trained, tokenizer, names))
            yield f"{visible(store.origin(document))}: {told}", parts
            column, start = here.stop, last


def _edges(store, document: int) -> tuple[int, int]:
    """Return where the end ids before and after a document stand in the stream."""
    is_last = document + 1 == len(store.offsets)
    after = len(store) - 1 if is_last else store.offsets[document + 1]
    return store.offsets[document], after


def _which(begin: int, end: int, start: int, stop: int) -> str:
    """Say which of a document's tokens are targets, where inputs are start to stop."""
    size, first, last = end - begin - 1, start - begin + 1, min(stop, end - 1) - begin
    if size == 0:
        told = "no tokens, and its end"
    elif first > size:
        told = f"its end alone, after token {size:,}"
    else:
        told = f"tokens {first:,} to {last:,} of {size:,}"
        told += " and its end" if stop == end else ""
    if start > begin:
        told += "; it began in another row"
    if stop < end:
        told += f"; {'it goes on' if last < size else 'its end is'} in another row"
    return told


def _examples(
    arrays: dict, rows: ExampleRows, tokenizer: Tokenizer, index: int, labels
) -> Iterator[tuple[str, list[Part]]]:
    """Yield a row's examples, of a preference each side: where it stood, and it."""
    names = _names(tokenizer)
    each = rows.store.num_segments
    sides = (", chosen", ", rejected") if each == 2 else ("",)
    for number, example in enumerate(rows.examples_of(index)):
        for side, called in enumerate(sides):
            segment = each * number + side + 1
            here = np.flatnonzero(arrays["segment_ids"] == segment)
            tokens, targets = arrays["tokens"][here], arrays["targets"][here]
            is_trained = arrays["loss_weights"][here] > 0
            if labels:
                parts = [*_parts(tokens, is_trained & False, tokenizer, names)]
                parts += [Part("label", labels[t]) for t in targets[is_trained]]
                told = f"{len(here):,} tokens seen, and a label"
            else:
                ids = np.append(tokens[:1], targets)
                is_trained = np.append(False, is_trained)
                parts = [*_parts(ids, is_trained, tokenizer, names)]
                told = (
                    f"{is_trained.sum():,} tokens trained on, "
                    f"{(~is_trained).sum():,} seen"
                )
            if "reference" in arrays:
                told += f", reference {arrays['reference'][here].sum():.2f} nats"
            yield f"{visible(rows.where(int(example)))}{called}: {told}", parts


def _names(tokenizer: Tokenizer) -> dict[int, str]:
    """Return the names of the ids that stand for no text."""
    if isinstance(tokenizer, JsonTokenizer):
        tokens = special.tokens(tokenizer)
        named = dict(zip(tokenizer.special_ids, tokens, strict=True))
    else:
        named = {index: token for token, index in special.spelt(tokenizer).items()}
    return named | {tokenizer.end_id: special.end_token(tokenizer)}


def _parts(
    ids: np.ndarray, is_trained: np.ndarray, tokenizer: Tokenizer, names: dict[int, str]
) -> Iterator[Part]:
    """Yield the parts of ids: runs of text, and ids that stand for none."""
    kinds = zip(ids.tolist(), is_trained.tolist(), strict=True)
    for (trained, name), run in itertools.groupby(
        kinds, key=lambda kind: (kind[1], names.get(kind[0]))
    ):
        kind, held = "trained" if trained else "seen", [i for i, _ in run]
        if name is not None:
            yield from (Part(kind, name, is_text=False) for _ in held)
        elif text := tokenizer.decode_bytes(held).decode("utf-8", "replace"):
            yield Part(kind, text)


def _plain(parts: Sequence[Part]) -> Iterator[str]:
    """Yield lines in which a word tells the kind where it changes."""
    last = ""
    for part in parts:
        label = "" if part.kind == last else part.kind
        for line in _split(part.text):
            yield f"    {label:7} {'|' if part.is_text else ':'} {line}"
            label, last = "", part.kind


def _coloured(parts: Sequence[Part]) -> Iterator[str]:
    """Yield lines in which colours tell the kind."""
    line = ""
    for part in parts:
        if part.kind == "label" and line:
            line += " "
        for text in _split(part.text):
            line += _painted(part.kind, text, is_text=part.is_text)
            if text.endswith("␊"):
                yield f"    {line}"
                line = ""
    if line:
        yield f"    {line}"


def _painted(kind: str, text: str, *, is_text: bool = True) -> str:
    return f"\x1b[{COLOURS[kind]}{'' if is_text else NO_TEXT}m{text}\x1b[0m"


def _split(text: str) -> Iterator[str]:
    """Yield the lines of a text, their ends as pictures."""
    *whole, rest = text.split("\n")
    yield from (visible(f"{line}\n") for line in whole)
    if rest:
        yield visible(rest)
