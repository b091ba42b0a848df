"""Runs of LoRA and adapter folders: out, in, out again; merged; or one line."""

import json
import types

import jax
import numpy as np
import pytest

from fm_jax import config as configs
from fm_jax import configfile, trees
from fm_jax.checkpoints import Checkpoints
from fm_jax.commands import weights as commands
from fm_jax.errors import UserError
from fm_jax.finetune import weights
from fm_jax.hf import adapters, adopt, tensors, tuned
from fm_jax.runs import Run
from tests.hf import made


def begun(base, out, **sections):
    """Write a run that was fine-tuned from `base`: its config and what trained."""
    record = configfile.read_run(Run(base))
    raw = record["config"]
    raw["init"] |= {"from": f"{base}@0", "model": True}
    for name, keys in sections.items():
        raw[name] = raw[name] | keys
    configs.check(raw)
    there = record["resolved"]
    init = {"path": str(base), "run_id": there["run_id"], "step": 0, "tokens": 0.0,
            "with_optimizer": False}  # fmt: skip
    out.mkdir()
    run = Run(out)
    record = record | {"config": raw, "resolved": there | {"init": init}}
    tuning = weights.tuning_of(configs.check(raw), record)
    rng = np.random.default_rng(3)
    tree = jax.tree.map(
        lambda leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32), tuning.abstract
    )
    saved = Checkpoints(run.checkpoints, writes=True)
    saved.save(5, {"params": tree}, None)
    saved.close()
    run.write("tokenizer.json", (base / "tokenizer.json").read_text())
    run.write_config(record)
    adopt.carry(base, out)
    return out


@pytest.fixture
def base(tmp_path, model_config):
    made.checkpoint(tmp_path / "theirs", model_config(), kinds=("BF16",))
    return made.bring(tmp_path / "theirs", tmp_path / "base").path


@pytest.fixture
def lora_run(base, tmp_path):
    return begun(
        base,
        tmp_path / "lora",
        finetune={"method": "lora"},
        lora={"rank": 3, "alpha": 7.0},
    )


def exported(run, out, **given):
    """Export a run as a user does; return the status."""
    flags = {"run": str(run), "out": str(out), "step": "latest", "family": "",
             "dtype": "", "max_shard_size": "5GB", "verify": False,
             "merge_lora": False} | given  # fmt: skip
    return commands.export(types.SimpleNamespace(values=flags, **flags), None, [])


def imported(folder, base, out, tokenizer=""):
    """Import an adapter as a user does; return the run."""
    flags = {"hf": str(folder), "base": str(base), "out": str(out)}
    commands.bring(types.SimpleNamespace(**flags, tokenizer=tokenizer), None, ["x"])
    return out


def arrays(path):
    """Return a run's plain params by their paths."""
    return trees.leaves_by_path(weights.read(path, Checkpoints(
        path / "checkpoints").steps()[-1]))  # fmt: skip


def check_same(run, other):
    """Assert that two runs have the same plain params, bit by bit."""
    found, wanted = arrays(run), arrays(other)
    assert found.keys() == wanted.keys()
    for path, array in wanted.items():
        np.testing.assert_array_equal(found[path], array, err_msg=path)


def same(folder, other):
    """Return whether two adapters have the same config but its base, and tensors."""
    ours, theirs = (made.load(at) for at in (folder, other))
    keys = [json.loads((at / adapters.CONFIG).read_text()) for at in (folder, other)]
    for one in keys:
        one.pop("base_model_name_or_path")
    return (
        keys[0] == keys[1]
        and ours.keys() == theirs.keys()
        and all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)
    )


def test_a_run_of_lora_goes_out_as_an_adapter_and_comes_in_as_the_same_model(
    lora_run, base, tmp_path, capsys
):
    assert exported(lora_run, tmp_path / "adapter") == 0
    shown = capsys.readouterr()
    assert shown.out == f"{tmp_path / 'adapter'}\n"
    assert "as an adapter of llama: 21 modules, rank 3" in shown.err
    config = json.loads((tmp_path / "adapter" / adapters.CONFIG).read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "theirs")
    again = imported(tmp_path / "adapter", base, tmp_path / "again")
    check_same(again, lora_run)
    assert exported(again, tmp_path / "out") == 0
    assert same(tmp_path / "adapter", tmp_path / "out")


def test_a_run_of_an_adapter_says_what_it_is(lora_run, base, tmp_path):
    exported(lora_run, tmp_path / "adapter")
    run = imported(tmp_path / "adapter", base, tmp_path / "again")
    record = configfile.read_run(Run(run))
    config = configs.check(record["config"])
    assert (config.lora.rank, config.lora.alpha) == (3, 7.0)
    assert (config.finetune.method, config.lora.targets) == ("lora", "attention|mlp")
    kept = configfile.read_run(Run(base))["resolved"]["run_id"]
    init = record["resolved"]["init"]
    assert (init["path"], init["run_id"], init["step"]) == (str(base), kept, 0)
    assert record["resolved"]["run_id"] != kept
    assert (run / "DONE").read_text() == "0\n"
    assert {p.name for p in (run / "hf").iterdir()} == {
        p.name for p in (base / "hf").iterdir()
    }


def test_some_targets_alone_come_back_as_those(base, tmp_path):
    targets = r"attention/(query|out)|mlp/up"
    run = begun(
        base,
        tmp_path / "some",
        finetune={"method": "lora"},
        lora={"rank": 2, "targets": targets},
    )
    exported(run, tmp_path / "adapter")
    again = imported(tmp_path / "adapter", base, tmp_path / "again")
    config = configs.check(configfile.read_run(Run(again))["config"])
    assert config.lora.targets == (
        "^blocks/(attention/out|attention/query|mlp/up)/kernel$"
    )
    check_same(again, run)


def test_updates_of_the_last_layers_alone_come_back_as_those(base, tmp_path):
    run = begun(
        base,
        tmp_path / "upper",
        finetune={"method": "lora", "last_layers": 2},
    )
    exported(run, tmp_path / "adapter")
    again = imported(tmp_path / "adapter", base, tmp_path / "again")
    config = configs.check(configfile.read_run(Run(again))["config"])
    assert config.finetune.last_layers == 2
    check_same(again, run)


def test_that_an_adapter_trained_beside_a_rounded_base_is_said(base, tmp_path, capsys):
    eight = {"finetune": {"method": "lora"}, "lora": {"base": "int8"}}
    exported(begun(base, tmp_path / "eight", **eight), tmp_path / "adapter")
    assert "beside a base in eight bits" in capsys.readouterr().err


def test_merged_the_whole_model_goes_out(lora_run, base, tmp_path, capsys):
    assert exported(lora_run, tmp_path / "whole", merge_lora=True, dtype="float32") == 0
    run = made.bring(tmp_path / "whole", tmp_path / "again").path
    check_same(run, lora_run)
    wanted, before = arrays(lora_run), arrays(base)
    changed = {
        path for path in wanted if not np.array_equal(wanted[path], before[path])
    }
    assert len(changed) == 7
    assert "Rounded" not in capsys.readouterr().err


def test_dtypes_stay_as_they_came_and_that_is_said(lora_run, base, tmp_path, capsys):
    assert exported(lora_run, tmp_path / "whole", merge_lora=True) == 0
    said = "Rounded to bfloat16, as its tensors came; --dtype=float32 keeps all bits"
    assert said in capsys.readouterr().err
    kinds = {str(x.dtype) for x in made.load(tmp_path / "whole").values()}
    assert kinds == {"bfloat16"}
    exported(base, tmp_path / "base-again")
    assert "Rounded" not in capsys.readouterr().err


def test_weights_that_trained_in_part_go_out_whole(base, tmp_path):
    run = begun(base, tmp_path / "upper", finetune={"method": "full", "last_layers": 1})
    assert exported(run, tmp_path / "whole", dtype="float32") == 0
    again = made.bring(tmp_path / "whole", tmp_path / "again").path
    check_same(again, run)


def test_the_template_that_a_run_was_tuned_with_goes_out(lora_run, tmp_path):
    (lora_run / "chat_template.jinja").write_text("{{ messages }}")
    exported(lora_run, tmp_path / "whole", merge_lora=True)
    text = (tmp_path / "whole" / "chat_template.jinja").read_text()
    assert text == "{{ messages }}"


def test_the_template_goes_out_beside_an_adapter_and_comes_in(lora_run, base, tmp_path):
    (lora_run / "chat_template.jinja").write_text("{{ messages }}")
    exported(lora_run, tmp_path / "out")
    again = imported(tmp_path / "out", base, tmp_path / "again")
    assert (again / "chat_template.jinja").read_text() == "{{ messages }}"


def test_what_trained_besides_keeps_updates_from_being_an_adapter(base, tmp_path):
    run = begun(
        base,
        tmp_path / "more",
        finetune={"method": "lora", "rules": (("final_norm", 1.0),)},
    )
    with pytest.raises(UserError, match=r"got final_norm/scale besides\. .*--merge_"):
        exported(run, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    assert exported(run, tmp_path / "whole", merge_lora=True) == 0


def test_a_run_that_classifies_is_refused(lora_run, tmp_path):
    def change(record):
        record["data"] |= {"labels": ["good", "bad"], "label_ids": []}

    made.edited(lora_run, change)
    for merge in (False, True):
        with pytest.raises(UserError, match="whose 2 labels have a head of their own"):
            exported(lora_run, tmp_path / "out", merge_lora=merge)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"dtype": "bfloat16"}, "--dtype must be given with a whole model.*merge_lora"),
        ({"verify": True}, "--verify must be given with a whole model"),
    ],
)
def test_flags_of_a_whole_model_are_refused_for_an_adapter(
    lora_run, tmp_path, given, said
):
    with pytest.raises(UserError, match=said):
        exported(lora_run, tmp_path / "out", **given)


def test_flags_of_the_other_kind_are_refused(base, lora_run, tmp_path):
    with pytest.raises(
        UserError, match=r"left out for a run without adapters; got .*are whole"
    ):
        exported(base, tmp_path / "out", merge_lora=True)
    exported(lora_run, tmp_path / "adapter")
    with pytest.raises(UserError, match=r"with --base=RUN.*no --base"):
        imported(tmp_path / "adapter", "", tmp_path / "out")
    with pytest.raises(UserError, match=r"with --base=RUN.*with --tokenizer"):
        imported(tmp_path / "adapter", base, tmp_path / "out", "bytes")
    with pytest.raises(UserError, match="--base must be given with an adapter's"):
        imported(tmp_path / "theirs", base, tmp_path / "out")
    with pytest.raises(UserError, match=r"--base must be a run; got .*fm import --hf="):
        imported(tmp_path / "adapter", tmp_path / "theirs", tmp_path / "out")


def renamed(folder, old, new, change=lambda x: x):
    """Give the tensors of some modules another name."""
    tensors = made.load(folder)
    there = {n.replace(old, new): change(x) if old in n else x
             for n, x in tensors.items()}  # fmt: skip
    made.save(folder / adapters.WEIGHTS, there)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: renamed(f, "layers.0.self_attn.q_proj", "embed_tokens"),
         "products in attention and MLPs of llama; got module 'model.embed_tokens'"),
        (lambda f: renamed(f, "1.mlp.up_proj", "1.mlp.up_proj",
                           lambda x: np.ones((3, 4), "f4") if x.shape[0] == 3 else x),
         r"the sizes of the base, 12 in and 20 out; got 4 and 20\. Give its"),
        (lambda f: made.edited(f, lambda c: c.update(alpha_pattern={"q_proj": 9}),
                               adapters.CONFIG),
         r"one scale, 2\.33333; got 3 for 'model\.layers\.0\.self_attn\.q_proj'"),
    ],
)  # fmt: skip
def test_an_adapter_that_a_run_does_not_hold_is_refused_and_leaves_nothing(
    lora_run, base, tmp_path, change, said
):
    exported(lora_run, tmp_path / "adapter")
    change(tmp_path / "adapter")
    with pytest.raises(UserError, match=said):
        imported(tmp_path / "adapter", base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_modules_may_be_named_without_their_models_prefix(lora_run, base, tmp_path):
    exported(lora_run, tmp_path / "adapter")
    renamed(tmp_path / "adapter", "base_model.model.model.", "base_model.model.")
    run = imported(tmp_path / "adapter", base, tmp_path / "out")
    check_same(run, lora_run)


def test_an_adapters_folder_is_no_checkpoint(lora_run, tmp_path):
    exported(lora_run, tmp_path / "adapter")
    with pytest.raises(UserError, match=r"got an adapter in .*fm import --base=RUN"):
        tensors.open_folder(tmp_path / "adapter")


def test_only_runs_of_lora_are_told_to_be(lora_run, base):
    assert tuned.is_lora(lora_run)
    assert not tuned.is_lora(base)
