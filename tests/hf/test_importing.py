"""A checkpoint folder becomes a run: the same numbers, or one line and nothing left."""

import json

import jax
import numpy as np
import pytest

from fm_jax import config as configs
from fm_jax import configfile
from fm_jax.errors import UserError
from fm_jax.hf import families, importing, parity
from fm_jax.models import zoo
from fm_jax.tokenizers import load, plain
from fm_jax.train import restore
from tests.hf import made
from tests.hf.made import bring, edited


def resaved(folder, change):
    """Change the tensors of a folder."""
    tensors = made.load(folder)
    change(tensors)
    made.save(folder / "model.safetensors", tensors)


@pytest.fixture
def folder(tmp_path, model_config):
    made.checkpoint(tmp_path / "hf", model_config())
    return tmp_path / "hf"


@pytest.mark.parametrize(
    ("fields", "kinds", "files"),
    [
        ({}, ("BF16", "F32"), 3),
        (made.GPT2, ("F16",), 1),
        (made.MIXTRAL, ("F32",), 2),
    ],
    ids=["llama", "gpt2", "mixtral"],
)  # fmt: skip
def test_a_run_has_every_number_of_the_folder(
    tmp_path, model_config, fields, kinds, files
):
    config = model_config(**fields)
    tensors = made.checkpoint(tmp_path / "hf", config, kinds=kinds, files=files)
    run = bring(tmp_path / "hf", tmp_path / "run")
    family = families.read(json.loads((tmp_path / "hf" / "config.json").read_text()))[0]
    held = restore.load(run.path)
    assert held.step == 0
    written = parity.write(
        family, held.model.config, jax.tree.map(np.asarray, held.params)
    )
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(written[name], tensor.astype(np.float32))


def test_a_run_says_of_itself_what_others_read(folder, tmp_path, model_config):
    run = bring(folder, tmp_path / "run")
    record = configfile.read_run(run)
    config = configs.check(record["config"])
    text = load.load(run.path / "tokenizer.json", end_token=config.data.end_token)
    assert text.fingerprint == record["data"]["tokenizer"]
    assert (text.end_id, record["data"]["end_id"]) == (29, 29)
    assert config.model.max_length == model_config().max_length == 11
    assert config.data.max_length == 11
    assert record["resolved"]["run_id"].startswith("run-")
    assert record["resolved"]["params"]["total"] == sum(
        leaf.size for leaf in jax.tree.leaves(zoo.build(config.model).abstract)
    )
    assert (run.path / "DONE").exists()
    assert (run.path / "hf" / "config.json").exists()
    assert (run.path / "hf" / "tokenizer_config.json").exists()


def test_what_means_nothing_is_left_out_and_said(folder, tmp_path):
    extra = {"model.layers.1.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)}
    resaved(folder, lambda tensors: tensors.update(extra))
    said = []
    importing.bring(folder, tmp_path / "run", tokenizer="", command=[], say=said.append)
    assert said[-1] == "Left out 1 tensors that llama makes by itself"


def test_one_weight_under_two_names_must_be_the_same(tmp_path, model_config):
    config = model_config(tied_embeddings=True)
    made.checkpoint(tmp_path / "hf", config)
    table = made.load(tmp_path / "hf")["model.embed_tokens.weight"]
    resaved(tmp_path / "hf", lambda x: x.update({"lm_head.weight": table}))
    bring(tmp_path / "hf", tmp_path / "run")
    resaved(tmp_path / "hf", lambda x: x.update({"lm_head.weight": table + 1}))
    with pytest.raises(UserError, match=r"lm_head\.weight.* must be the same"):
        bring(tmp_path / "hf", tmp_path / "other")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.update(model_type="t5"), "model_type.*'t5'.*Known:.*llama"),
        (lambda c: c.update(new_trick=1), "key of llama's config.json.*'new_trick'"),
        (lambda c: c.pop("hidden_size"), "config.json must have hidden_size"),
        (lambda c: c.update(intermediate_size=21),
         r"tensor 'model\.layers\.0\.mlp\..*\[21, 12\]; got \[20, 12\]"),
        (lambda c: c.update(num_hidden_layers=4),
         r"every weight .* got no 'model\.layers\.3\..* and 6 more in"),
        (lambda c: c.update(num_hidden_layers=2),
         r"no weights besides .* got 'model\.layers\.2\..* and 6 more in"),
        (lambda c: c.update(vocab_size=20), r"the tokenizer's ids; got 20 for 30 ids"),
        (lambda c: c.update(quantization_config={"quant_method": "mxfp4"}),
         "quantization_config must be null"),
    ],
)  # fmt: skip
def test_a_config_that_is_not_the_weights_is_refused(folder, tmp_path, change, said):
    edited(folder, change)
    with pytest.raises(UserError, match=said) as error:
        bring(folder, tmp_path / "run")
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize(
    ("name", "weight", "said"),
    [("model.norm.weight_scale_inv", np.ones(3, np.uint8), "U8, a quantised"),
     ("model.norm.weight", np.ones(12), "got F64")],
)  # fmt: skip
def test_weights_of_another_dtype_are_refused(folder, tmp_path, name, weight, said):
    resaved(folder, lambda tensors: tensors.update({name: weight}))
    with pytest.raises(UserError, match=said):
        bring(folder, tmp_path / "run")


@pytest.mark.parametrize("text", ["{", "[]", None])
def test_a_config_that_cannot_be_read_is_refused(folder, tmp_path, text):
    (folder / "config.json").unlink()
    if text:
        (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json must (be a JSON|hold a JSON)"):
        bring(folder, tmp_path / "run")


def test_a_tokenizer_may_be_given_and_must_be_there(tmp_path, model_config):
    folder = tmp_path / "hf"
    made.checkpoint(folder, model_config(vocab_size=320))
    kept = (folder / "tokenizer.json").rename(tmp_path / "kept.json")
    with pytest.raises(UserError, match=r"got neither .*--tokenizer=bytes"):
        bring(folder, tmp_path / "none")
    bring(folder, tmp_path / "bytes", "bytes")
    record = json.loads((tmp_path / "bytes" / "config.json").read_text())
    assert record["data"]["tokenizer"] == plain.ByteTokenizer().fingerprint
    assert record["config"]["data"]["tokenizer"] == "bytes"
    bring(folder, tmp_path / "given", str(kept))
    assert restore.load(tmp_path / "given").tokenizer.vocab_size == 30


def test_a_given_tokenizer_that_is_no_file_is_refused(folder, tmp_path):
    with pytest.raises(UserError) as error:
        bring(folder, tmp_path / "run", "bpe")
    assert str(error.value) == "--tokenizer must be a file or bytes; got 'bpe'."


def test_a_given_tokenizer_ends_a_document_as_the_folder_says(folder, tmp_path):
    kept = (folder / "tokenizer.json").rename(tmp_path / "kept.json")
    kept.write_text(kept.read_text().replace("<|endoftext|>", "<fin>"))
    run = bring(folder, tmp_path / "run", str(kept))
    assert restore.load(run.path).tokenizer.end_id == 29
    record = json.loads((run.path / "config.json").read_text())
    assert record["config"]["data"]["end_token"] == "<fin>"


def test_the_end_of_a_document_is_what_the_folder_says(tmp_path, model_config):
    folder = tmp_path / "hf"
    made.checkpoint(folder, model_config())
    edited(folder, lambda c: c.update(eos_token_id=[28, 29], bos_token_id=7))
    run = bring(folder, tmp_path / "run")
    record = json.loads((run.path / "config.json").read_text())
    assert (record["data"]["end_id"], record["data"]["begin_id"]) == (28, 7)
    token = record["config"]["data"]["end_token"]
    text = load.load(run.path / "tokenizer.json", end_token=token)
    assert text.fingerprint == record["data"]["tokenizer"]


def test_a_run_is_not_imported_over(folder, tmp_path):
    bring(folder, tmp_path / "run")
    before = (tmp_path / "run" / "config.json").read_text()
    with pytest.raises(UserError, match="--out must be a new or an empty folder"):
        bring(folder, tmp_path / "run")
    assert (tmp_path / "run" / "config.json").read_text() == before


def test_an_import_that_stops_half_way_leaves_nothing_that_reads_as_a_run(
    folder, tmp_path, monkeypatch
):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(importing, "_record", stop)
    with pytest.raises(KeyboardInterrupt):
        bring(folder, tmp_path / "run")
    assert sorted(tmp_path.iterdir()) == [folder]


def test_an_imported_run_has_no_text_to_be_evaluated_on(folder, tmp_path):
    run = bring(folder, tmp_path / "run")
    with pytest.raises(UserError, match=r"held-out text .* imported without any data"):
        restore.evaluate(run.path)


def test_what_no_checkpoint_of_theirs_has_gets_its_value(tmp_path, model_config):
    config = model_config(**made.MIXTRAL)
    made.checkpoint(tmp_path / "hf", config)
    held = restore.load(bring(tmp_path / "hf", tmp_path / "run").path)
    np.testing.assert_array_equal(
        held.params["blocks"]["mlp"]["balance"], np.zeros((3, 3))
    )
