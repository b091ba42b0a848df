"""Tests of whole runs on several stores: what they count, and going on with them."""

import pathlib
import shutil

import numpy as np
import pytest

from fm_jax import trees
from fm_jax.runs import Run

TEXTS = {"words": ("the", "cat", "sat", "on", "a", "mat"), "digits": ("1", "23", "456")}


def _leaves(path: pathlib.Path, step: int) -> dict[str, np.ndarray]:
    """Return every array of a checkpoint."""
    from orbax.checkpoint import v1 as ocp

    found = ocp.load_checkpointables(path / "checkpoints" / str(step))
    by_path = trees.leaves_by_path(found)
    return {k: np.asarray(v) for k, v in by_path.items() if hasattr(v, "shape")}


def _assert_same_bits(one: pathlib.Path, two: pathlib.Path, step: int) -> None:
    ours, theirs = _leaves(one, step), _leaves(two, step)
    assert ours.keys() == theirs.keys()
    for name, leaf in ours.items():
        np.testing.assert_array_equal(leaf, theirs[name], err_msg=name)


@pytest.fixture(scope="module")
def mixed(fm, tiny, tmp_path_factory) -> list[str]:
    """Return flags of a run on two stores, held out in one, with rows half full."""
    folder = tmp_path_factory.mktemp("mixture")
    for seed, (name, words) in enumerate(TEXTS.items()):
        rng = np.random.default_rng(seed)
        texts = folder / name
        texts.mkdir()
        for index in range(40):
            text = " ".join(rng.choice(words, int(rng.integers(2, 30 - 20 * seed))))
            (texts / f"{index}.txt").write_text(text)
        done = fm("data", "build", *_without(tiny, "data.paths"),
                  f"--config.data.paths=('{texts}',)",
                  f"--out={folder / 'stores' / name}")  # fmt: skip
        assert done.returncode == 0, done.stderr
    stores = folder / "stores"
    return [
        *_without(tiny, "data.paths", "data.source", "data.tokenizer"),
        "--config.data.source=store",
        "--config.data.tokenizer=store",
        f"--config.data.paths=('{stores / 'words'}','{stores / 'digits'}')",
        f"--config.data.eval_paths=('{stores / 'digits'}',)",
        "--config.data.packing=single",
        "--config.data.weights=(1.0,0.0)",
        "--config.data.weights_at=((12,(0.3,0.7)),)",
        "--config.train.accumulation=2",
        "--config.checkpoint.keep_every=5",
    ]


def _without(flags: list[str], *keys: str) -> list[str]:
    return [f for f in flags if not f.startswith(tuple(f"--config.{k}=" for k in keys))]


@pytest.fixture(scope="module")
def whole(fm, mixed, tmp_path_factory) -> tuple[Run, str]:
    """Return a run of twenty steps on two stores, and what it printed."""
    path = tmp_path_factory.mktemp("runs") / "whole"
    done = fm("train", *mixed, f"--workdir={path}")
    assert done.returncode == 0, done.stderr
    return Run(path), done.stderr


@pytest.mark.slow
def test_padding_is_counted_nowhere(whole):
    run, printed = whole
    steps, tokens = run.series("train/tokens")
    assert steps == list(range(1, 21))
    assert max(tokens[:12]) <= 8 * 16
    *_, row = run.rows("table.jsonl")
    # As many as rows have on average: of these 160 rows it is a few more or less.
    assert row["tokens"] == pytest.approx(sum(tokens), rel=0.05)
    assert row["tokens"] < 0.95 * 20 * 8 * 16
    seen = {name: run.series(f"train/tokens_seen/{name}")[1] for name in TEXTS}
    assert row["tokens"] == round(seen["words"][-1] + seen["digits"][-1])
    assert row["unique_tokens"] <= row["tokens"]
    for name in ("6n_total", "6n_non_embedding"):
        params = row[f"params_{name[3:]}"]
        assert row[f"flops_{name}"] == pytest.approx(6 * params * row["tokens"], 1e-3)
    assert f"of them tokens, = {row['tokens']:,} tokens (" in printed
    (median,) = run.series("perf/median_tokens_per_second")[1]
    (seconds,) = run.series("perf/median_step_seconds")[1]
    assert median * seconds == pytest.approx(row["batch_tokens"], rel=0.01)
    assert row["batch_tokens"] == row["warmup_tokens"] < 8 * 16


@pytest.mark.slow
def test_a_store_without_weight_is_first_trained_on_when_it_gets_some(whole):
    run, _ = whole
    by_store = {name: run.series(f"train/tokens/{name}")[1] for name in TEXTS}
    assert not any(by_store["digits"][:12]) and all(by_store["digits"][12:])
    assert run.series("train/loss/digits")[0] == list(range(13, 21))
    assert run.series("train/loss/words")[0] == list(range(1, 21))
    sums = np.sum(list(by_store.values()), axis=0)
    assert sums.tolist() == run.series("train/tokens")[1]
    # One store is held out: its loss is the loss.
    assert not [
        key for row in run.rows() for key in row if key.startswith("eval/loss/")
    ]


@pytest.mark.slow
def test_a_mixture_that_was_cut_off_ends_with_the_same_bits(fm, mixed, whole, tmp_path):
    run, path = whole[0], tmp_path / "cut"
    shutil.copytree(run.path, path)
    (path / "DONE").unlink()
    for step in (15, 20):
        shutil.rmtree(path / "checkpoints" / str(step))
    done = fm("train", *mixed, f"--workdir={path}")
    assert done.returncode == 0, done.stderr
    assert "Going on from step 10 of" in done.stderr
    _assert_same_bits(run.path, path, 20)
    names = ("train/", "eval/", "final/")
    ours, theirs = (
        [{k: v for k, v in row.items() if k.startswith(names)} for row in r.rows()]
        for r in (run, Run(path))
    )
    assert [row for row in ours if row] == [row for row in theirs if row]
    rows = [[*r.rows("table.jsonl")][-1] for r in (run, Run(path))]
    assert rows[0] | {"wall_seconds": 0} == rows[1] | {"wall_seconds": 0}


@pytest.mark.slow
def test_a_branch_of_a_mixture_goes_on_with_its_next_batch(fm, mixed, whole, tmp_path):
    run, path = whole[0], tmp_path / "branch"
    flags = [f"--config.init.from={run.path}@10", "--config.init.optimizer=True"]
    done = fm("train", *mixed, *flags, f"--workdir={path}")
    assert done.returncode == 0, done.stderr
    _assert_same_bits(run.path, path, 20)
    (_, *_, theirs), (*_, ours) = (r.rows("table.jsonl") for r in (run, Run(path)))
    assert ours["parent_id"] == theirs["run_id"]
    assert ours["tokens"] == pytest.approx(theirs["tokens"], abs=1)
    other = [*_without(mixed, "data.weights"), "--config.data.weights=(1.0,1.0)"]
    for given, said in {
        "data.weights": other,
        "data.packing": [*mixed, "--config.data.packing=best_fit"],
        "data.weights_at before step 10": [
            *_without(mixed, "data.weights_at"),
            "--config.data.weights_at=((9,(0.3,0.7)),)",
        ],
    }.items():
        done = fm("train", *said, *flags, f"--workdir={tmp_path / 'refused'}")
        assert done.returncode == 2, done.stderr
        assert f"{given} must be that of config.init.from=" in done.stderr
    # Later changes are another end of the same run.
    done = fm("train", *_without(mixed, "data.weights_at"), *flags,
              "--config.data.weights_at=((11,(0.0,1.0)),)",
              f"--workdir={tmp_path / 'other'}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not any(Run(tmp_path / "other").series("train/tokens/words")[1][1:])


@pytest.mark.slow
def test_evaluating_a_mixture_again_gives_its_final_loss(fm, whole):
    run, _ = whole
    done = fm("eval", f"--run={run.path}")
    assert done.returncode == 0, done.stderr
    found = dict(line.split() for line in done.stdout.splitlines())
    assert float(found["loss"]) == pytest.approx(run.series("final/loss")[1][0], 1e-5)
    assert float(found["tokens"]) == run.series("final/tokens")[1][0]
