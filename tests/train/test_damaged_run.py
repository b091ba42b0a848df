"""A run whose newest checkpoint was damaged goes on from the one before it."""

import numpy as np
import pytest

from fm_jax.runs import Run


def _flip(step):
    """Flip a bit in the middle of the largest file."""
    files = (file for file in step.rglob("*") if file.is_file())
    file = max(files, key=lambda file: file.stat().st_size)
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 4
    file.write_bytes(raw)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_told_moved_aside_and_the_run_ends_as_it_would(
    fm, tiny, tmp_path
):
    flags = [*tiny, "--config.checkpoint.keep=2"]
    whole, damaged = Run(tmp_path / "whole"), Run(tmp_path / "damaged")
    assert fm("train", *flags, f"--workdir={whole.path}").returncode == 0
    assert fm("train", *flags, f"--workdir={damaged.path}").returncode == 0
    checked = fm("checkpoint", "verify", damaged.path)
    assert checked.returncode == 0, checked.stderr
    assert [line.split()[:3] for line in checked.stdout.splitlines()] == [
        ["step", "15", "good"],
        ["step", "20", "good"],
    ]
    _flip(damaged.checkpoints / "20" / "params")
    (damaged.path / "DONE").unlink()
    checked = fm("checkpoint", "verify", damaged.path)
    assert checked.returncode == 1
    assert "step 20 DAMAGED" in checked.stdout
    asked = fm("generate", f"--run={damaged.path}", "--prompt=the")
    assert asked.returncode == 2
    assert "--step" in asked.stderr and len(asked.stderr.splitlines()) == 1
    done = fm("train", *flags, f"--workdir={damaged.path}")
    assert done.returncode == 0, done.stderr
    assert "WARNING: a checkpoint must be what was saved" in done.stderr
    assert "Going on from step 15" in done.stderr
    assert [p.name for p in (damaged.path / "damaged").iterdir()] == ["20-0"]
    for name in ("train/loss", "eval/loss", "final/loss"):
        assert damaged.series(name) == whole.series(name)
        assert np.isfinite(whole.series(name)[1]).all()
    assert fm("checkpoint", "verify", damaged.path).returncode == 0
