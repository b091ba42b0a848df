"""Tokenizers and chat templates of strangers, made wrong."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fm_jax.tokenizers import load as loading
from fm_jax.tokenizers import template
from fm_jax.tokenizers.template import Template
from tests.security import mutants
from tests.tokenizers import made

TEXT = "The cat sat\n on 12 mats, é\U0001f642 <|endoftext|>"
BPE = json.loads(made.trained(vocab_size=262).to_json())
UNIGRAM = json.loads(made.unigram())
FALLBACK = json.loads(made.byte_fallback())
RANKS = json.loads(made.RANKS.to_json())
RANKS["ranks"] = RANKS["ranks"][:256]


def _use(file):
    """Load a tokenizer and use it on a little text."""
    tokenizer = loading.load(file)
    (ids,) = tokenizer.encode_batch([TEXT], num_threads=1)
    tokenizer.decode(ids)
    tokenizer.decode_bytes(range(min(9, tokenizer.vocab_size)))
    assert len(tokenizer.byte_lengths) == tokenizer.vocab_size
    assert tokenizer.fingerprint


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"


@pytest.mark.parametrize("valid", [BPE, UNIGRAM, FALLBACK, RANKS])
def test_a_tokenizer_that_is_right_is_used(file, valid):
    file.write_text(json.dumps(valid))
    _use(file)


@mutants.cases(400)
@given(raw=mutants.of_json(BPE))
def test_a_byte_level_tokenizer_that_lies_is_one_line(file, raw):
    file.write_bytes(raw)
    mutants.refused(_use, file)


@mutants.cases(300)
@given(raw=mutants.of_json(UNIGRAM))
def test_a_unigram_tokenizer_that_lies_is_one_line(file, raw):
    file.write_bytes(raw)
    mutants.refused(_use, file)


@mutants.cases(300)
@given(raw=mutants.of_json(FALLBACK))
def test_a_tokenizer_with_bytes_to_fall_back_to_that_lies_is_one_line(file, raw):
    file.write_bytes(raw)
    mutants.refused(_use, file)


@mutants.cases(300)
@given(raw=mutants.of_json(RANKS))
def test_ranks_of_ours_that_lie_are_one_line(file, raw):
    file.write_bytes(raw)
    mutants.refused(_use, file)


LINES = made.rank_lines({bytes([byte]): byte for byte in range(256)})
BESIDE = {"pattern": r"\w+|\W+", "special_tokens": {"<|endoftext|>": 256}}


@mutants.cases(500)
@given(
    raw=st.one_of(st.just(LINES), mutants.of_bytes(LINES)),
    beside=mutants.of_json(BESIDE),
)
def test_a_file_of_ranks_that_lies_is_one_line(file, raw, beside):
    ranks = file.with_name("ranks.tiktoken")
    ranks.write_bytes(raw)
    ranks.with_suffix(".json").write_bytes(beside)
    mutants.refused(_use, ranks)


@mutants.cases(250)
@given(data=st.data())
def test_a_sentencepiece_model_that_lies_is_one_line(file, data):
    pytest.importorskip("sentencepiece")
    model = file.with_name("tokenizer.model")
    model.write_bytes(data.draw(mutants.of_bytes(_model())))
    mutants.refused(_use, model)


def _model(kept=[]):  # noqa: B006, made once
    if not kept:
        kept.append(made.sentence_model(vocab_size=300))
    return kept[0]


@pytest.mark.parametrize(
    "fields",
    [
        {"fm_jax_tokenizer": "symbols", "num_symbols": 10**12},
        {"fm_jax_tokenizer": "symbols", "num_symbols": -3},
        {"fm_jax_tokenizer": "symbols", "num_symbols": 2.5},
        {"fm_jax_tokenizer": "symbols"},
        {"fm_jax_tokenizer": "ranks", "ranks": {}},
        {"fm_jax_tokenizer": "sentencepiece", "model": "AAAA", "end_id": 0},
        {"fm_jax_tokenizer": "another"},
        RANKS | {"special_tokens": {"<|endoftext|>": 2**31}},
        RANKS | {"special_tokens": {"<|endoftext|>": 2.5}},
        BPE | {"model": BPE["model"] | {"vocab": {"a": 2**32 - 1}, "merges": []}},
    ],
)
def test_a_tokenizer_with_more_ids_than_memory_is_one_line(file, fields):
    file.write_text(json.dumps(fields))
    assert mutants.refused(_use, file)


# ---- Chat templates

PLAIN = template.PLAIN
OURS = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": PLAIN}
NAMED = OURS | {"chat_template": [{"name": "default", "template": PLAIN}]}
CHAT = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Ho."}]


def _render(folder):
    found = template.find(folder)
    if found is not None:
        found.render(CHAT)
        found.marked(CHAT)


@mutants.cases(300)
@given(raw=st.one_of(mutants.of_json(OURS), mutants.of_json(NAMED)))
def test_what_stands_beside_a_tokenizer_and_lies_is_one_line(file, raw):
    (file.parent / "tokenizer_config.json").write_bytes(raw)
    (file.parent / template.FILE).unlink(missing_ok=True)
    mutants.refused(_render, file.parent)


@mutants.cases(500)
@given(raw=mutants.of_bytes(PLAIN.encode()))
def test_a_template_that_is_wrong_is_one_line(file, raw):
    (file.parent / "tokenizer_config.json").unlink(missing_ok=True)
    (file.parent / template.FILE).write_bytes(raw)
    mutants.refused(_render, file.parent)


FOR = "{% for i in range(99999) %}"
HUGE = {
    "loops": f"{FOR * 3}{{% endfor %}}{{% endfor %}}{{% endfor %}}",
    "loop with text": f"{FOR}{'x' * 1000}{{% endfor %}}",
    "times": "{{ 'a' * 10**11 }}",
    "list times": "{% set x = [0] * 10**11 %}",
    "power": "{{ 10 ** (10 ** 9) }}",
    "product": "{% set ns = namespace(x=9**999) %}"
    + "{% set ns.x = ns.x * ns.x %}" * 40
    + "{{ ns.x }}",
    "doubling": "{% set x = 'ab' %}" + "{% set x = x ~ x %}" * 60 + "{{ x }}",
    "adding": "{% set x = 'ab' %}" + "{% set x = x + x %}" * 60 + "{{ x }}",
    "block": "{% set x = 'ab' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60,
    "nested": "{% set x = [0] %}" + "{% set x = [x, x] %}" * 60 + "{{ x }}",
    "tuples": "{% set x = 0 %}" + "{% set x = (x, x) %}" * 60 + "{{ x|tojson }}",
    "centre": "{{ 'a'|center(10**11) }}",
    "indent": "{{ ('\n' * 9999)|indent(99999) }}",
    "method": "{{ 'a'.ljust(10**11) }}",
    "replace": "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
    "replaced": "{{ ('a' * 99999)|replace('a', 'b' * 99999) }}",
    "join": "{{ ('b' * 99999).join('a' * 99999) }}",
    "percent": "{{ '%99999999999d' % 1 }}",
    "format": "{{ '{:99999999999}'.format(1) }}",
    "format from outside": "{{ '{:{}}'.format(1, 10**11) }}",
    "printf": "{{ '%0*d'|format(10**11, 1) }}",
    "batch": "{{ [1]|batch(10**11, 0)|list }}",
    "tojson": "{{ [[[1]]]|tojson(indent=10**11) }}",
    "lipsum": "{{ lipsum(n=10**9) }}",
    "macro": "{% macro m(n) %}{{ m(n) }}{{ m(n) }}{% endmacro %}{{ m(1) }}",
    "recursive": "{% for x in [[1]] recursive %}{{ loop([x, x]) }}{% endfor %}",
    "deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "many blocks": "{% if 1 %}" * 2000 + "{% endif %}" * 2000,
    "long number": "{{ " + "9" * 9000 + " }}",
    "long": "x" * (2 << 20),
}
INSIDE = {
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__ }}",
    "filter": "{{ ''|attr('__class__')|attr('__mro__') }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "import": "{% import 'os' as os %}{{ os.getpid() }}",
    "include": "{% include '/etc/passwd' %}",
    "change": "{{ messages.append({'role': 'system', 'content': 'x'}) }}",
    "step": "{{ self.environment.extensions }}{{ environment.filters }}",
}


def _rendered(source):
    text = Template(source, {}, "a file").render(CHAT)
    assert len(text) < 1000, "a chat must not become that long"


@pytest.mark.parametrize("name", HUGE)
def test_a_template_without_end_comes_to_its_end(name):
    """Fault 48, security: a chat template that loops for ever or takes all memory.

    Promise: it is refused in a line within seconds, like any that does not fit.
    """
    began = time.monotonic()
    assert mutants.refused(_rendered, HUGE[name])
    assert time.monotonic() - began < mutants.SECONDS


@pytest.mark.parametrize("name", INSIDE)
def test_a_template_reaches_nothing_beyond_the_chat(name):
    said = mutants.refused(_rendered, INSIDE[name])
    assert "root:" not in said and "<class" not in said


def test_a_template_may_do_what_templates_do():
    source = (
        "{% set ns = namespace(n=0) %}{% for m in messages %}"
        "{% set ns.n = ns.n + 1 %}{{ '[' ~ m.role|upper ~ ']' }}"
        "{{ m['content'].replace('.', '!').strip() + ' ' }}"
        "{{ '%s' % ns.n }}{{ [ns.n, (1, 2)]|tojson(indent=1)|length }}"
        "{% set x %}a{{ m.role|center(12) }}{% endset %}{{ x|trim|length }}"
        "{% endfor %}{{ '{:,}'.format(1000000) }}{{ messages|map(attribute='role')|join"
        "(', ') }}{{ 5 % 3 }}{{ 2 ** 10 * 3 }}{{ [1] + [2] }}{{ 'é' * 3 }}"
    )
    assert Template(source, {}, "a file").render(CHAT) == (
        "[USER]Hi! 1229[ASSISTANT]Ho! 222111,000,000user, assistant23072[1, 2]ééé"
    )
