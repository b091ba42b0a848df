"""Tests of the tokenizer in a file: known by its content, refused where it is none."""

import json

import pytest

from fm_jax.tokenizers import load as loading
from fm_jax.tokenizers.jsonfile import JsonTokenizer
from fm_jax.tokenizers.plain import ByteTokenizer
from fm_jax.tokenizers.ranks import RanksTokenizer
from fm_jax.tokenizers.sentence import SentencePieceTokenizer
from tests.tokenizers import made
from tests.tokenizers.made import refusal

DESCRIBED = {"pattern": made.splits.GPT2, "special_tokens": {"<|endoftext|>": 0}}


@pytest.mark.parametrize("name", ["a.model", "b.json", "c", "d.tiktoken"])
def test_a_file_is_known_by_its_content_whatever_it_is_called(name, tmp_path):
    path = tmp_path / name
    described = path.with_suffix(".json")
    contents = [
        (made.BPE.to_json().encode(), JsonTokenizer),
        (made.BYTES.to_json().encode(), ByteTokenizer),
        (b"\n " + made.BYTES.to_json().encode(), ByteTokenizer),
        (made.sentence_model(), SentencePieceTokenizer),
    ]
    for raw, kind in contents:
        path.write_bytes(raw)
        assert type(loading.load(path)) is kind
    if described != path:
        path.write_bytes(made.rank_lines(made.ranks_of(made.BPE)))
        described.write_text(json.dumps(DESCRIBED))
        assert type(loading.load(str(path))) is RanksTokenizer


def test_a_missing_tokenizer_file_is_refused(tmp_path):
    path = tmp_path / "none.json"
    assert refusal(loading.load, path) == (
        "data.tokenizer must be bytes, bpe or the path of a tokenizer.json, "
        f"SentencePiece .model or .tiktoken file; got '{path}' (No such file "
        "or directory)."
    )


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"{not json", "Expecting property name enclosed in double quotes: line 1"),
        (b"not json", "its beginning is that of none of them)."),
        (b"[1, 2]", "its beginning is that of none of them)."),
        (b"\xff\xfe", "its beginning is that of none of them)."),
        (b"", "its beginning is that of none of them)."),
        (b'{"model": {}}', ""),
        (json.dumps({"vocab_size": 12}).encode(), ""),
        (json.dumps({"fm_jax_tokenizer": "sentencepiece"}).encode(), "'end_id')."),
        (made.sentence_model()[:500], ""),
    ],
)
def test_a_file_that_is_not_a_tokenizer_is_refused(raw, reason, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(raw)
    message = refusal(loading.load, path)
    assert message.startswith(
        "tokenizer file must be a tokenizer.json, a SentencePiece .model or a "
        f".tiktoken file; got '{path}' ({reason}"
    )
    assert message.endswith(").")
    assert "\n" not in message
