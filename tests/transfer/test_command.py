import json
import types

import pytest

from fm_jax import configfile
from fm_jax.errors import UserError
from fm_jax.runs import Run
from fm_jax.transfer import command

CONFIG = configfile.BASE.parent / "finetune_classify.py"


def _flags(out, **given):
    flags = {
        "out": str(out),
        "methods": "probe,full",
        "rates": "0.1,0.01",
        "seeds": 2,
        "against": "full",
    }
    return types.SimpleNamespace(**flags | given)


def _raw(**data):
    raw = configfile.load(str(CONFIG)).to_dict()
    raw["init"] |= {"from": "runs/base", "model": False}
    raw["data"] |= {"tokenizer": "bytes", "paths": ("a.jsonl",)}
    raw["data"] |= {"eval_paths": ("b/near.jsonl", "far.jsonl"), **data}
    return raw


class _Trained:
    """Stand in for train(): leave a run behind, better with a higher seed or rate."""

    def __init__(self):
        self.raws = []

    def __call__(self, raw, folder, argv):
        self.raws.append(raw)
        run = Run(folder)
        run.begin()
        keys = ("config", "changed_from_base", "resolved", "data", "history")
        record = {key: {} for key in keys} | {"config": raw}
        record |= {"resolved": {"model": raw["model"]}, "history": []}
        run.write_config(record)
        row = {"step": 1, "final/drift/far": 0.5}
        rate = raw["optimizer"]["learning_rate"]
        for path in raw["data"]["eval_paths"]:
            name = path.rpartition("/")[2].partition(".")[0]
            near = 0.7 + rate + raw["train"]["seed"] / 10
            row |= {f"final/accuracy/{name}": near, f"final/loss/{name}": 1 - rate}
        run.append(row)
        run.write("DONE", "1\n")


@pytest.fixture
def trained(monkeypatch):
    made = _Trained()
    monkeypatch.setattr(command, "_train", made)
    return made


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"methods": "full,lp-ft"}, "--methods must be one of the known names; got"),
        ({"methods": ","}, "--methods must name one; got ','"),
        ({"against": "lora"}, "--against must be one of --methods=probe,full; got"),
        ({"rates": "1e-3,0"}, "--rates must be learning rates above 0 with commas"),
        ({"rates": "fast"}, "got 'fast'. Example: --rates=3e-4,1e-3,3e-3"),
        ({"seeds": 0}, "--seeds must be >= 1; got 0"),
    ],
)
def test_mistakes_are_told_before_anything_is_made(tmp_path, trained, given, said):
    with pytest.raises(UserError, match=said):
        command.transfer(_raw(), _flags(tmp_path / "out", **given), [])
    assert not list(tmp_path.iterdir())
    assert not trained.raws


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"paths": ()}, "config.data.paths must be given with config.init.from"),
        ({"eval_paths": ()}, "config.data.eval_paths must be given with config.init"),
        ({"eval_paths": ("b.jsonl", "c/b.jsonl")}, "files of different names; got b"),
        ({"examples": "chat"}, "config.data.examples must be classify; got 'chat'"),
    ],
)
def test_data_that_no_study_can_be_made_of_is_refused(tmp_path, trained, given, said):
    with pytest.raises(UserError, match=said):
        command.transfer(_raw(**given), _flags(tmp_path / "out"), [])
    assert not list(tmp_path.iterdir())


def test_data_without_a_base_are_refused(tmp_path, trained):
    raw = _raw()
    raw["init"]["from"] = ""
    said = "config.data.paths must be left out without config.init.from; got"
    with pytest.raises(UserError, match=said):
        command.transfer(raw, _flags(tmp_path / "out"), [])
    assert not list(tmp_path.iterdir())


def test_a_study_of_ones_own_data_is_written_and_printed(tmp_path, trained, capsys):
    command.transfer(_raw(), _flags(tmp_path / "out"), ["transfer"])
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "out" / "transfer.md").read_text()
    assert "# Transfer from runs/base" in printed
    assert "accuracy near, % | accuracy far, %" in " ".join(printed.split())
    assert len(trained.raws) == 6
    assert {raw["data"]["paths"] for raw in trained.raws} == {("a.jsonl",)}
    found = json.loads((tmp_path / "out" / "transfer.json").read_text())
    assert found["files"] == ["near", "far"]
    assert found["rates"] == [0.01, 0.1]
    assert found["methods"]["full"]["rates"] == {"0": 0.1, "1": 0.1}
    assert found["command"] == ["fm", "transfer"]
    assert len(found["runs"]) == 6
    assert (tmp_path / "out/runs/full/rate_0.01/seed_1/DONE").exists()


def test_the_same_command_again_trains_nothing_and_says_the_same(
    tmp_path, trained, capsys
):
    command.transfer(_raw(), _flags(tmp_path / "out"), ["transfer"])
    first = capsys.readouterr().out
    command.transfer(_raw(), _flags(tmp_path / "out"), ["transfer"])
    assert capsys.readouterr().out == first
    assert len(trained.raws) == 6


@pytest.fixture
def small(monkeypatch):
    for name in ("NUM_PRETRAIN", "NUM_TRAIN", "NUM_HELD_OUT"):
        monkeypatch.setattr(command, name, 7)


def test_without_a_base_the_toy_is_made_and_its_base_trained(
    tmp_path, trained, small, capsys
):
    raw, out = configfile.load(str(CONFIG)).to_dict(), tmp_path / "out"
    command.transfer(raw, _flags(out), ["transfer"])
    base, *others = trained.raws
    assert base["data"]["paths"] == (str(out / "data" / "pretrain.jsonl"),)
    assert base["init"]["from"] == ""
    assert [one["init"]["from"] for one in others] == [str(out / "base")] * 6
    assert {one["model"]["embed_dim"] for one in others} == {base["model"]["embed_dim"]}
    assert raw["init"]["from"] == ""  # the caller's stays as it was
    names = [path.stem for path in sorted((out / "data" / "draw_0").iterdir())]
    assert names == ["id", "ood", "train", "valid"]
    assert "accuracy valid, %" in capsys.readouterr().out


def test_a_seed_of_the_toy_is_a_draw_of_its_own(tmp_path, trained, small):
    raw, out = configfile.load(str(CONFIG)).to_dict(), tmp_path / "out"
    command.transfer(raw, _flags(out), [])
    texts = [
        (out / "data" / f"draw_{seed}" / f"{name}.jsonl").read_text()
        for seed in range(2)
        for name in ("train", "valid", "id", "ood")
    ]
    assert len(set(texts)) == 8
    for one in trained.raws[1:]:
        place = out / "data" / f"draw_{one['train']['seed']}"
        assert one["data"]["paths"] == (str(place / "train.jsonl"),)
        assert [path.rpartition("/")[2] for path in one["data"]["eval_paths"]] == [
            "valid.jsonl",
            "id.jsonl",
            "ood.jsonl",
        ]


def test_a_run_that_would_be_refused_is_refused_before_the_base_is_trained(
    tmp_path, trained, small
):
    raw = configfile.load(str(CONFIG)).to_dict()
    raw["lora"]["rank"] = 0
    with pytest.raises(UserError, match=r"config\.lora\.rank must be >= 1; got 0"):
        command.transfer(raw, _flags(tmp_path / "out"), [])
    assert not list(tmp_path.iterdir())
    assert not trained.raws
