"""Tests of which text of a chat is trained on: what the assistant says, no more."""

import pytest

from fm_jax.data import chats
from fm_jax.data.chats import BadRow
from fm_jax.errors import UserError
from fm_jax.tokenizers import template
from fm_jax.tokenizers.plain import ByteTokenizer
from fm_jax.tokenizers.template import Template

pytest.importorskip("jinja2")

CHAT = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two\n"},
    {"role": "user", "content": "three"},
    {"role": "user", "content": "four"},
    {"role": "assistant", "content": "five"},
    {"role": "user", "content": "six"},
]
TURNS = (
    "{{ bos }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|over|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
HERE = "chats.jsonl line 7"


def test_without_blocks_it_is_what_an_answer_adds_to_the_text_that_asks_for_it():
    found = chats.pieces(CHAT, Template(TURNS, {}, "here"), HERE)
    assert found == [
        ("<|user|>\none<|over|>\n<|assistant|>\n", False),
        ("two\n<|over|>\n", True),
        ("<|user|>\nthree<|over|>\n<|user|>\nfour<|over|>\n<|assistant|>\n", False),
        ("five<|over|>\n", True),
        ("<|user|>\nsix<|over|>\n", False),
    ]


def test_white_space_after_the_end_of_a_turn_is_only_read():
    made = Template(TURNS, {}, "here")
    found = chats.pieces(CHAT[:3], made, HERE, end_tokens=("<|over|>", "<s>"))
    assert found == [
        ("<|user|>\none<|over|>\n<|assistant|>\n", False),
        ("two\n<|over|>", True),
        ("\n<|user|>\nthree<|over|>\n", False),
    ]


def test_the_text_is_that_of_transformers():
    transformers = pytest.importorskip("transformers")
    from tests.tokenizers import made

    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=__import__("tokenizers").Tokenizer.from_str(made.BPE.to_json())
    )
    text = theirs.apply_chat_template(CHAT, chat_template=TURNS, tokenize=False)
    found = chats.pieces(CHAT, Template(TURNS, {}, "here"), HERE)
    assert "".join(piece for piece, _ in found) == text


def test_with_blocks_it_is_what_is_in_them():
    source = (
        "{% for m in messages %}{% if m.role == 'assistant' %}<{% generation %}"
        "{{ m.content }}{% endgeneration %}>{% else %}[{{ m.content }}]{% endif %}"
        "{% endfor %}"
    )
    assert chats.pieces(CHAT, Template(source, {}, "here"), HERE) == [
        ("[one]<", False), ("two\n", True), (">[three][four]<", False),
        ("five", True), (">[six]", False),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "source",
    [
        # Only the last turn ends; an answer is not what follows the question.
        TURNS.replace("<|over|>", "{{ '<|over|>' if loop.last }}"),
        TURNS.replace("<|assistant|>\n{% endif", "<|assistant|>think\n{% endif"),
    ],
)
def test_a_template_that_changes_what_came_before_is_refused(source):
    with pytest.raises(UserError, match=r"got a\.jinja, which does not for chats") as e:
        chats.pieces(CHAT, Template(source, {}, "a.jinja"), HERE)
    assert "{% generation %}" in str(e.value)
    assert not isinstance(e.value, BadRow)


def test_messages_that_a_template_does_not_take_are_the_rows_own_fault():
    source = "{% if messages|length > 1 %}{{ raise_exception('no more') }}{% endif %}"
    with pytest.raises(
        BadRow, match=r"chats.jsonl line 7 must have messages .*no more"
    ):
        chats.pieces(CHAT, Template(source, {}, "here"), HERE)


def _said(role, content):
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    "messages, said",
    [
        ("hi", "have a list of messages {role, content}; got 'hi'"),
        (None, "have a list of messages {role, content}; got null"),
        (["hi"], "have a list of messages"),
        ([_said("bot", "a")], "have roles among system, user, assistant; got 'bot'"),
        ([{"content": "a"}], "have roles among .*; got null"),
        ([_said("user", None)], "have a text as each message's content; got null"),
        (
            [_said("user", "a"), _said("assistant", " \n")],
            "have text in each turn of the assistant",
        ),
        ([_said("user", "a"), _said("system", "b")], "have a turn of the assistant"),
        ([], "have a turn of the assistant"),
        (
            [_said("assistant", "a")],
            "begin with what a user or the system says; got 'assistant'",
        ),
    ],
)
def test_what_is_no_chat_is_refused_with_its_line(messages, said):
    with pytest.raises(BadRow, match=f"chats.jsonl line 7 must {said}") as error:
        chats.check(messages, HERE)
    assert "--config.data.on_bad_text=skip" in str(error.value)
    assert "\n" not in str(error.value)


def test_two_users_in_a_row_and_other_fields_of_a_message_are_fine():
    messages = [*CHAT[:5], _said("system", "")]
    messages[0] = messages[0] | {"name": "ann"}
    assert chats.check(messages, HERE) is messages


def test_turns_that_two_chats_share_are_only_read():
    made = template.plain(ByteTokenizer())
    other = [*CHAT[:4], _said("assistant", "seven")]
    sides = [chats.pieces(chat, made, HERE) for chat in (CHAT[:5], other)]
    found = chats.apart(*sides)
    for side, answer in zip(found, ("five", "seven"), strict=True):
        trained = [text for text, is_trained in side if is_trained]
        assert trained == [f"{answer}<|endoftext|>"]
    for side, before in zip(found, sides, strict=True):
        assert [text for text, _ in side] == [text for text, _ in before]


def test_a_side_has_its_question_from_the_prompt_or_in_itself():
    asked, answer = _said("user", "a"), _said("assistant", "b")
    for prompt, side in (
        ("a", "b"), ("a", [answer]), ([asked], "b"), ([asked], [answer]),
        ("another", [asked, answer]), (None, [asked, answer]),
    ):  # fmt: skip
        assert chats.of_side(prompt, side) == [asked, answer]
