"""Messages as pieces of text: what the assistant says is trained on, the rest is read.

Pieces are encoded one by one, so that what training sees where an answer begins is what
generation sees there.
"""

from typing import Any

from fm_jax.errors import UserError
from fm_jax.tokenizers.template import Declined, Message, Template

ROLES = ("system", "user", "assistant")
SKIP = "--config.data.on_bad_text=skip"

Piece = tuple[str, bool]  # a text, and whether it is trained on


class BadRow(UserError):
    """A row that is not what an example is made of; it may be skipped."""

    def __init__(self, where: str, demand: str, got: object):
        shown = repr(got) if len(repr(got)) <= 60 else f"{repr(got)[:60]}..."
        shown = {"None": "null", "True": "true", "False": "false"}.get(shown, shown)
        super().__init__(f"{where} must {demand}; got {shown}. Mend it, or set {SKIP}.")


def check(messages: Any, where: str) -> list[Message]:
    """Return messages that are a chat with an assistant's turn in it.

    where: "chats.jsonl line 7". Raises BadRow, which names it, on anything else.
    """
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise BadRow(where, "have a list of messages {role, content}", messages)
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise BadRow(where, f"have roles among {', '.join(ROLES)}", role)
        if not isinstance(content, str):
            raise BadRow(where, "have a text as each message's content", content)
        if role == "assistant" and not content.strip():
            raise BadRow(where, "have text in each turn of the assistant", content)
    if messages and messages[0]["role"] == "assistant":
        raise BadRow(where, "begin with what a user or the system says", "assistant")
    if all(message["role"] != "assistant" for message in messages):
        roles = ", ".join(message["role"] for message in messages)
        raise BadRow(where, "have a turn of the assistant", roles)
    return messages


def pieces(
    messages: list[Message],
    template: Template,
    where: str,
    *,
    end_tokens: tuple[str, ...] = (),
) -> list[Piece]:
    """Return a chat's text in pieces, those of the assistant to be trained on.

    They are what stands in the template's `{% generation %}` blocks. Without these they
    are what an answer adds to the text that asks for it: the end of the turn too, but
    no white space after one of `end_tokens`, which nothing generates. Raises BadRow in
    the words of a template that does not take the messages, and UserError on a template
    whose text of a chat is not how the longer chat begins.
    """
    try:
        if template.has_marks:
            return template.marked(messages)
        whole = template.render(messages, generation_prompt=False)
        found, last = [], 0
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            asked = template.render(messages[:number])
            said = template.render(messages[: number + 1], generation_prompt=False)
            if not (whole.startswith(said) and said.startswith(asked)):
                raise _changes(template, where)
            ended = said.rstrip()
            end = len(ended if end_tokens and ended.endswith(end_tokens) else said)
            found += [
                (whole[last : len(asked)], False),
                (whole[len(asked) : end], True),
            ]
            last = end
    except Declined as error:
        demand = "have messages that the chat template takes"
        raise BadRow(where, demand, error.said) from error
    found.append((whole[last:], False))
    return [piece for piece in found if piece[0]]


def apart(chosen: list[Piece], rejected: list[Piece]) -> tuple[list, list]:
    """Return two chats' pieces in which turns that both begin with are only read."""
    sides = [list(chosen), list(rejected)]
    for place, (one, other) in enumerate(zip(chosen, rejected, strict=False)):
        if one != other:
            break
        for side in sides:
            side[place] = (one[0], False)
    return sides[0], sides[1]


def of_side(prompt: object, answer: object) -> object:
    """Return the messages of one side: what was asked, and the answer.

    An answer that does not begin with the assistant has the prompt in it already.
    """
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    elif (
        answer and isinstance(answer[0], dict) and answer[0].get("role") != "assistant"
    ):
        return answer
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    return [*prompt, *answer] if isinstance(prompt, list) else answer


def _changes(template: Template, where: str) -> UserError:
    return UserError(
        "a chat template without generation blocks must write a chat as the beginning "
        f"of each longer one; got {template.where}, which does not for {where}. Mark "
        "what the assistant says with {% generation %} and {% endgeneration %} in a "
        "file, and set --config.data.chat_template to it."
    )
