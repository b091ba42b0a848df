"""Just what a training step trains on, decoded: which text, from where, how much."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from fm_jax.data.batches import TrainBatches
from fm_jax.data.visible import visible
from fm_jax.data.windows import Windows
from fm_jax.tokenizers.protocol import Tokenizer


def lines(
    batches: TrainBatches,
    tokenizer: Tokenizer,
    step: int,
    *,
    rows: Sequence[int],
    names: Sequence[str] = (),
) -> Iterator[str]:
    """Yield what `rows` of the batch of a step hold, decoded from the batch itself.

    Of each document: where it stood, which of its tokens the row trains on, and their
    text. What stands after `seen` is only read: the token before the first target of a
    document that began in another row, and targets without weight. A document that
    begins in the row is predicted from the end id before it, which is not shown.

    A line end is shown as its picture, as is all that would command a terminal; bytes
    of a character that is cut are shown as U+FFFD. names: of the components.
    """
    mine = dataclasses.replace(batches, rows=np.array(rows, np.int64))
    batch = mine[step]
    components, numbers = mine.mixture.components(step * mine.batch_size + mine.rows)
    found = zip(rows, components, numbers, mine.indices(step)[1], strict=True)
    for place, (row, component, number, index) in enumerate(found):
        windows = mine.windows[component]
        name = names[component] if names else f"component {component}"
        is_mixed = len(mine.windows) > 1
        arrays = {key: array[place] for key, array in batch.items()}
        trained = int((arrays["loss_weights"] > 0).sum())
        padding = windows.length - sum(count for _, count in windows.spans(int(index)))
        yield (
            f"row {row}, {f'{visible(name)}, ' if is_mixed else ''}"
            f"epoch {number // len(windows)}, window {index:,} of {len(windows):,}: "
            f"targets trained on {trained:,}, padding {padding:,}"
        )
        yield from _row(arrays, windows, tokenizer, int(index))


def _row(
    arrays: dict, windows: Windows, tokenizer: Tokenizer, index: int
) -> Iterator[str]:
    """Yield the lines of a row's documents."""
    store, column = windows.store, 0
    for first, count in windows.spans(index):
        start, stop = first, first + count
        while start < stop:
            document = int(store.documents_of(np.array([start]))[0])
            begin, end = (int(edge) for edge in _edges(store, document))
            last = min(stop, end)
            here = slice(column, column + last - start)
            told = _which(begin, end, start, last)
            yield f"  {visible(store.origin(document))}: {told}"
            ids = arrays["targets"][here]
            is_trained = arrays["loss_weights"][here] > 0
            if start > begin:
                ids = np.append(arrays["tokens"][here][:1], ids)
                is_trained = np.append(False, is_trained)
            yield from _text(ids, is_trained, tokenizer)
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


def _text(
    ids: np.ndarray, is_trained: np.ndarray, tokenizer: Tokenizer
) -> Iterator[str]:
    """Yield the text of ids, in runs of what is trained on and what is only seen."""
    kinds = zip(ids.tolist(), is_trained.tolist(), strict=True)
    for trained, run in itertools.groupby(kinds, key=lambda kind: kind[1]):
        label = "trained" if trained else "seen"
        held = [i for i, _ in run]
        ends = held.pop() if held[-1] == tokenizer.end_id else None
        text = tokenizer.decode_bytes(held).decode("utf-8", "replace")
        for line in _split(text):
            yield f"    {label:7} | {line}"
            label = ""
        if ends is not None:
            yield f"    {label:7} : end of document"


def _split(text: str) -> Iterator[str]:
    """Yield the lines of a text, their ends as pictures."""
    *whole, rest = text.split("\n")
    yield from (visible(f"{line}\n") for line in whole)
    if rest:
        yield visible(rest)
