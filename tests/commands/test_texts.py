"""Tests of what fm generate reads and prints."""

import io
import json

import pytest

from fm_jax.commands import texts
from fm_jax.errors import UserError
from fm_jax.generation.batch import Written
from fm_jax.generation.request import Logprob


def _file(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_prompts_are_those_of_flags_and_of_a_file(tmp_path):
    lines = _file(tmp_path, "prompts.txt", "one\n\ntwo, ü\n")
    objects = _file(tmp_path, "prompts.jsonl", '{"prompt": "a\\nb"}\n{"prompt": ""}\n')
    assert texts.read_prompts([], "") == [""]
    assert texts.read_prompts(["x", "y"], "") == ["x", "y"]
    assert texts.read_prompts(["x"], lines) == ["x", "one", "two, ü"]
    assert texts.read_prompts([], objects) == ["a\nb", ""]


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("p.txt", "\n \n", "with prompts; got .*, empty"),
        ("p.jsonl", '{"prompt": "a"}\n{"text": "b"}', "p.jsonl:2 must be an object"),
        ("p.jsonl", "plain", "p.jsonl:1 must be JSON; got 'plain'"),
    ],
)
def test_a_file_of_something_else_is_refused(name, content, said, tmp_path):
    with pytest.raises(UserError, match=said):
        texts.read_prompts([], _file(tmp_path, name, content))


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"file of UTF-8 text; got .*No such file"):
        texts.read_prompts([], str(tmp_path / "none.txt"))


@pytest.mark.parametrize(
    "argv, is_terminal, count, expected",
    [
        ([], True, 1, True),
        ([], True, 2, False),
        ([], False, 1, False),
        (["--stream"], False, 2, True),
        (["--stream=false"], True, 1, False),
        (["--nostream"], True, 1, False),
    ],
)
def test_a_single_text_is_streamed_to_a_terminal(argv, is_terminal, count, expected):
    assert texts.streams(["generate", *argv], is_terminal, count) == expected


def test_texts_that_grow_together_are_printed_one_after_the_other():
    out = io.StringIO()
    printer = texts.Printer(["a:", "b:", "c:"], out)
    printer.tell(1, "two")
    assert out.getvalue() == "a:"
    printer.tell(0, "one")
    assert out.getvalue() == "a:one"
    printer.tell(0, " more")
    printer.finish()
    assert out.getvalue() == "a:one more\n---\nb:two\n---\nc:\n"


def test_json_has_ids_and_log_probabilities():
    top = ((7, -0.5), (8, -1.25))
    written = Written("hi", (7,), (Logprob(-0.5, top),), "stop")
    found = texts.as_json("say ", written, lambda ids: f"<{ids[0]}>")
    assert json.loads(json.dumps(found)) == {
        "prompt": "say ",
        "text": "hi",
        "tokens": [7],
        "logprobs": [
            {
                "id": 7,
                "token": "<7>",
                "logprob": -0.5,
                "top": [
                    {"id": 7, "token": "<7>", "logprob": -0.5},
                    {"id": 8, "token": "<8>", "logprob": -1.25},
                ],
            }
        ],
        "finish_reason": "stop",
    }
    plain = Written("", (), (), "stop")
    assert texts.as_json("", plain, str)["logprobs"] is None


class _Held:
    """What of a run prompts need."""

    from fm_jax.tokenizers.plain import ByteTokenizer

    tokenizer = ByteTokenizer()
    begin_ids = (256,)

    def prompts(self, given):
        return [(*self.begin_ids, *text.encode()) for text in given]


def _flags(path, **changes):
    from fm_jax import flags
    from fm_jax.commands import listed

    given = {n: d for n, (d, _) in listed.COMMANDS["generate"].flags.items()}
    return flags.Parsed(given | {"run": str(path)} | changes, [], "")


def test_of_a_chat_a_prompt_is_what_a_user_says(tmp_path):
    pytest.importorskip("jinja2")
    from fm_jax.tokenizers import template

    source = template.plain(_Held.tokenizer).text
    (tmp_path / "chat_template.jinja").write_text(source)
    flags = _flags(tmp_path, chat=True)
    found = texts._prompts(_Held(), ["a", "b"], texts._template(tmp_path), flags)
    assert found == [
        (256, *f"User:\n{text}\n\nAssistant:\n".encode()) for text in ("a", "b")
    ]
    flags = _flags(tmp_path, chat=True, system="be brief")
    (found,) = texts._prompts(_Held(), ["a"], texts._template(tmp_path), flags)
    said = "System:\nbe brief\n\nUser:\na\n\nAssistant:\n"
    assert found == (256, *said.encode())
    assert texts._prompts(_Held(), ["a"], None, flags) == [(256, 97)]


def test_a_chat_with_a_run_without_a_template_is_refused(tmp_path):
    with pytest.raises(
        UserError, match=r"--chat needs a run with a chat template; got"
    ):
        texts.run(_flags(tmp_path, chat=True), [])


def test_a_system_without_a_chat_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--system needs --chat"):
        texts.run(_flags(tmp_path, system="be brief"), [])
