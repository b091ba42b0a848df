"""Tests of chat templates: the text that `transformers` makes of them."""

import json

import pytest

from fm_jax.errors import UserError
from fm_jax.serve import chat
from fm_jax.serve.refused import Refused
from fm_jax.serve.served import Served
from fm_jax.tokenizers.jsonfile import JsonTokenizer
from fm_jax.tokenizers.special import special_encoder
from fm_jax.tokenizers.template import Template

pytest.importorskip("jinja2")

# Written for these tests, with what the templates of known families make use of.
TEMPLATES = {
    "turns": (
        "{% for message in messages %}\n"
        "    {{- '<|turn|>' + message.role + '\\n' + message['content'] | trim }}\n"
        "    {{- '<|over|>\\n' }}\n"
        "{% endfor %}\n"
        "{% if add_generation_prompt %}{{ '<|turn|>assistant\\n' }}{% endif %}"
    ),
    "instructions": (
        "{{ bos_token }}{% set ns = namespace(system='') %}"
        "{% for m in messages %}{% if m.role == 'system' %}"
        "{% set ns.system = m.content ~ ' ' %}{% continue %}{% endif %}"
        "{% if m.role == 'user' %}[INST] {{ ns.system ~ m.content }} [/INST]"
        "{% else %}{% generation %} {{ m.content }}{{ eos_token }}{% endgeneration %}"
        "{% endif %}{% if loop.index > 9 %}{% break %}{% endif %}{% endfor %}"
    ),
    "json": (
        "{{ messages | tojson }}|{{ messages[0] | tojson(indent=2) }}"
        "{% if tools is none and documents is none %}|none{% endif %}"
        "{% if unk_token is defined %}|{{ unk_token }}{% endif %}"
        "{% if thinking %}|thinks{% endif %}|{{ strftime_now('%Y') }}"
        "{% for k, v in dict(a=1, b='<&>').items() %}{{ k }}{{ v }}{% endfor %}"
    ),
    "reasoning": (
        "{% for m in messages %}{% if m.thinking is defined %}({{ m.thinking }}/"
        "{{ m.reasoning_content }}){% endif %}{{ m.content }}{% endfor %}"
    ),
}
CHATS = [
    [{"role": "user", "content": " Hello é <b>&amp;</b> "}],
    [
        {"role": "system", "content": "be\nbrief"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two", "reasoning_content": "since"},
        {"role": "user", "content": "", "name": "ann"},
    ],
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


@pytest.fixture(scope="module")
def tokenizer_json():
    """Return a tokenizer.json with special tokens, the first put before each text."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>", "<unk>", "<|turn|>", "<|over|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["assistant user one two system be brief"] * 9, trainer)
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return made.to_str()


@pytest.fixture(scope="module")
def theirs(tokenizer_json):
    """Return the tokenizer of `transformers`."""
    transformers = pytest.importorskip("transformers")
    import tokenizers

    inner = tokenizers.Tokenizer.from_str(tokenizer_json)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **SPECIAL)


@pytest.mark.parametrize("messages", CHATS, ids=["one", "several"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_text_is_that_of_transformers(name, messages, theirs, tmp_path):
    values = {"thinking": True} if name == "json" else {}
    found = Template(TEMPLATES[name], SPECIAL, tmp_path)
    assert found.render(tuple(messages), values) == theirs.apply_chat_template(
        messages,
        chat_template=TEMPLATES[name],
        tokenize=False,
        add_generation_prompt=True,
        **values,
    )


@pytest.mark.parametrize("name", ["turns", "instructions"])
def test_ids_are_those_of_transformers(name, theirs, tokenizer_json, tmp_path):
    tokenizer = JsonTokenizer(tokenizer_json, end_token="</s>")
    served = Served(
        name="m", created=0, capacity=999, vocab_size=300, tokenizer=tokenizer,
        encode_special=special_encoder(tokenizer), begin_ids=(0,), chat_begin_ids=(),
        template=Template(TEMPLATES[name], SPECIAL, tmp_path), end_ids=(1,),
    )  # fmt: skip
    from fm_jax.serve import requests

    body = json.dumps({"model": "m", "messages": CHATS[1]}).encode()
    (request,) = served.requests(requests.chat(body))
    messages = [{k: v for k, v in m.items() if v} | {"content": m["content"]}
                for m in CHATS[1]]  # fmt: skip
    expected = theirs.apply_chat_template(
        messages, chat_template=TEMPLATES[name], add_generation_prompt=True,
        return_dict=False,
    )  # fmt: skip
    assert list(request.prompt) == expected
    assert 3 in expected or 0 in expected  # special tokens became ids


def test_a_template_is_found_where_imported_runs_have_it(tmp_path):
    messages = ({"role": "user", "content": "a"},)
    kept = tmp_path / "hf"
    kept.mkdir()
    assert chat.find(tmp_path) is None
    (kept / "chat_template.json").write_text('{"chat_template": "oldest"}')
    assert chat.find(tmp_path).render(messages, {}) == "oldest"
    config = kept / "tokenizer_config.json"
    several = [{"name": "tool_use", "template": "no"},
               {"name": "default", "template": "{{ bos_token }}several"}]  # fmt: skip
    config.write_text(json.dumps({"chat_template": several, "bos_token": "B"}))
    assert chat.find(tmp_path).render(messages, {}) == "Bseveral"
    bos = {"content": "<s>", "lstrip": False}
    config.write_text(json.dumps({"chat_template": "{{bos_token}}2", "bos_token": bos}))
    assert chat.find(tmp_path).render(messages, {}) == "<s>2"
    (kept / "chat_template.jinja").write_text("{{ bos_token }}newest")
    assert chat.find(tmp_path).render(messages, {}) == "<s>newest"
    (tmp_path / "mine").write_text("{{ messages[0].content }}{{ bos_token }}")
    assert chat.find(tmp_path, str(tmp_path / "mine")).render(messages, {}) == "a<s>"


def test_what_a_template_refuses_is_told_in_its_words(tmp_path):
    source = "{{ raise_exception(messages[0].role ~ '!') }}"
    template = Template(source, {}, tmp_path)
    with pytest.raises(Refused, match="takes; it says: bot!"):
        chat.render(template, ({"role": "bot", "content": "a"},), {})


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__ }}{{ cycler.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{% for i in range(999999) %}{% endfor %}",
        "{% include 'file' %}",
        "{{ open('/etc/passwd') }}",
    ],
)
def test_a_template_reaches_nothing_but_the_messages(source, tmp_path):
    template = Template(source, {}, tmp_path)
    try:
        text = chat.render(template, ({"role": "user", "content": "a"},), {})
    except Refused:
        return
    assert text == ""  # an attribute that it may not have is no attribute


def test_a_value_may_not_stand_for_the_messages(tmp_path):
    template = Template("a", {}, tmp_path)
    with pytest.raises(Refused, match="chat_template_kwargs must leave out messages"):
        chat.render(template, (), {"messages": []})


def test_a_file_that_is_no_template_is_refused(tmp_path):
    with pytest.raises(UserError, match="a chat template must be a text file"):
        chat.find(tmp_path, str(tmp_path / "missing"))
    (tmp_path / "bad").write_text("{% for %}")
    with pytest.raises(UserError, match=r"a chat template must be Jinja; got .*bad"):
        chat.find(tmp_path, str(tmp_path / "bad"))


def test_a_missing_jinja_is_named_with_the_extra(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(UserError, match=r"chats need jinja2.*fm_jax\[serve\]"):
        Template("a", {}, tmp_path)


def test_a_run_that_was_tuned_has_a_template_of_its_own(tmp_path):
    kept = tmp_path / "hf"
    kept.mkdir()
    (kept / "chat_template.jinja").write_text("theirs")
    assert chat.begin_ids(tmp_path, (7,)) == (7,)  # no import: it has no weights.json
    (tmp_path / "chat_template.jinja").write_text('{% set eos_token = "E" %}\nown')
    assert chat.find(tmp_path).render([]) == "own"
    assert chat.begin_ids(tmp_path, (7,)) == ()  # it says all that a chat begins with


def test_what_stands_before_a_chat_stands_there_once():
    def encode(text):
        return [*text.encode()]

    assert chat.ids("ab", encode, (97,)) == (97, 98)
    assert chat.ids("b", encode, (97,)) == (97, 98)
    assert chat.ids("b", encode, ()) == (98,)
