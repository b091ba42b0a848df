"""Secrets of the environment and of URLs are in nothing that is written or printed."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from fm_jax import config as configs
from fm_jax import configfile, machine, redact
from tests.security import mutants

ROOT = pathlib.Path(__file__).parents[2]
ENVIRON = {
    "HF_TOKEN": "hf_AbCdEfGhIjKlMnOpQrStUvWxYz012345",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "AWS_ACCESS_KEY_ID": "AKIAQWERTYUIOPASDFGH",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYzzEXAMPLEK",
    "AWS_SESSION_TOKEN": "FwoGZXIvYXdzEBYaDExampleSessionToken",
    "FM_API_KEY": "served-by-this-key-alone",
    "MY_DATABASE_PASSWORD": "correct horse battery",
}
HELD = tuple(ENVIRON.values())
TEXTS = ["the cat sat on a mat and saw another run " * 4 + str(n) for n in range(12)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Return the flags of a run of a few steps."""
    corpus = tmp_path_factory.mktemp("corpus")
    for number, text in enumerate(TEXTS):
        (corpus / f"{number}.txt").write_text(text)
    return [
        f"--config={ROOT}/configs/quickstart.py",
        "--config.data.source=text",
        f"--config.data.paths=('{corpus}',)",
        "--config.data.eval_fraction=0.3",
        "--config.data.tokenizer=bytes",
        "--config.data.max_length=16",
        f"--config.data.cache_dir={tmp_path_factory.mktemp('cache')}",
        "--config.model.num_layers=1",
        "--config.model.num_heads=2",
        "--config.model.embed_dim=8",
        "--config.model.mlp_dim=12",
        "--config.model.dtype=float32",
        "--config.train.batch_size=4",
        "--config.train.steps=2",
        "--config.eval.batch_size=4",
        "--config.eval.max_batches=1",
        "--config.sample.num_tokens=4",
    ]


def _fm(*words):
    environ = os.environ | ENVIRON | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    environ["JAX_COMPILATION_CACHE_DIR"] = str(ROOT / ".pytest_cache" / "jax")
    return subprocess.run(
        [sys.executable, "-m", "fm_jax.cli", *map(str, words)],
        env=environ,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def _holding(folder, secrets):
    """Return the files of a folder that have any of the secrets in them."""
    return [
        (file.name, secret)
        for file in folder.rglob("*")
        if file.is_file()
        for secret in secrets
        if secret.encode() in file.read_bytes()
    ]


def test_a_run_keeps_no_secret(tiny, tmp_path):
    """Fault 50, security: tokens and keys in the environment and on the command line.

    Promise: no file of a run and nothing printed has one; the history leaves them out.
    """
    # As people do who do not know better: a token in a value that is free text.
    prompt = f"--config.sample.prompt=the {ENVIRON['HF_TOKEN']}"
    workdir = tmp_path / "run"
    done = _fm("train", *tiny, f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    assert _holding(workdir, HELD) == []
    assert not any(secret in done.stdout + done.stderr for secret in HELD)
    for words in (["report", workdir], ["config", f"--config={workdir}"]):
        said = _fm(*words)
        assert said.returncode == 0, said.stderr
        assert not any(secret in said.stdout + said.stderr for secret in HELD)
    assert _holding(workdir, HELD) == []
    record = json.loads((workdir / "config.json").read_text())
    words = record["history"][0]["command"]
    assert "--config.train.steps=2" in words and f"--workdir={workdir}" in words
    assert machine.started([prompt])["command"] == [
        f"--config.sample.prompt=the {redact.LEFT_OUT}"
    ]


@pytest.mark.parametrize(
    ("url", "secret"),
    [
        ("https://me:swordfish@example.org/a.txt", "swordfish"),
        ("https://ghp_0123456789abcdefghij@example.org/a.txt", "ghp_0123456789"),
        ("s3://key:swordfish@bucket/a.txt", "swordfish"),
        ("https://example.org/a.txt?token=swordfish", "swordfish"),
        ("https://example.org/a.txt?x=1&X-Amz-Signature=swordfish", "swordfish"),
        ("https://example.org/a.txt?sig=swordfish", "swordfish"),
        ("https://example.org/a.txt?api_key=swordfish", "swordfish"),
    ],
)
@pytest.mark.parametrize("key", ["data.paths", "data.eval_paths"])
def test_a_secret_in_a_url_is_refused_before_anything_is_written(
    tmp_path, monkeypatch, url, secret, key
):
    monkeypatch.chdir(tmp_path)
    raw = configfile.load_base()
    raw["train"]["steps"] = 3
    section, name = key.split(".")
    raw[section][name] = ("a.txt", url)
    said = mutants.refused(configs.check, raw)
    assert f"config.{key} must have no password or key in a URL" in said
    assert secret not in said
    assert not list(tmp_path.iterdir())


def test_a_refused_secret_is_not_printed(tiny, tmp_path):
    url = "https://me:swordfish@example.org/a.txt"
    done = _fm("train", *tiny, f"--config.data.paths=('{url}',)", "--workdir=run")
    assert done.returncode == 2
    assert "swordfish" not in done.stdout + done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "url",
    [
        "https://example.org/a.txt",
        "https://example.org/a.txt?page=3&tokens=5&tokenizer=b",
        "s3://bucket/a@b/c.txt",
        "abfs://container@account.dfs.core.windows.net/a.txt",
        "hf://datasets/me/mine@main/a.txt",
        "gs://bucket/a:b@c.txt",
        "/home/me/a@b:c.txt",
    ],
)
def test_a_url_without_a_secret_is_taken(url):
    assert not redact.in_url(url)


@pytest.mark.parametrize(
    ("word", "kept"),
    [
        ("--config.data.end_token=<|end|>", None),
        ("--special_token=<|im|>", None),
        ("--config.train.tokens=100", None),
        ("--config.train.tokens_per_param=20", None),
        ("--config.data.tokenizer=bytes", None),
        ("--num_tokens=5", None),
        ("--workdir=runs/a", None),
        ("--config.sample.prompt=def f(x): return x", None),
        ("--config.data.paths=('https://example.org/a.txt',)", None),
        ("--hf_token=anything", f"--hf_token={redact.LEFT_OUT}"),
        ("token=anything", f"token={redact.LEFT_OUT}"),
        ("--api-key=anything", f"--api-key={redact.LEFT_OUT}"),
        ("--x.password=a b", f"--x.password={redact.LEFT_OUT}"),
        ("https://a:b@c.org/d", f"https://{redact.LEFT_OUT}@c.org/d"),
        ("('https://a:b@c/d',)", f"('https://{redact.LEFT_OUT}@c/d',)"),
        ("https://c.org/d?a=1&token=b", f"https://c.org/d?a=1&token={redact.LEFT_OUT}"),
        ("x sk-abcdefghijklmnopqrstuv y", f"x {redact.LEFT_OUT} y"),
        ("AKIAQWERTYUIOPASDFGH", redact.LEFT_OUT),
    ],
)
def test_words_of_a_command_are_kept_without_secrets(word, kept):
    assert redact.words([word], {}) == [word if kept is None else kept]


def test_what_the_environment_calls_a_secret_is_left_out_wherever_it_stands():
    for name, value in ENVIRON.items():
        assert redact.words([f"a={value}b"], {name: value}) == [f"a={redact.LEFT_OUT}b"]
    plain = {"HOME": "/home/me", "TOKENIZERS_PARALLELISM": "perhaps so",
             "HF_TOKEN_PATH": "/home/me/token", "SHORT_TOKEN": "a"}  # fmt: skip
    words = ["--workdir=/home/me/a", "perhaps so", "/home/me/token"]
    assert redact.words(words, plain) == words


def test_no_key_of_a_config_is_for_a_secret():
    names = configfile.flat(configfile.load_base())
    odd = {name for name in names if redact.VARIABLE.search(name.upper())}
    assert odd == {"data.end_token", "model.num_experts_per_token"}  # of text
