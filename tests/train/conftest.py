"""A small corpus and a way to run `fm` on it, as a user would."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "saw", "another", "run", "after")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> pathlib.Path:
    """Return a folder of forty short texts."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for index in range(40):
        count = int(rng.integers(20, 200))
        (folder / f"{index}.txt").write_text(" ".join(rng.choice(WORDS, count)))
    return folder


@pytest.fixture(scope="session")
def tiny(corpus, tmp_path_factory) -> list[str]:
    """Return flags of a run that takes a few seconds."""
    cache = tmp_path_factory.mktemp("cache")
    return [
        f"--config={ROOT}/configs/quickstart.py",
        "--config.data.source=text",
        f"--config.data.paths=('{corpus}',)",
        "--config.data.eval_fraction=0.2",
        "--config.data.tokenizer=bytes",
        "--config.data.max_length=16",
        f"--config.data.cache_dir={cache}",
        "--config.model.num_layers=2",
        "--config.model.num_heads=2",
        "--config.model.embed_dim=16",
        "--config.model.mlp_dim=24",
        "--config.model.dtype=float32",
        "--config.train.batch_size=8",
        "--config.train.steps=20",
        "--config.optimizer.learning_rate=0.01",
        "--config.eval.every=10",
        "--config.eval.batch_size=8",
        "--config.eval.max_batches=2",
        "--config.checkpoint.every=5",
        "--config.log.every=1",
        "--config.sample.num_tokens=8",
    ]


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """Return the environment of a run on one simulated device, compiles cached."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache" / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "COLUMNS": "200",
        # Simulated devices share a pool, by default a thread for each: a device that
        # waits in two collectives at once holds another's, and all wait for ever.
        "PJRT_NPROC": "64",
    }


@pytest.fixture(scope="session")
def fm(environment):
    """Return `fm(*arguments, **environment)`: the finished process of one command."""

    def run(*arguments, **extra):
        return subprocess.run(
            [sys.executable, "-m", "fm_jax.cli", *map(str, arguments)],
            env=environment | extra,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run


@pytest.fixture(scope="module")
def start(environment, tiny):
    """Return `start(folder, *flags)`, a started fm train; all are gone at the end."""
    children = []

    def do(folder, *flags, **extra):
        command = [sys.executable, "-m", "fm_jax.cli", "train", *tiny, *flags]
        children.append(
            subprocess.Popen(
                [*command, f"--workdir={folder}"],
                env=environment | extra,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return children[-1]

    yield do
    for child in children:
        if child.poll() is None:
            child.kill()
        child.communicate()
