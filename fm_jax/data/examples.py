"""Sequences to fine-tune on: ids of a row's text, their targets, and their weights."""

import dataclasses
from collections.abc import Iterable, Sequence
from functools import cached_property

import numpy as np

from fm_jax.data.chats import BadRow
from fm_jax.data.sides import Read, Reader, Side
from fm_jax.errors import UserError
from fm_jax.tokenizers import special
from fm_jax.tokenizers.protocol import Tokenizer

Ids = tuple[np.ndarray, np.ndarray]  # ids and which are trained on, both [ids]


@dataclasses.dataclass(frozen=True, eq=False)
class Segment:
    """The tokens of one segment, the target of each and its weight, all `[T]`."""

    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


@dataclasses.dataclass(frozen=True, eq=False)
class Made:
    """What became of a row: its segments, none where it is too long and left out."""

    segments: tuple[Segment, ...]
    is_cut: bool = False
    is_chat: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Maker:
    """Makes examples of rows, of the kind that `reader` reads.

    A text has what the tokenizer puts before one, and ends with the end id; of a chat
    the template says all. What comes after the last target with weight is left off.
    labels: all there are to classify, in order.

    An example that takes more than `max_length` places is met by `on_long`: error,
    drop, or "truncate", which cuts

    - completion, preference: the beginning of the prompt, and where there is no more of
      it the end of what is longer than a row (of a pair: than half of one);
    - chat: the end, and leaves it out where the assistant then says nothing;
    - classify: the end of the text, never what data.prompt puts around it.
    """

    reader: Reader
    tokenizer: Tokenizer
    max_length: int
    on_long: str = "error"
    labels: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """The kind of example."""
        return self.reader.kind

    @cached_property
    def begin_ids(self) -> tuple[int, ...]:
        """What stands before a text that is no chat."""
        return special.begin_ids(self.tokenizer)

    def make(self, rows: Iterable[tuple[dict, str]]) -> list[Made | BadRow]:
        """Return what becomes of rows, each with where it stands, or what it lacks.

        Raises UserError on what is not a row's own fault, on a label that is none of
        `labels`, and under "error" on an example that is too long.
        """
        read = [_caught(self.reader.read, row, where) for row, where in rows]
        sides = [side for one in read if isinstance(one, Read) for side in one.sides]
        ids = self._encode(sides)
        return [
            one if isinstance(one, BadRow) else _caught(self._made, one, ids)
            for one in read
        ]

    def _encode(self, sides: Sequence[Side]) -> dict[str, dict[str, np.ndarray]]:
        """Return the ids of pieces by their text, of texts and of chats.

        They are encoded one by one, so that where an answer begins training sees what
        generation sees; but in one call, which is faster.
        """
        found = {}
        for name, is_chat in (("text", False), ("chat", True)):
            these = (side for side in sides if side.is_chat == is_chat)
            texts = list({text: None for side in these for text, _ in side.pieces})
            encode = self._encode_special if is_chat else self.tokenizer.encode_batch
            rows = encode(texts) if texts else []
            arrays = (np.asarray(ids, np.int32) for ids in rows)
            found[name] = dict(zip(texts, arrays, strict=True))
        return found

    @cached_property
    def _encode_special(self):
        return special.batch_encoder(self.tokenizer)

    def _made(self, read: Read, ids: dict) -> Made:
        is_chat = any(side.is_chat for side in read.sides)
        return dataclasses.replace(self._fitted(read, ids), is_chat=is_chat)

    def _fitted(self, read: Read, ids: dict) -> Made:
        """Return what becomes of a row in the places that there are."""
        if self.kind == "classify":
            return self._classified(read, ids["text"][read.sides[0].pieces[0][0]])
        sides = [self._whole(s, ids["chat" if s.is_chat else "text"])
                 for s in read.sides]  # fmt: skip
        if not all(is_trained[1:].any() for _, is_trained in sides):
            got = "".join(text for text, _ in read.sides[0].pieces)
            demand = "have an answer that its chat template writes, after other text"
            raise BadRow(read.where, demand, got)
        size = _num_places(sides)
        if size <= self.max_length:
            return _segments(sides)
        if self.on_long != "truncate":
            return self._long(read, size)
        if self.kind != "chat":
            sides = self._shorter_prompts(sides, size - self.max_length)
        if _num_places(sides) > self.max_length:
            most = self.max_length // len(sides) + 1
            sides = [(ids[:most], is_trained[:most]) for ids, is_trained in sides]
        return _segments(sides, is_cut=True)

    def _whole(self, side: Side, ids: dict[str, np.ndarray]) -> Ids:
        """Return the ids of a side, and which are trained on."""
        parts = [(ids[text], is_trained) for text, is_trained in side.pieces]
        if not side.is_chat:
            begin = np.array(self.begin_ids, np.int32)
            end = np.array([self.tokenizer.end_id], np.int32)
            parts = [(begin, False), *parts, (end, True)]
        arrays, flags = zip(*parts, strict=True)
        return np.concatenate(arrays), np.repeat(flags, [len(part) for part in arrays])

    def _shorter_prompts(self, sides: list[Ids], excess: int) -> list[Ids]:
        """Return sides whose prompts begin later, all as much, if they can."""
        first = len(self.begin_ids)
        room = min(int(is_trained.argmax()) - first for _, is_trained in sides)
        stop = first + max(0, min(room, -(-excess // len(sides))))
        return [tuple(np.delete(x, slice(first, stop)) for x in side) for side in sides]

    def _classified(self, read: Read, ids: np.ndarray) -> Made:
        if read.label not in self.labels:
            raise UserError(
                f"{read.where} must have a label that training rows have; got "
                f"{read.label!r}. Known: {', '.join(self.labels)}."
            )
        text, room = read.text, self.max_length - len(self.begin_ids)
        while len(ids) > room:
            if self.on_long != "truncate" or not text:
                return self._long(read, len(ids) + len(self.begin_ids))
            text = text[: min(len(text) - 1, len(text) * max(room, 0) // len(ids))]
            (ids,) = self.tokenizer.encode_batch([self.reader.prompted(text)])
        tokens = np.concatenate([self.begin_ids, ids]).astype(np.int32)
        targets, weights = np.zeros_like(tokens), np.zeros_like(tokens)
        targets[-1], weights[-1] = self.labels.index(read.label), 1
        return Made((Segment(tokens, targets, weights),), text != read.text)

    def _long(self, read: Read, num_places: int) -> Made:
        if self.on_long == "drop":
            return Made(())
        both = " for both answers together" if self.kind == "preference" else ""
        raise UserError(
            f"{read.where} must take at most data.max_length={self.max_length} "
            f"tokens{both}; got {num_places}. Raise it, or set "
            "--config.data.on_long=truncate or drop."
        )


def _caught(function, *given):
    """Return what a function gives, or the BadRow that it raises."""
    try:
        return function(*given)
    except BadRow as error:
        return error


def _num_places(sides: list[Ids]) -> int:
    """Return how many places sides take up to their last targets with weight."""
    return sum(int(np.flatnonzero(is_trained)[-1]) for _, is_trained in sides)


def _segments(sides: list[Ids], *, is_cut: bool = False) -> Made:
    """Return segments of ids, each the target of the one before it.

    None where a cut has left nothing to learn.
    """
    found = []
    for ids, is_trained in sides:
        weights = is_trained[1:].astype(np.int32)
        size = int(np.flatnonzero(weights)[-1]) + 1 if weights.any() else 0
        if not size:
            return Made((), is_cut)
        found.append(Segment(ids[:size], ids[1 : size + 1], weights[:size]))
    if is_cut and len(found) == 2 and np.array_equal(*(s.targets for s in found)):
        return Made((), is_cut)  # what told them apart is cut off
    return Made(tuple(found), is_cut)
