"""Tests of runs that begin from a step of another run, as real processes."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from fm_jax import trees
from fm_jax.runs import Run
from fm_jax.train import beginning

WSD = [
    "--config.schedule.name=wsd",
    "--config.schedule.warmup_fraction=0.05",
    "--config.log.every=1",
]


def _leaves(path: pathlib.Path, step: int) -> dict[str, np.ndarray]:
    """Return every array of a checkpoint."""
    from orbax.checkpoint import v1 as ocp

    found = ocp.load_checkpointables(path / "checkpoints" / str(step))
    by_path = trees.leaves_by_path(found)
    return {k: np.asarray(v) for k, v in by_path.items() if hasattr(v, "shape")}


@pytest.fixture(scope="module")
def trunk(fm, tiny, tmp_path_factory) -> pathlib.Path:
    """Return a run of twenty steps at a constant rate, saved at every fifth."""
    path = tmp_path_factory.mktemp("runs") / "trunk"
    done = fm("train", *tiny, *WSD, "--config.schedule.decay_fraction=0",
              "--config.checkpoint.keep_every=5", f"--workdir={path}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture(scope="module")
def branch(fm, tiny, trunk) -> pathlib.Path:
    """Return a run that decays from step 10 of the trunk to step 16."""
    path = trunk.parent / "branch"
    done = fm("train", *tiny, *WSD, f"--config.init.from={trunk}@10",
              "--config.init.optimizer=True", "--config.train.steps=16",
              f"--config.schedule.decay_fraction={6 / 16}",
              f"--workdir={path}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Beginning with the state of step 10" in done.stderr
    return path


@pytest.mark.slow
def test_a_branch_ends_with_the_bits_of_the_run_that_it_stands_for(
    fm, tiny, trunk, branch
):
    whole = trunk.parent / "whole"
    done = fm("train", *tiny, *WSD, "--config.train.steps=16",
              f"--config.schedule.decay_fraction={6 / 16}",
              f"--workdir={whole}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    mine, its = _leaves(branch, 16), _leaves(whole, 16)
    assert mine.keys() == its.keys()
    for name, leaf in its.items():
        np.testing.assert_array_equal(mine[name], leaf, err_msg=name)
    steps, losses = Run(branch).series("train/loss")
    assert steps == list(range(11, 17))
    assert losses == Run(whole).series("train/loss")[1][10:]


@pytest.mark.slow
def test_rows_of_the_table_say_where_a_branch_comes_from(trunk, branch):
    rows = list(Run(branch).rows("table.jsonl"))
    parent = Run(trunk).read_config()["resolved"]["run_id"]
    assert [(r["step"], r["status"], r["is_final"]) for r in rows] == [
        (16, "final", True)
    ]
    assert (rows[0]["parent_id"], rows[0]["branch_step"]) == (parent, 10)
    assert rows[0]["tokens"] == 16 * 8 * 16
    final = Run(branch).series("final/loss")[1]
    assert rows[0]["loss"] == final[-1]
    whole = list(Run(trunk).rows("table.jsonl"))
    assert [(r["step"], r["status"]) for r in whole] == [(10, "running"), (20, "final")]
    assert whole[0]["learning_rate_now"] == whole[1]["learning_rate_now"]
    assert rows[0]["learning_rate_now"] < 0.5 * rows[0]["learning_rate"]


@pytest.mark.slow
def test_weights_alone_begin_a_run_at_step_zero(fm, tiny, trunk):
    path = trunk.parent / "weights"
    flags = [*tiny, f"--config.init.from={trunk}", "--config.train.steps=3",
             "--config.optimizer.learning_rate=1e-12", f"--workdir={path}"]  # fmt: skip
    done = fm("train", *flags)
    assert done.returncode == 0, done.stderr
    assert "Beginning with the weights of step 20" in done.stderr
    mine, its = _leaves(path, 3), _leaves(trunk, 20)
    for name, leaf in its.items():
        if name.startswith("params/"):
            np.testing.assert_allclose(mine[name], leaf, atol=1e-9, err_msg=name)
    row = list(Run(path).rows("table.jsonl"))[-1]
    assert (row["tokens"], row["branch_step"]) == (3 * 8 * 16, 20)
    # Its own checkpoint goes before the first weights: the other may be gone by now.
    done = fm("train", *flags, "--config.init.from=gone", "--config.train.steps=5")
    assert done.returncode == 0, done.stderr
    assert "Going on from step 3" in done.stderr
    record = json.loads((path / "config.json").read_text())
    assert record["resolved"]["init"]["step"] == 20
    # But it is no run that began at random.
    done = fm("train", *flags, "--config.init.from=", "--config.train.steps=6")
    assert done.returncode == 2
    assert "init.from: 'gone' there, '' here" in done.stderr


@pytest.mark.slow
def test_a_branch_that_diverges_says_at_which_step(fm, tiny, trunk):
    path = trunk.parent / "diverged"
    done = fm("train", *tiny, *WSD, f"--config.init.from={trunk}@10",
              "--config.init.optimizer=True", "--config.optimizer.learning_rate=1e38",
              f"--workdir={path}")  # fmt: skip
    assert done.returncode == 76, done.stderr
    # Step 12 is the first that sees the branch's update; three may be passed over.
    assert "at step 15." in done.stderr
    (row,) = Run(path).rows("table.jsonl")
    assert (row["status"], row["step"]) == ("diverged", 15)
    assert row["train_loss"] is None


@pytest.mark.slow
def test_a_run_made_before_there_were_branches_is_read_begun_from_and_gone_on_with(
    fm, tiny, trunk
):
    old = Run(trunk.parent / "old")
    shutil.copytree(trunk, old.path)
    record = old.read_config()
    for section in ("init", "synthetic"):
        del record["config"][section]
    for name in ("run_id", "init"):
        del record["resolved"][name]
    old.write_config(record)
    done = fm("generate", f"--run={old.path}", "--num_tokens=2")
    assert done.returncode == 0, done.stderr
    path = trunk.parent / "young"
    done = fm("train", *tiny, f"--config.init.from={old.path}@15",
              "--config.train.steps=1", f"--workdir={path}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = fm("train", *tiny, *WSD, "--config.schedule.decay_fraction=0",
              "--config.checkpoint.keep_every=5", "--config.train.steps=21",
              f"--workdir={old.path}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Going on from step 20" in done.stderr
    resolved = old.read_config()["resolved"]
    assert resolved["init"] is None
    (row,) = Run(path).rows("table.jsonl")
    assert (row["parent_id"], row["branch_step"]) == (resolved["run_id"], 15)
    assert resolved["run_id"].startswith("old-")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--config.init.from={runs}/nothing"], "config.init.from must be RUN[@STEP]"),
        (["--config.init.from={trunk}@7"], "must be one of the saved steps"),
        (
            ["--config.init.from={trunk}", "--config.model.embed_dim=20"],
            "the model must have the shapes of config.init.from",
        ),
        (
            ["--config.init.from={trunk}", "--config.data.tokenizer=bpe",
             "--config.data.vocab_size=300"],
            "must be a run with this tokenizer",
        ),
        (
            ["--config.init.from={trunk}", "--config.init.optimizer=True"],
            "the duration must go beyond config.init.from, step 20",
        ),
        (
            ["--config.init.from={trunk}@10", "--config.init.optimizer=True",
             "--config.train.seed=1"],
            "train.seed must be that of config.init.from",
        ),
    ],
)  # fmt: skip
def test_a_beginning_that_cannot_be_is_one_line(fm, tiny, trunk, flags, said):
    given = [f.format(runs=trunk.parent, trunk=trunk) for f in flags]
    done = fm("train", *tiny, *given, f"--workdir={trunk.parent / 'refused'}")
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert done.stderr.splitlines()[-1].startswith("fm: ")
    assert not (trunk.parent / "refused" / "config.json").exists()


def test_tokens_count_what_came_before_the_start():
    init = {"step": 10, "tokens": 1280.0, "with_optimizer": True}

    def seen(step):
        return 100 * step

    assert beginning.tokens_at(12, seen, init) == 1480
    assert beginning.tokens_at(12, seen, init | {"with_optimizer": False}) == 1200
    assert beginning.tokens_at(12, seen, None) == 1200
