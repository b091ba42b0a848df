"""Tests of how text becomes the ids that the engine is asked to go on from."""

import dataclasses
import json

import pytest

from fm_jax.serve import requests
from fm_jax.serve.refused import Refused
from fm_jax.serve.served import Served
from fm_jax.tokenizers.plain import ByteTokenizer, SymbolTokenizer
from fm_jax.tokenizers.protocol import Tokenizer
from fm_jax.tokenizers.special import special_encoder


def _served(tokenizer: Tokenizer | None = None, **changes) -> Served:
    tokenizer = tokenizer or ByteTokenizer()
    served = Served(
        name="m", created=0, capacity=20, vocab_size=tokenizer.vocab_size,
        tokenizer=tokenizer, encode_special=special_encoder(tokenizer), template=None,
        begin_ids=(tokenizer.end_id,), chat_begin_ids=(tokenizer.end_id,),
        end_ids=(tokenizer.end_id, 3),
    )  # fmt: skip
    return dataclasses.replace(served, **changes)


def _asked(**fields):
    body = {"model": "m", "prompt": "abc"} | fields
    return requests.completion(json.dumps(body).encode())


def test_a_text_begins_as_the_model_has_seen_it():
    (request,) = _served().requests(_asked())
    assert request.prompt == (256, *b"abc")
    assert request.end_ids == (256, 3)
    (request,) = _served(begin_ids=(7, 8)).requests(_asked())
    assert request.prompt == (7, 8, *b"abc")
    (request,) = _served().requests(_asked(prompt=[5, 6]))
    assert request.prompt == (5, 6)  # ids are taken as they are
    (request,) = _served().requests(_asked(prompt=""))
    assert request.prompt == (256,)
    with pytest.raises(Refused, match="prompt must have at least one token"):
        _served(begin_ids=()).requests(_asked(prompt=""))


def test_a_chat_begins_once():
    class Says:
        def render(self, messages, values):
            return messages[0]["content"]

    def ids(text, **changes):
        body = {"model": "m", "messages": [{"role": "user", "content": text}]}
        asked = requests.chat(json.dumps(body).encode())
        return _served(template=Says(), **changes).requests(asked)[0].prompt

    assert ids("ab") == (256, *b"ab")
    assert ids("ab", chat_begin_ids=(97,)) == (*b"ab",)


def test_new_tokens_are_those_asked_for_or_what_is_left():
    def count(**fields):
        return _served().requests(_asked(**fields))[0].num_tokens

    assert count(max_tokens=5) == 5
    assert count() == 16
    assert count(prompt="x" * 10) == 20 - 11
    assert count(max_tokens=16) == 16
    with pytest.raises(Refused, match="context of 20 tokens; got 4 of prompt and max"):
        count(max_tokens=17)
    with pytest.raises(Refused, match=r"got 20 of prompt\. Shorten") as caught:
        count(prompt="x" * 19)
    assert caught.value.code == "context_length_exceeded"


def test_samples_count_from_nought_for_each_prompt():
    found = _served().requests(_asked(prompt=["a", "b"], n=2, seed=-1))
    assert [(r.prompt[1], r.sample) for r in found] == [
        (97, 0), (97, 1), (98, 0), (98, 1)
    ]  # fmt: skip
    assert {r.seed for r in found} == {2**32 - 1}
    drawn = {r.seed for _ in range(9) for r in _served().requests(_asked(n=2))}
    assert len(drawn) == 9  # one for each request, all its samples together


def test_echoes_stand_before_their_choices():
    served = _served()
    assert served.echoes(_asked(n=2)) == ["", ""]
    found = served.echoes(_asked(prompt=["a", "b"], n=2, echo=True))
    assert found == ["a", "a", "b", "b"]
    assert served.echoes(_asked(prompt=[[256, 97]], echo=True)) == ["a"]


def test_a_token_without_text_is_named_by_its_number():
    assert _served().token(97) == ("a", b"a")
    assert _served().token(0xC3) == ("\ufffd", b"\xc3")
    assert _served().token(256) == ("token_id:256", b"")


def test_text_that_has_no_ids_is_refused():
    with pytest.raises(Refused, match="text must be of the 5 symbols") as caught:
        _served(SymbolTokenizer(5)).requests(_asked(prompt="Z"))
    assert (caught.value.status, caught.value.param) == (400, "prompt")


def test_another_name_is_refused():
    with pytest.raises(Refused, match="model must be 'm', which is served") as caught:
        _served().requests(_asked(model="n"))
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")
