"""A study of real runs: what they write is what the study reads."""

import json
import types

import pytest

from fm_jax import config as configs
from fm_jax import configfile
from fm_jax.prepare import toys
from fm_jax.runs import Run
from fm_jax.train import run
from fm_jax.transfer import command

CONFIGS = configfile.BASE.parent


def _small(name, tmp_path, **data):
    raw = configfile.load(str(CONFIGS / name)).to_dict()
    raw["data"] |= {"cache_dir": str(tmp_path / "cache"), "max_length": 64, **data}
    raw["train"] |= {"steps": 3, "batch_size": 8, "compile_cache": ""}
    raw["eval"] |= {"batch_size": 8, "max_batches": 2}
    return raw


@pytest.mark.slow
def test_what_runs_write_is_what_the_study_reads(tmp_path, capsys):
    made = toys.styles(
        tmp_path / "data", num_pretrain=300, num_train=60, num_held_out=40
    )
    base = _small("toy_pretrain.py", tmp_path, paths=(str(made["pretrain"]),))
    base["model"] |= {"num_layers": 1, "embed_dim": 12, "num_heads": 2}
    run.train(configs.check(base), tmp_path / "base", ["fm", "train"])
    raw = _small(
        "finetune_classify.py",
        tmp_path,
        paths=(str(made["train"]),),
        eval_paths=(str(made["id"]), str(made["ood"])),
        tokenizer="bytes",
    )
    raw["model"] = base["model"]
    raw["init"] |= {"from": str(tmp_path / "base"), "model": False}
    flags = types.SimpleNamespace(
        out=str(tmp_path / "out"),
        methods="probe,full,lp_ft,lora,bias",
        rates="0.01",
        seeds=1,
        against="full",
    )
    command.transfer(raw, flags, ["transfer"])
    found = json.loads((tmp_path / "out" / "transfer.json").read_text())
    assert list(found["methods"]) == ["probe", "full", "lp_ft", "lora", "bias"]
    assert found["methods"]["probe"]["drift"]["ood"]["mean"] == 0.0
    assert found["methods"]["full"]["drift"]["ood"]["mean"] > 0.0
    folder = tmp_path / "out" / "runs" / "full" / "rate_0.01" / "seed_0"
    last = {}
    for row in Run(folder).rows():
        last |= row
    number = found["methods"]["full"]["accuracy"]["ood"]["mean"]
    assert number == last["final/accuracy/ood"]
    assert not any(name.startswith("eval/") for name in last)
    printed = capsys.readouterr().out
    assert "accuracy id, %" in printed
    assert "cannot be compared with full (1 pair)" in printed
