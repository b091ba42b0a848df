"""Tests of rows as text: which fields they have, and what is wrong with them."""

import pytest

from fm_jax.data import sides
from fm_jax.data.chats import BadRow
from fm_jax.data.sides import Reader, Side
from fm_jax.errors import UserError
from fm_jax.tokenizers import template
from fm_jax.tokenizers.plain import ByteTokenizer

HERE = "rows.jsonl line 7"
END = "<|endoftext|>"


def _reader(kind, *named, **how):
    return Reader(kind, sides.fields(kind, named), **how)


def test_fields_stand_under_their_own_names_or_others():
    assert sides.fields("classify", ()) == {"text": "text", "label": "label"}
    named = (("label", "text"), ("text", "sentence"))
    assert sides.fields("classify", named) == {"text": "sentence", "label": "text"}
    row = {"sentence": "fine", "text": 1}
    found = _reader("classify", *named, prompt="Is it? {text}!").read(row, HERE)
    assert (found.text, found.label) == ("fine", "1")
    assert found.sides == (Side((("Is it? fine!", False),)),)


def test_names_that_a_kind_does_not_have_are_refused():
    with pytest.raises(UserError, match=r"data.fields of chat .* got 'message'") as e:
        sides.fields("chat", (("message", "m"),))
    assert "Did you mean 'messages'?" in str(e.value)
    with pytest.raises(UserError, match="a field of its own for each; got prompt in"):
        sides.fields("completion", (("prompt", "completion"),))


def test_a_prompt_is_read_and_its_completion_trained_on():
    row = {"prompt": "", "completion": " a", "other": 3}
    (side,) = _reader("completion").read(row, HERE).sides
    assert side == Side((("", False), (" a", True)))


def test_two_texts_share_their_prompt():
    row = {"prompt": "p", "chosen": "good", "rejected": "bad"}
    assert _reader("preference").read(row, HERE).sides == (
        Side((("p", False), ("good", True))),
        Side((("p", False), ("bad", True))),
    )


def _said(role, content):
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [_said("user", "p")], "chosen": "good", "rejected": "bad"},
        {
            "prompt": "p",
            "chosen": [_said("assistant", "good")],
            "rejected": [_said("assistant", "bad")],
        },
        {
            "prompt": "p",  # as in UltraFeedback, which has it twice
            "chosen": [_said("user", "p"), _said("assistant", "good")],
            "rejected": [_said("user", "p"), _said("assistant", "bad")],
        },
    ],
)
def test_chats_to_choose_between_are_written_by_the_template(row):
    pytest.importorskip("jinja2")
    plain = template.plain(ByteTokenizer())
    found = _reader("preference", template=plain).read(row, HERE).sides
    for side, answer in zip(found, ("good", "bad"), strict=True):
        before = f"{END}User:\np\n\nAssistant:\n"
        assert side == Side(((before, False), (f"{answer}{END}", True)), is_chat=True)


CHAT = [_said("user", "p"), _said("assistant", "a")]


@pytest.mark.parametrize(
    "kind, row, said",
    [
        ("completion", {"prompt": "p"}, "have a field 'completion'; got 'prompt'"),
        ("completion", {}, "have a field 'prompt'; got 'nothing'"),
        (
            "completion",
            {"prompt": 3, "completion": "a"},
            "have text as 'prompt'; got 3",
        ),
        ("completion", {"prompt": "p", "completion": ""}, "as 'completion', and some"),
        ("chat", {"messages": CHAT[:1]}, "have a turn of the assistant; got 'user'"),
        ("classify", {"text": "t", "label": [1]}, "text or a number as label; got"),
        ("classify", {"text": "t"}, "have a field 'label'; got 'text'"),
        (
            "preference",
            {"prompt": "p", "chosen": "a", "rejected": "a"},
            "have two answers that differ; got 'a'",
        ),
        (
            "preference",
            {"chosen": CHAT, "rejected": [*CHAT]},
            "have two answers that differ",
        ),
        (
            "preference",
            {"chosen": CHAT, "rejected": [CHAT[0], CHAT[1] | {"name": "b"}]},
            "have two answers that differ in text",
        ),
        (
            "preference",
            {"chosen": "a", "rejected": "b"},
            "have text as 'prompt'; got nu",
        ),
        (
            "preference",
            {"prompt": "p", "chosen": "a", "rejected": CHAT},
            "have two texts or two lists of messages",
        ),
        (
            "preference",
            {"chosen": CHAT, "rejected": [*CHAT, CHAT[0]]},
            "have answers that end with the assistant; got 'user'",
        ),
    ],
)
def test_a_row_that_is_no_such_example_is_refused_with_its_line(kind, row, said):
    pytest.importorskip("jinja2")
    reader = _reader(kind, template=template.plain(ByteTokenizer()))
    with pytest.raises(BadRow, match=f"^rows.jsonl line 7 must .*{said}"):
        reader.read(row, HERE)


def test_messages_without_jinja_are_refused():
    with pytest.raises(UserError, match=r"has messages, which need jinja2.*\[serve\]"):
        _reader("chat").read({"messages": CHAT}, HERE)
