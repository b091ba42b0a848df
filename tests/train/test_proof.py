"""Runs that are killed again and again, and steps that are made again."""

import json

import pytest

from fm_jax.runs import Run
from fm_jax.train import proof

CONFIG = {"checkpoint": {"every": 20}, "eval": {"every": 50}}


def test_kills_are_of_all_kinds_and_always_the_same():
    kills = proof.draw(3, 20, 400, CONFIG)
    assert kills == proof.draw(3, 20, 400, CONFIG) != proof.draw(4, 20, 400, CONFIG)
    assert {kill.kind for kill in kills} == set(proof.KINDS)
    for kill in kills:
        assert 1 <= kill.step <= 400
        assert kill.kind != "save" or kill.step % 20 == 0
        assert kill.kind != "eval" or kill.step % 50 == 0
    never = {"checkpoint": {"every": 0}, "eval": {"every": 0}}
    assert {k.kind for k in proof.draw(3, 8, 9, never)} == {"compile", "step"}


@pytest.mark.slow
def test_a_run_killed_twenty_times_ends_with_the_same_bits(fm, tiny, tmp_path):
    """Fault 9, stopping: a run is killed twenty times, compiling, saving and so on.

    Promise: it ends with the same parameters, optimizer and metrics, bit for bit.
    """
    done = fm(
        "verify_resume",
        *tiny,
        "--config.train.steps=400",
        "--config.checkpoint.every=20",
        "--config.eval.every=50",
        "--kills=20",
        f"--workdir={tmp_path / 'proof'}",
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert done.stdout.startswith("20 kills")
    assert done.stderr.count("killed at") >= 18
    # What the proof would say of a run that did not come to the same end.
    runs = [Run(tmp_path / "proof" / name) for name in ("undisturbed", "killed")]
    rows = [json.dumps(row) for row in runs[1].rows()]
    rows[30] = rows[30].replace('"step": 3', '"step": 4', 1)
    del rows[200]
    (runs[1].path / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    differences, num_arrays, num_lines = proof._compare(*runs, 400)
    assert num_arrays > 20 and num_lines > 400
    assert len(differences) >= 2
    again = fm("verify_resume", *tiny, f"--workdir={tmp_path / 'proof'}")
    assert again.returncode == 2 and "--workdir must be a new folder" in again.stderr


@pytest.mark.slow
def test_a_step_is_made_again_bit_for_bit(fm, tiny, tmp_path):
    """Fault 32, numbers: what a step did is in doubt.

    Promise: fm replay makes it again from the checkpoint before, with the same numbers.
    """
    run = Run(tmp_path / "run")
    flags = [*tiny, "--config.train.ema_decay=0.9"]
    assert fm("train", *flags, f"--workdir={run.path}").returncode == 0
    for step, start in ((1, 0), (16, 15), (19, 15)):
        done = fm("replay", f"--run={run.path}", f"--step={step}", "--json")
        assert done.returncode == 0, done.stderr
        assert f"from step {start}: {step - start} steps" in done.stderr
        assert "are the same, bit for bit" in done.stderr
        row = next(r for r in run.rows() if r["step"] == step and "train/loss" in r)
        numbers = json.loads(done.stdout)
        assert numbers["train/loss"] == row["train/loss"]
        folder = run.path / "replays" / f"step-{step}"
        kept = json.loads((folder / "numbers.json").read_text())
        norms = [x for v in kept["gradient"].values() for x in _flat(v)]
        assert sum(x * x for x in norms) ** 0.5 == pytest.approx(
            numbers["grads/norm"], rel=1e-5
        )
    text = (run.path / "metrics.jsonl").read_text()
    (run.path / "metrics.jsonl").write_text(
        text.replace('"train/loss": ', '"train/loss": 1')
    )
    done = fm("replay", f"--run={run.path}", "--step=16")
    assert (
        done.returncode == 1 and "other than the run wrote: train/loss" in done.stderr
    )
    for step in (0, 21):
        done = fm("replay", f"--run={run.path}", f"--step={step}")
        assert done.returncode == 2 and "from 1 to 20" in done.stderr


def _flat(value):
    return value if isinstance(value, list) else [value]
