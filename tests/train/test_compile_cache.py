"""A compile cache that was damaged costs a run time, and changes nothing in it."""

import pytest

from fm_jax.runs import Run

SMALL = (
    "--config.train.steps=3",
    "--config.eval.every=0",
    "--config.model.num_layers=1",
    "--config.sample.num_tokens=1",
)


@pytest.fixture
def train(fm, tiny, tmp_path):
    """Return `train(name)`: the run of that name, its losses and what it printed."""

    def train(name):
        run = Run(tmp_path / name)
        flags = [*SMALL, f"--config.train.compile_cache={tmp_path / 'programs'}"]
        done = fm("train", *tiny, *flags, f"--workdir={run.path}",
                  JAX_COMPILATION_CACHE_DIR="")  # fmt: skip
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
