"""Tests of chat templates: their text, and what of it the assistant says."""

import datetime
import json
import sys

import pytest

from fm_jax.tokenizers import special, template
from fm_jax.tokenizers.template import Declined, Template
from tests.tokenizers import made
from tests.tokenizers.made import refusal

pytest.importorskip("jinja2")

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2 "},
    {"role": "user", "content": "<&>"},
    {"role": "assistant", "content": "é\n"},
]
MARKED = (
    "{{ bos_token }}{% for m in messages %}\n"
    "  {%- if m.role == 'assistant' -%}\n"
    "    [ {% generation %} {{ m.content }}{{ eos_token }}{% endgeneration %} ]\n"
    "  {%- else %}\n({{ m.content }})\n{% endif %}\n"
    "{% endfor %}"
)


def test_the_plain_template_begins_and_ends_turns_as_documents():
    found = template.plain(made.BYTES)
    end = "<|endoftext|>"
    said = f"{end}System:\nBe brief.\n\nUser:\n1+1?\n\nAssistant:\n"
    assert found.render(CHAT[:2]) == said
    whole = found.render(CHAT, generation_prompt=False)
    assert whole == (f"{said}2 {end}\n\nUser:\n<&>\n\nAssistant:\né\n{end}")
    assert found.marked(CHAT) == [
        (said, False), (f"2 {end}", True), ("\n\nUser:\n<&>\n\nAssistant:\n", False),
        (f"é\n{end}", True),
    ]  # fmt: skip
    with pytest.raises(Declined, match="roles are system, user and assistant"):
        found.render([{"role": "tool", "content": "x"}])


def test_the_plain_template_names_each_tokenizers_own_tokens():
    for tokenizer in made.EXACT.values():
        text = template.plain(tokenizer).render(CHAT, generation_prompt=False)
        ids = special.special_encoder(tokenizer)(text)
        assert ids[0] == ids[-1] == tokenizer.end_id
        assert ids.count(tokenizer.end_id) == 3


def test_marked_pieces_are_the_text_of_the_template():
    found = Template(MARKED, {"bos_token": "<s>", "eos_token": "</s>"}, "here")
    assert found.has_marks
    pieces = found.marked(CHAT)
    text = "".join(piece for piece, _ in pieces)
    assert text == found.render(CHAT, generation_prompt=False)
    assert [piece for piece, trained in pieces if trained] == [
        " 2 </s>", " é\n</s>",
    ]  # fmt: skip


def test_spans_are_those_that_transformers_marks():
    transformers = pytest.importorskip("transformers")
    import tokenizers as library

    inner = library.Tokenizer.from_str(made.BPE.to_json())
    inner.add_special_tokens(["<s>", "</s>"])
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **tokens)
    for source in (MARKED, template.PLAIN):
        expected = theirs.apply_chat_template(
            CHAT, chat_template=source, return_dict=True,
            return_assistant_tokens_mask=True,
        )  # fmt: skip
        found, ids, mask = Template(source, tokens, "here"), [], []
        for text, trained in found.marked(CHAT):
            part = inner.encode(text, add_special_tokens=False).ids
            ids += part
            mask += [int(trained)] * len(part)
        assert (ids, mask) == (expected["input_ids"], expected["assistant_masks"])


def test_a_template_that_changes_what_it_marks_is_refused():
    source = "{% set x %}{% generation %}a{% endgeneration %}{% endset %}{{ x[:9] }}"
    found = Template(source, {}, "a.jinja")
    assert found.render(CHAT) == "a"
    said = refusal(found.marked, CHAT)
    assert "in its generation blocks once and whole; got a.jinja" in said


@pytest.mark.parametrize("before", ["", "\n", "  ", "{% if true %}\n", "{# #}\n "])
def test_a_template_by_itself_gives_the_same_text_without_its_tokens(before):
    source = before + MARKED + ("{% endif %}" if "if" in before else "")
    tokens = {"bos_token": '<"s">é', "eos_token": "</s>", "pad_token": "<pad>"}
    whole = Template(source, tokens, "here")
    alone = Template(whole.text, {}, "there")
    assert alone.render(CHAT) == whole.render(CHAT)
    assert alone.marked(CHAT) == whole.marked(CHAT)
    assert "pad" not in whole.text
    # A run that is tuned from a tuned one keeps it, whatever else is said there.
    assert Template(whole.text, {"bos_token": "<other>"}, "there").text == whole.text
    assert alone.text == whole.text


def test_a_template_without_tokens_is_its_own_text():
    assert Template("\n{{ messages[0].role }}", {"unk_token": "u"}, "").text == (
        "\n{{ messages[0].role }}"
    )


def test_the_day_may_be_set():
    source, day = "{{ strftime_now('%d %b %Y') }}", datetime.datetime(2024, 7, 26)
    assert Template(source, {}, "here", today=day).render(CHAT) == "26 Jul 2024"
    assert Template(source, {}, "here").render(CHAT) != "26 Jul 2024"


def test_a_template_is_found_beside_a_tokenizer(tmp_path):
    tokens = {"bos_token": "<b>", "eos_token": "<e>"}
    assert template.find(tmp_path, tokens) is None
    (tmp_path / "chat_template.json").write_text('{"chat_template": "{{ eos_token }}"}')
    assert template.find(tmp_path, tokens).render(CHAT) == "<e>"
    fields = {"chat_template": "{{ eos_token }}2", "eos_token": {"content": "</s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(fields))
    assert template.find(tmp_path, tokens).render(CHAT) == "</s>2"
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}3")
    assert template.find(tmp_path, tokens).render(CHAT) == "<b>3"


@pytest.mark.parametrize(
    "content, said",
    [
        ("[1]", "tokenizer_config.json must hold a JSON object; got '\\[1\\]'"),
        ("{", "tokenizer_config.json must be a JSON file to read"),
        ('{"chat_template": "{% for %}"}', "a chat template must be Jinja; got .*conf"),
    ],
)
def test_a_file_that_is_something_else_is_refused(content, said, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(ValueError, match=said):
        template.find(tmp_path)


def test_a_missing_jinja_is_named_with_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    said = refusal(template.plain, made.BYTES)
    assert "chats need jinja2" in said
    assert "fm_jax[serve]" in said
