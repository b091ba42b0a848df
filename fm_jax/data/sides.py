"""Rows of data as text in pieces: one side to learn from, or two to choose between."""

import dataclasses
from collections.abc import Sequence

from fm_jax.data import chats
from fm_jax.data import labels as labelling
from fm_jax.data.chats import BadRow, Piece
from fm_jax.errors import UserError, unknown
from fm_jax.tokenizers.template import Template

# What each kind of example is made of, by its own names.
FIELDS = {
    "completion": ("prompt", "completion"),
    "chat": ("messages",),
    "classify": ("text", "label"),
    "preference": ("prompt", "chosen", "rejected"),
}
OPTIONAL = {("preference", "prompt")}  # where the sides are whole chats
MAY_BE_EMPTY = ("prompt", "text")
TEXT = "{text}"  # in data.prompt: where the text of a row stands


@dataclasses.dataclass(frozen=True)
class Side:
    """Text of one segment in pieces; of a chat, in which special tokens are spelt."""

    pieces: tuple[Piece, ...]
    is_chat: bool = False


@dataclasses.dataclass(frozen=True)
class Read:
    """A row as text, and where it stands; of "classify" also its text and label."""

    where: str
    sides: tuple[Side, ...]
    text: str = ""
    label: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Reader:
    """Reads rows of one kind of example.

    fields: the data's own names by FIELDS'. prompt: of "classify", what is read, with
    {text} in it. end_tokens: those that may end an assistant's turn, as they are spelt.
    """

    kind: str
    fields: dict[str, str]
    template: Template | None = None
    prompt: str = TEXT
    end_tokens: tuple[str, ...] = ()

    def read(self, row: dict, where: str) -> Read:
        """Return a row as text. where: "chats.jsonl line 7".

        Raises BadRow on a row that is no such example, and UserError on a template that
        cannot say what is to be learnt.
        """
        if self.kind == "completion":
            asked, answer = (self._text(row, name, where) for name in FIELDS[self.kind])
            return Read(where, (Side(((asked, False), (answer, True))),))
        if self.kind == "chat":
            messages = chats.check(self._field(row, "messages", where), where)
            return Read(where, (self._chat(messages, where),))
        if self.kind == "classify":
            text = self._text(row, "text", where)
            said = Side(((self.prompted(text), False),))
            return Read(where, (said,), text, self.label_of(row, where))
        return Read(where, self._pair(row, where))

    def label_of(self, row: dict, where: str) -> str:
        """Return the label of a row as text. Raises BadRow where it has none."""
        found = self._field(row, "label", where)
        if not isinstance(found, str | bool | int | float):
            raise BadRow(where, "have a text or a number as label", found)
        return labelling.as_text(found)

    def prompted(self, text: str) -> str:
        """Return what is read of a text to classify."""
        return self.prompt.replace(TEXT, text)

    def _pair(self, row: dict, where: str) -> tuple[Side, Side]:
        """Return the two sides of a preference, the chosen one first."""
        prompt, *answers = (self._field(row, n, where) for n in FIELDS[self.kind])
        if answers[0] == answers[1]:
            raise BadRow(where, "have two answers that differ", answers[0])
        kinds = [type(answer) for answer in answers]
        if kinds not in ([str, str], [list, list]):
            demand = "have two texts or two lists of messages to choose between"
            raise BadRow(where, demand, answers)
        if kinds[0] is str and not isinstance(prompt, list):
            asked, *said = (self._text(row, n, where) for n in FIELDS[self.kind])
            one, other = (Side(((asked, False), (answer, True))) for answer in said)
            return one, other
        found = []
        for answer in answers:
            messages = chats.check(chats.of_side(prompt, answer), where)
            if messages[-1]["role"] != "assistant":
                got = messages[-1]["role"]
                raise BadRow(where, "have answers that end with the assistant", got)
            found.append(self._chat(messages, where).pieces)
        one, other = (tuple(side) for side in chats.apart(*found))
        if not all(any(is_trained for _, is_trained in side) for side in (one, other)):
            raise BadRow(where, "have two answers that differ in text", answers[0])
        return Side(one, is_chat=True), Side(other, is_chat=True)

    def _chat(self, messages: list, where: str) -> Side:
        if self.template is None:
            raise UserError(
                f"{where} has messages, which need jinja2, which is not installed. pip "
                "install 'fm_jax[serve]'"
            )
        pieces = chats.pieces(
            messages, self.template, where, end_tokens=self.end_tokens
        )
        return Side(tuple(pieces), is_chat=True)

    def _field(self, row: dict, name: str, where: str):
        found = row.get(self.fields[name])
        if found is None and (self.kind, name) not in OPTIONAL:
            has = ", ".join(row) or "nothing"
            raise BadRow(where, f"have a field {self.fields[name]!r}", has)
        return found

    def _text(self, row: dict, name: str, where: str) -> str:
        found, field = self._field(row, name, where), self.fields[name]
        if not isinstance(found, str):
            raise BadRow(where, f"have text as {field!r}", found)
        if not found and name not in MAY_BE_EMPTY:
            raise BadRow(where, f"have text as {field!r}, and some", found)
        return found


def fields(kind: str, named: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Return the data's names of a kind's fields, by the kind's own.

    named: (own, data's) pairs, as data.fields. Raises UserError on names that the kind
    does not have, and on a field that stands for two.
    """
    found = {name: name for name in FIELDS[kind]}
    for name, field in named:
        if name not in found:
            raise unknown(f"a name in data.fields of {kind}", name, found)
        found[name] = field
    if len({*found.values()}) < len(found):
        shown = ", ".join(f"{name} in {field!r}" for name, field in found.items())
        raise UserError(
            f"data.fields must name a field of its own for each; got {shown}."
        )
    return found
