"""Tests of what fm classify reads and prints, against each text by itself."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

from fm_jax import config as configs
from fm_jax import configfile
from fm_jax import flags as parsing
from fm_jax.checkpoints import Checkpoints
from fm_jax.commands import listed, verdicts
from fm_jax.errors import UserError
from fm_jax.finetune import answers
from fm_jax.runs import Run
from fm_jax.tokenizers.plain import ByteTokenizer
from fm_jax.train import restore
from tests.models import reference

LABELS = ("bad", "fair", "good")
WORDS = (98, 102, 103)  # ids of bytes that stand for them
LENGTH = 50  # data.max_length
TEXTS = ("What a film!", "", "The cat sat on the mat and saw", "dull", "ü" * 13)
MODEL = {
    "max_length": LENGTH, "num_layers": 1, "embed_dim": 12, "num_heads": 2,
    "num_kv_heads": 1, "head_dim": 6, "mlp_dim": 20, "dtype": "float32",
    "tied_embeddings": True, "positions": "learned", "logits_softcap": 3.0,
    "vocab_size": 261,
}  # fmt: skip


def _write(path, random_params, *, label_ids=(), model=MODEL, **data):
    """Write a run that nobody trained; return its folder and its weights."""
    run, raw = Run(path), configfile.load_base()
    raw["model"] |= model
    raw["train"]["steps"] = 1
    raw["data"] |= {
        "max_length": LENGTH, "examples": "classify", "prompt": "Film: {text} So",
        "source": "text", "paths": ["films.jsonl"], "packing": "best_fit",
    } | data  # fmt: skip
    said = {"labels": list(LABELS), "label_ids": list(label_ids)}
    built = answers.model(configs.check(raw).model, answers.Answers(LABELS, label_ids))
    params = random_params(built.abstract)
    saved = Checkpoints(run.checkpoints, writes=True)
    saved.save(7, {"params": jax.device_put(params)}, None)
    saved.close()
    run.begin()
    run.write("tokenizer.json", ByteTokenizer().to_json())
    model = dataclasses.asdict(configs.check(raw).model)
    run.write_config({
        "config": raw, "changed_from_base": {}, "resolved": {"model": model},
        "data": {"end_id": 256, "train_store": "", "eval_store": "", "end_ids": [256],
                 "begin_ids": [256]} | said, "history": [],
    })  # fmt: skip
    return run.path, params


@pytest.fixture(scope="session")
def classifier(tmp_path_factory, random_params):
    """Return a run with a head of classes, and its weights."""
    return _write(tmp_path_factory.mktemp("verdicts") / "tiny", random_params)


def _alone(config, head, params, text):
    """Return the probabilities of a text that is read by itself, in float64.

    head: f(logits of the last token's place, its hidden state) -> logits of classes.
    """
    ids = np.array([[256, *f"Film: {text} So".encode()]])
    positions = np.arange(ids.shape[1])[None]
    logits = head(config, params, ids, positions)
    shares = np.exp(logits - logits.max())
    return dict(zip(LABELS, shares / shares.sum(), strict=True))


def _classes(config, params, ids, positions):
    """Return logits of a head of its own: the reference's of another vocabulary."""
    config = dataclasses.replace(
        config, tied_embeddings=False, biases=("head",), logits_softcap=0.0
    )
    head = params["classifier"]
    params = params | {"head": head["kernel"], "head_bias": head["bias"]}
    del params["classifier"]
    ones = np.ones_like(ids)
    return reference.logits(config, params, ids, positions, ones)[0, -1]


def _words(config, params, ids, positions):
    ones = np.ones_like(ids)
    return reference.logits(config, params, ids, positions, ones)[0, -1, list(WORDS)]


def _assert_close(found, expected):
    assert [v.text for v in found] == list(expected)
    for verdict in found:
        for label, value in expected[verdict.text].items():
            assert verdict.probabilities[label] == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize("kind", ["classes", "words"])
def test_each_text_has_the_probabilities_that_it_has_by_itself(
    kind, classifier, tmp_path, random_params
):
    path, params = classifier
    head = _classes
    if kind == "words":
        path, params = _write(tmp_path / "words", random_params, label_ids=WORDS)
        head = _words
    held = restore.load(path)
    expected = {t: _alone(held.config.model, head, params, t) for t in TEXTS}
    found = verdicts.of(held, TEXTS)
    _assert_close(found, expected)
    assert len({v.label for v in found}) > 1
    assert not any(v.is_cut for v in found)
    # More texts than are read together, of all lengths, in whatever order.
    many = [text for text in TEXTS for _ in range(9)][::-1]
    assert [v.text for v in verdicts.of(held, many)] == many
    for verdict in verdicts.of(held, many):
        expected = found[TEXTS.index(verdict.text)].probabilities
        assert verdict.probabilities == pytest.approx(expected, abs=1e-5)


def test_experts_that_others_fill_change_no_verdict(tmp_path, random_params):
    model = MODEL | {
        "num_experts": 3, "num_experts_per_token": 1, "expert_capacity": 0.5
    }  # fmt: skip
    path, params = _write(tmp_path / "experts", random_params, model=model)
    held = restore.load(path)
    expected = {t: _alone(held.config.model, _classes, params, t) for t in TEXTS}
    _assert_close(verdicts.of(held, TEXTS), expected)


def test_a_text_longer_than_a_row_loses_its_end_and_not_the_prompts(classifier):
    path, params = classifier
    held = restore.load(path)
    (found,) = verdicts.of(held, ["abcdefg " * 9])
    room = LENGTH - 1 - len("Film:  So")
    cut = ("abcdefg " * 9)[:room]
    expected = _alone(held.config.model, _classes, params, cut)
    assert found.is_cut
    assert found.text == "abcdefg " * 9
    assert found.probabilities == pytest.approx(expected, abs=1e-5)


def _flags(path, **given):
    flags = {n: d for n, (d, _) in listed.COMMANDS["classify"].flags.items()}
    return parsing.Parsed(flags | {"run": str(path)} | given, [], "")


def test_the_command_prints_labels_and_probabilities(classifier, capsys):
    path, _ = classifier
    verdicts.run(_flags(path, text=("dull", "one\ntwo " + "x" * 80)))
    printed = capsys.readouterr()
    first, second = printed.out.splitlines()
    label, probability, text = first.split("\t")
    assert label in LABELS
    assert 1 / 3 < float(probability) < 1
    assert text == "dull"
    assert second.endswith("\tone two " + "x" * 49 + "...")
    assert "fm: text 2 is longer than data.max_length" in printed.err


def test_json_has_the_probability_of_each_label(classifier, capsys):
    path, _ = classifier
    verdicts.run(_flags(path, text=("dull", "ü"), json=True))
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["text"] for row in rows] == ["dull", "ü"]
    for row in rows:
        assert list(row["probabilities"]) == list(LABELS)
        assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert row["probability"] == max(row["probabilities"].values())
        assert row["probabilities"][row["label"]] == row["probability"]
        assert row["cut"] is False


def test_texts_are_those_of_flags_and_of_a_file(tmp_path):
    plain, objects = tmp_path / "texts.txt", tmp_path / "texts.jsonl"
    plain.write_bytes("one\r\n\ntwo, \u2028ü\n".encode())
    objects.write_text('{"said": "a\\nb", "label": 1}\n{"said": ""}\n')
    assert verdicts.read_texts(("x", ""), "", "said") == ["x", ""]
    assert verdicts.read_texts(("x",), str(plain), "") == ["x", "one", "two, \u2028ü"]
    assert verdicts.read_texts((), str(objects), "said") == ["a\nb", ""]


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("a.jsonl", "plain", "a.jsonl:1 must be JSON; got 'plain'"),
        ("a.jsonl", '{"text": "x"}\n{"said": "b"}', "a.jsonl:2 must be an object with"),
        ("a.txt", "\n \n", "--text or --input must give a text; got none"),
        (None, "", r"--input must be a file of UTF-8 text; got .*No such file"),
    ],
)
def test_a_file_of_something_else_is_refused(name, content, said, tmp_path):
    path = tmp_path / (name or "none.txt")
    if name:
        pathlib.Path(path).write_text(content)
    with pytest.raises(UserError, match=said):
        verdicts.read_texts((), str(path), "text")


def test_a_run_that_classifies_nothing_is_refused(classifier, tmp_path):
    path, _ = classifier
    record = json.loads((path / "config.json").read_text())
    del record["data"]["labels"], record["data"]["label_ids"]
    Run(tmp_path).begin()
    (tmp_path / "config.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"was tuned to classify; got .*examples=class"):
        verdicts.run(_flags(tmp_path, text=("a",)))


def test_a_classifier_is_refused_where_text_is_to_be_written(classifier):
    path, _ = classifier
    from fm_jax.generation import batch
    from fm_jax.generation.request import Request

    held = restore.load(path)
    with pytest.raises(UserError, match=r"write text; got a classifier's\. Use fm"):
        batch.generate(
            held.model,
            held.params,
            [Request((1, 2), 3)],
            decode=held.tokenizer.decode,
            layout=held.layout,
        )
