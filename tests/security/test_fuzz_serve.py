"""Requests of strangers: refused in the words of the API, or asked for as they say."""

import json

import pytest
from hypothesis import given

from fm_jax.serve import requests
from fm_jax.serve.refused import Refused
from tests.security import mutants

SHARED = {
    "model": "mine",
    "max_tokens": 7,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "seed": 3,
    "n": 2,
    "stop": ["a", "\n"],
    "stream": True,
    "stream_options": {"include_usage": True},
    "user": "me",
}
COMPLETION = SHARED | {"prompt": ["one", "two"], "echo": False, "logprobs": 3}
MESSAGES = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "name": "a", "content": [{"type": "text", "text": "Hello"}]},
]
CHAT = SHARED | {
    "messages": MESSAGES,
    "logprobs": True,
    "top_logprobs": 2,
    "chat_template_kwargs": {"date": "now"},
    "response_format": {"type": "text"},
}


def _check(parse, body):
    said = mutants.refused(parse, body, errors=Refused)
    if not said:
        asked = parse(body)
        assert 1 <= asked.num_choices <= requests.MAX_CHOICES
        assert 0 <= asked.sampling.temperature <= 2
        assert 0 < asked.sampling.top_p <= 1
    return said


@pytest.mark.parametrize(
    ("parse", "valid"), [(requests.completion, COMPLETION), (requests.chat, CHAT)]
)
def test_a_request_that_is_right_is_taken(parse, valid):
    assert parse(json.dumps(valid).encode()).model == "mine"


@mutants.cases(1000)
@given(body=mutants.of_json(COMPLETION))
def test_any_completion_is_taken_or_refused(body):
    _check(requests.completion, body)


@mutants.cases(1000)
@given(body=mutants.of_json(CHAT))
def test_any_chat_is_taken_or_refused(body):
    _check(requests.chat, body)


@mutants.cases(300)
@given(body=mutants.of_json(CHAT))
def test_a_refusal_is_json_that_any_client_reads(body):
    try:
        requests.chat(body)
    except Refused as error:
        text = json.dumps(error.body())
        assert len(text) < 1000
        text.encode()
