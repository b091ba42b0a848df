"""Tests of runs that begin with another's weights and train a part, in this process."""

import json
import math

import jax
import numpy as np
import pytest

from fm_jax import cli, configfile, trees
from fm_jax import config as configs
from fm_jax.checkpoints import Checkpoints
from fm_jax.errors import UserError
from fm_jax.finetune import weights
from fm_jax.hf import adopt
from fm_jax.runs import Run
from fm_jax.tables import schema
from fm_jax.train import restore, run

SMALL = {
    "model.num_layers": 2,
    "model.num_heads": 2,
    "model.embed_dim": 16,
    "model.mlp_dim": 24,
    "data.source": "text",
    "data.tokenizer": "bytes",
    "data.max_length": 32,
    "train.batch_size": 8,
    "train.steps": 6,
    "schedule.name": "constant",
    "optimizer.learning_rate": 0.01,
    "eval.every": 3,
    "eval.batch_size": 8,
    "checkpoint.every": 3,
    "log.every": 1,
    "sample.num_tokens": 0,
    "train.compile_cache": "",
}
TUNED = {"data.packing": "best_fit", "init.model": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with texts, and examples of each kind."""
    folder = tmp_path_factory.mktemp("tuned")
    rng = np.random.default_rng(0)
    for name, count in (("train", 48), ("id", 16), ("ood", 16)):
        rows = {"labels": [], "pairs": [], "texts": []}
        for _ in range(count):
            label = int(rng.integers(2))
            letters = "ab" if name != "ood" else "aB"
            text = "".join(rng.choice(list(letters[label] + "cd"), 9))
            rows["labels"].append({"text": text, "label": ("left", "right")[label]})
            one, other = ("x" * 3, "y" * 4)
            rows["pairs"].append({"prompt": text, "chosen": one, "rejected": other})
            rows["texts"].append({"text": text * 4})
        for kind, lines in rows.items():
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (folder / f"{name}_{kind}.jsonl").write_text(text)
    return folder


def _train(folder, name, values, steps=6):
    flat = SMALL | {"data.cache_dir": str(folder / "cache")} | values
    raw = configfile.load_base()
    for key, value in (flat | {"train.steps": steps}).items():
        section, field = key.split(".")
        raw[section][field] = value
    return run.train(configs.check(adopt.adopted(raw)), folder / name, ["fm"])


def _paths(folder, kind):
    held_out = [str(folder / f"{name}_{kind}.jsonl") for name in ("id", "ood")]
    return {
        "data.paths": (str(folder / f"train_{kind}.jsonl"),),
        "data.eval_paths": tuple(held_out),
    }


@pytest.fixture(scope="module")
def base(folder):
    """Return a run that was trained as a whole."""
    return _train(folder, "base", _paths(folder, "texts"))


def _params(path, step):
    """Return the leaves of a run's plain params."""
    with jax.default_device(jax.devices()[0]):
        return trees.leaves_by_path(jax.device_get(weights.read(path, step)))


def _lora(folder, base, name, steps=6, **values):
    flat = {"finetune.method": "lora", "lora.rank": 3, "init.from": str(base.path)}
    flat |= {"lora.targets": "attention/query|mlp/down"}
    return _train(folder, name, _paths(folder, "texts") | TUNED | flat | values, steps)


@pytest.fixture(scope="module")
def lora(folder, base):
    return _lora(folder, base, "lora", **{"optimizer.weight_decay": 0.0})


def test_the_checkpoint_of_a_lora_run_holds_the_updates_alone(lora):
    record = configfile.read_run(lora)
    tuning = weights.tuning_of(configs.check(record["config"]), record)
    names = trees.leaves_by_path(tuning.abstract)
    assert sorted(names) == [
        "lora/blocks/attention/query/a",
        "lora/blocks/attention/query/b",
        "lora/blocks/mlp/down/a",
        "lora/blocks/mlp/down/b",
    ]
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape,
            x.dtype,
            sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]),
        ),
        tuning.abstract,
    )
    saved = Checkpoints(lora.checkpoints)
    held = saved.restore(6, {"params": abstract})["params"]
    saved.close()
    assert record["resolved"]["trained_params"] == sum(
        leaf.size for leaf in jax.tree.leaves(held)
    )


def test_a_lora_run_is_read_as_its_base_plus_the_updates(base, lora):
    record = configfile.read_run(lora)
    tuning = weights.tuning_of(configs.check(record["config"]), record)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        tuning.abstract,
    )
    saved = Checkpoints(lora.checkpoints)
    held = saved.restore(6, {"params": abstract})["params"]["lora"]
    saved.close()
    before, after = _params(base.path, 6), _params(lora.path, 6)
    scale = 16.0 / 3
    a, b = (
        np.asarray(held["blocks"]["attention"]["query"][name], np.float64)
        for name in "ab"
    )
    expected = before["blocks/attention/query/kernel"] + scale * np.einsum(
        "ldr,lrnh->ldnh", a, b
    )
    np.testing.assert_allclose(
        after["blocks/attention/query/kernel"], expected, rtol=1e-5, atol=1e-6
    )
    assert np.any(b != 0)
    for name in before.keys() - {"blocks/attention/query/kernel"}:
        if name != "blocks/mlp/down/kernel":
            np.testing.assert_array_equal(before[name], after[name], err_msg=name)


def test_a_lora_run_that_goes_on_ends_with_the_bits_of_one_that_was_not_stopped(
    folder, base, lora
):
    values = {"optimizer.weight_decay": 0.0}
    _lora(folder, base, "stopped", steps=3, **values)
    again = _lora(folder, base, "stopped", steps=6, **values)
    one, other = _params(lora.path, 6), _params(again.path, 6)
    for name, leaf in one.items():
        np.testing.assert_array_equal(leaf, other[name], err_msg=name)


def test_a_run_of_which_a_part_trains_has_no_row_among_those_of_laws(base, lora):
    assert (base.path / schema.FILE).read_text()
    assert not (lora.path / schema.FILE).exists()


def test_a_run_without_its_base_says_where_it_was(folder, base, tmp_path):
    alone = _lora(folder, base, "alone", steps=1)
    moved = tmp_path / "alone"
    alone.path.rename(moved)
    record = json.loads((moved / "config.json").read_text())
    record["resolved"]["init"]["path"] = str(tmp_path / "gone")
    (moved / "config.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="must be where it was, for what did not train"):
        restore.load(moved)
    (tmp_path / "gone").symlink_to(base.path)  # or beside the run
    assert restore.load(moved).step == 1


def _answers(folder, base, name, values, steps=6):
    flat = {"data.examples": "classify", "init.from": str(base.path)}
    return _train(folder, name, _paths(folder, "labels") | TUNED | flat | values, steps)


def _final(found):
    """Return the last row of metrics.jsonl that has final metrics."""
    return next(row for row in reversed(list(found.rows())) if "final/loss" in row)


def test_a_probe_takes_no_step_and_tells_what_it_was_chosen_by(folder, base):
    found = _answers(folder, base, "probe", {"finetune.method": "probe"})
    assert found.is_done() and found.done_step() == 0
    said = json.loads((found.path / "probe.json").read_text())
    assert said["l2"] in [point["l2"] for point in said["path"]]
    final = _final(found)
    assert final["final/accuracy/id_labels"] == 1.0  # the letters tell the label
    assert final["final/drift/id_labels"] == 0.0
    assert "final/bits_per_byte" not in final
    before, after = _params(base.path, 6), _params(found.path, 0)
    assert after.keys() - before.keys() == {"classifier/kernel", "classifier/bias"}
    for name, leaf in before.items():
        np.testing.assert_array_equal(leaf, after[name], err_msg=name)


def test_a_probe_that_is_done_is_not_done_again(folder, base, capfd):
    _answers(folder, base, "probe", {"finetune.method": "probe"})
    capfd.readouterr()
    _answers(folder, base, "probe", {"finetune.method": "probe"})
    assert "This run is done" in capfd.readouterr().err


def test_probe_then_fine_tune_begins_where_the_probe_ends(folder, base):
    rate = {"optimizer.learning_rate": 1e-12, "finetune.method": "lp_ft"}
    still = _answers(folder, base, "still", rate, steps=1)
    probe = _answers(folder, base, "probe", {"finetune.method": "probe"})
    one, other = _final(still), _final(probe)
    for name in ("final/loss/id_labels", "final/loss/ood_labels"):
        assert one[name] == pytest.approx(other[name], rel=1e-5)


def test_fine_tuning_to_classify_reads_and_evaluates_as_it_ended(folder, base):
    found = _answers(folder, base, "full", {"finetune.method": "full"})
    final = _final(found)
    held = restore.load(found.path)
    assert held.answers.labels == ("left", "right")
    assert held.model.head(held.params).shape == (2, 16)
    again = restore.evaluate(found.path)
    for name in ("loss", "accuracy/id_labels", "accuracy/ood_labels"):
        assert again[name] == pytest.approx(final[f"final/{name}"], rel=1e-5)
    assert final["final/drift/id_labels"] > 0


def test_words_for_labels_answer_without_training(folder, base):
    words = {"data.label_words": (("left", "a"), ("right", "b"))}
    found = _answers(folder, base, "words", words | {"finetune.method": "none"})
    final = _final(found)
    held = restore.load(found.path)
    ids = held.tokenizer.encode_batch(["ab"])[0]
    np.testing.assert_array_equal(
        held.model.head(held.params), np.asarray(held.params["head"])[ids]
    )
    assert 0 <= final["final/accuracy/id_labels"] <= 1


@pytest.mark.parametrize("method", ["full", "lora"])
def test_preferences_begin_at_the_reference_and_learn_who_is_chosen(
    folder, base, method
):
    values = {"data.examples": "preference", "init.from": str(base.path)}
    values |= {"finetune.method": method, "data.max_length": 64}
    values |= {"optimizer.weight_decay": 0.0}
    values |= _paths(folder, "pairs") | TUNED
    found = _train(folder, f"pairs_{method}", values)
    steps, losses = found.series("train/loss")
    assert steps[0] == 1
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[-1] < losses[0] - 1e-3
    assert found.series("train/margin")[1][-1] > 0
    final = _final(found)
    again = restore.evaluate(found.path)
    for name in ("loss", "margin", "accuracy/id_pairs"):
        assert again[name] == pytest.approx(final[f"final/{name}"], abs=1e-5)
    # The reference of one that goes on is the first weights still.
    again = _train(folder, f"pairs_{method}_stopped", values, steps=3)
    again = _train(folder, f"pairs_{method}_stopped", values, steps=6)
    assert again.series("train/loss")[1] == losses


def test_the_base_of_a_run_that_goes_on_must_be_the_same(folder, base, lora):
    other = _train(folder, "other", _paths(folder, "texts") | {"train.seed": 5})
    _lora(folder, base, "changed", steps=3)
    with pytest.raises(UserError, match="must be the run that this one began from"):
        _lora(folder, other, "changed", steps=6)


def test_the_optimizer_of_another_run_is_of_all_that_trains(folder, base):
    with pytest.raises(UserError, match="False when only a part of the model trains"):
        _lora(folder, base, "none", **{"init.optimizer": True})


def test_a_run_of_hugging_faces_names_is_no_run(folder):
    values = _paths(folder, "texts") | {"init.from": str(folder / "nowhere")}
    with pytest.raises(UserError, match=r"must be RUN\[@STEP\] or a Hugging Face"):
        _train(folder, "nothing", values)
    assert not Run(folder / "nothing").exists()


def _chats(words):
    """Return chats that ask for the last letter of a word."""
    for word in words:
        said = [("user", f"End of {word}"), ("assistant", word[-1].upper())]
        yield {"messages": [{"role": r, "content": c} for r, c in said]}


@pytest.mark.slow
def test_a_model_tuned_to_chat_answers_what_it_could_not_before(folder, base, capsys):
    rng = np.random.default_rng(2)
    words = sorted({"".join(rng.choice(list("abcdefgh"), 4)) for _ in range(500)})
    rng.shuffle(words)
    held_out, rest = words[:24], words[24:]
    for name, some in (("chats", rest), ("asked", held_out)):
        text = "".join(json.dumps(chat) + "\n" for chat in _chats(some))
        (folder / f"{name}.jsonl").write_text(text)
    values = TUNED | {
        "data.paths": (str(folder / "chats.jsonl"),),
        "data.eval_paths": (str(folder / "asked.jsonl"),),
        "data.examples": "chat",
        "data.max_length": 64,
        "init.from": str(base.path),
        "optimizer.learning_rate": 0.01,
        "optimizer.weight_decay": 0.0,
        "eval.every": 0,
    }
    right = {}
    for name, method, steps in (("mute", "none", 1), ("chatty", "full", 500)):
        found = _train(folder, name, values | {"finetune.method": method}, steps)
        capsys.readouterr()
        asked = [f"--prompt=End of {word}" for word in held_out]
        flags = ["--chat", "--temperature=0", "--num_tokens=3", "--json"]
        assert cli.main(["generate", f"--run={found.path}", *flags, *asked]) == 0
        said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        right[name] = np.mean(
            [
                one["text"] == word[-1].upper() and one["finish_reason"] == "stop"
                for one, word in zip(said, held_out, strict=True)
            ]
        )
    assert right["mute"] == 0.0
    assert right["chatty"] >= 0.75
