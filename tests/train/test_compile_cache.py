"""A compile cache that was damaged costs a run time, and changes nothing in it."""

import subprocess
import sys

import pytest

from fm_jax.runs import Run

# As fm does, before jax compiles anything.
START = """
import sys
import jax
from fm_jax import cli, sealed
jax.config.update("jax_compilation_cache_dir", sealed.programs_in(sys.argv[1]))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
sys.exit(cli.main(sys.argv[2:]))
"""
SMALL = (
    "--config.train.steps=3",
    "--config.eval.every=0",
    "--config.model.num_layers=1",
    "--config.sample.num_tokens=1",
)


@pytest.fixture
def train(tiny, environment, tmp_path):
    """Return `train(name)`: the run of that name, its losses and what it printed."""
    environ = environment | {"JAX_COMPILATION_CACHE_DIR": ""}

    def train(name):
        run = Run(tmp_path / name)
        done = subprocess.run(
            [sys.executable, "-c", START, tmp_path / "programs", "train", *tiny, *SMALL,
             f"--workdir={run.path}"],
            env=environ, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        losses = [run.series(name)[1] for name in ("train/loss", "final/loss")]
        return losses, done.stderr

    return train


@pytest.mark.slow
def test_a_damaged_compile_cache_changes_no_loss(train, tmp_path):
    """Fault 47, around it: files of the compile cache are flipped, cut and emptied.

    Promise: each is told, removed and compiled again; the losses are the same bits.
    """
    losses, said = train("first")
    assert "is made again" not in said
    files = sorted((tmp_path / "programs").glob("*-cache"))
    assert any("train_step" in file.name for file in files)
    for index, file in enumerate(files):
        raw = bytearray(file.read_bytes())
        raw[len(raw) * 2 // 3] ^= 16
        file.write_bytes((raw, raw[: len(raw) // 2], b"")[index % 3])
    again, said = train("second")
    assert again == losses
    assert said.count("is made again") == len(files)
    assert "Traceback" not in said
    assert sorted((tmp_path / "programs").glob("*-cache")) == files
