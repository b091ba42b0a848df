"""What a run takes from its base before any weight is read, and the base as a run."""

import copy
import json
import os
import subprocess
import sys

import pytest

from fm_jax import config as configs
from fm_jax import configfile
from fm_jax.errors import UserError
from fm_jax.hf import adopt, importing, vocabulary
from fm_jax.tokenizers import load as tokenizers
from tests.hf import made
from tests.hf.made import bring, edited


@pytest.fixture
def folder(tmp_path, model_config):
    made.checkpoint(tmp_path / "theirs", model_config())
    return tmp_path / "theirs"


@pytest.fixture
def run(folder, tmp_path):
    return bring(folder, tmp_path / "run").path


def asked(base, **sections):
    """Return a config's nested dict that begins from `base` with its model."""
    raw = configfile.load_base()
    raw["init"] |= {"from": str(base), "model": True}
    raw["train"]["steps"] = 3
    raw["data"]["max_length"] = 7
    for name, keys in sections.items():
        raw[name] |= keys
    return raw


def test_a_run_and_its_folder_give_the_same_model_and_tokenizer(
    folder, run, model_config
):
    models, texts = [], []
    for base in (run, f"{run}@0", folder):
        config = configs.check(adopt.adopted(asked(base)))
        models.append(config.model)
        text = tokenizers.load(config.data.tokenizer, end_token=config.data.end_token)
        texts.append((text.fingerprint, text.end_id))
    assert models[0] == models[1] == models[2]
    assert texts[0] == texts[1] == texts[2]
    config = model_config()
    assert models[0].vocab_size == config.vocab_size == 37
    assert models[0].head_dim == config.head_dim
    assert models[0].rope_theta == config.rope_theta
    record = json.loads((run / "config.json").read_text())
    assert texts[0] == (record["data"]["tokenizer"], record["data"]["end_id"])


def test_how_it_is_calculated_and_all_else_stays_the_users(run):
    own = {"dtype": "bfloat16", "residual_dtype": "bfloat16", "remat": "full",
           "remat_names": ("mixed",), "num_layers": 99}  # fmt: skip
    raw = asked(run, model=own, data={"tokenizer": "bytes", "on_long": "drop"})
    before = copy.deepcopy(raw)
    found = adopt.adopted(raw)
    assert raw == before
    changed = configfile.difference(before, found)
    assert {name: found["model"][name] for name in adopt.OWN} == {
        name: own[name] for name in adopt.OWN
    }
    assert found["model"]["num_layers"] == 3
    assert {key for key in changed if not key.startswith("model.")} == {
        "data.tokenizer", "data.end_token",
    }  # fmt: skip


@pytest.mark.parametrize("init", [{"model": False}, {"from": ""}])
def test_a_config_that_asks_for_no_model_stays_as_it_is(run, init):
    raw = asked(run, init=init)
    assert adopt.adopted(raw) is raw


def test_sources_that_bring_their_ids_keep_their_tokenizer(run):
    for source, tokenizer in (("store", "store"), ("synthetic", "symbols")):
        raw = asked(run, data={"source": source, "tokenizer": tokenizer})
        found = adopt.adopted(raw)
        assert found["data"] == raw["data"]
        assert found["model"]["vocab_size"] == 37


def test_a_run_with_bytes_gives_bytes(folder, tmp_path, model_config):
    made.checkpoint(tmp_path / "wide", model_config(vocab_size=320))
    run = bring(tmp_path / "wide", tmp_path / "bytes", "bytes").path
    data = adopt.adopted(asked(run))["data"]
    assert (data["tokenizer"], data["end_token"]) == ("bytes", "")


def test_the_base_of_a_store_is_told_by_the_id_that_ended_its_texts(run):
    edited(run, lambda r: r["config"]["data"].update(tokenizer="store", end_token=""))
    data = adopt.adopted(asked(run))["data"]
    text = tokenizers.load(data["tokenizer"], end_token=data["end_token"])
    assert text.end_id == 29


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere", "or a Hugging Face folder; got .*nowhere, which does not exist"),
        ("file", "or a Hugging Face folder; got .*file, a file"),
        (
            "empty",
            r"or a Hugging Face folder; a run must be a folder with config\.json",
        ),
    ],
)
def test_what_is_no_base_is_refused_in_one_line(tmp_path, name, said):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=said) as error:
        adopt.adopted(asked(tmp_path / name))
    assert "\n" not in str(error.value)


def test_a_folder_without_a_tokenizer_is_refused(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"must have a tokenizer, .*--tokenizer=FILE"):
        adopt.adopted(asked(folder))


def test_a_tokenizer_whose_end_cannot_be_named_is_refused(folder, monkeypatch):
    edited(folder, lambda config: config.update(eos_token_id=28))
    monkeypatch.setattr(vocabulary, "token", lambda spec, index: "")
    with pytest.raises(UserError, match="whose file says what ends a text"):
        adopt.adopted(asked(folder))


def test_a_folder_becomes_a_run_once_until_it_changes(folder, tmp_path, monkeypatch):
    cache, said = tmp_path / "cache", []
    made_run = adopt.as_run(folder, cache, said.append)
    assert made_run.parent == cache / "imported"
    assert said[0].startswith("Reading ")
    bringing = importing.bring
    monkeypatch.setattr(importing, "bring", None)
    assert adopt.as_run(folder, cache, said.append) == made_run
    assert adopt.as_run(made_run, cache, said.append) == made_run
    monkeypatch.setattr(importing, "bring", bringing)
    weights = folder / "model.safetensors"
    os.utime(weights, ns=(1, 1))
    assert adopt.as_run(folder, cache, said.append) != made_run


def test_what_came_beside_the_weights_is_carried_on_without_them(run, tmp_path):
    (run / "chat_template.jinja").write_text("{{ messages }}")
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    adopt.carry(run, tuned)
    kept = {p.name: p.read_bytes() for p in (run / "hf").iterdir()}
    assert {p.name: p.read_bytes() for p in (tuned / "hf").iterdir()} == kept
    assert {p.name for p in tuned.iterdir()} == {"hf", "chat_template.jinja"}
    other = tmp_path / "other"
    other.mkdir()
    adopt.carry(tmp_path / "theirs", other)
    assert not list(other.iterdir())


def test_every_command_with_a_config_sees_the_base(run, folder, cpu_environment):
    command = [sys.executable, "-m", "fm_jax.cli", "config",
               "--config=configs/base.py", "--config.train.steps=1",
               "--config.data.max_length=7", "--config.init.model=True"]  # fmt: skip

    def done(base):
        return subprocess.run(
            [*command, f"--config.init.from={base}"],
            capture_output=True, text=True, check=False, env=cpu_environment,
        )  # fmt: skip

    shown = done(folder)
    assert shown.returncode == 0, shown.stderr
    assert "model.vocab_size = 37\n" in shown.stdout
    assert f"data.tokenizer = '{folder}/tokenizer.json'\n" in shown.stdout
    missing = done("nowhere")
    assert missing.returncode == 2
    assert missing.stderr.count("\n") == 1
