"""A small corpus, a config that reads it, and stores made of it by the command line."""

import pathlib

import numpy as np
import pytest

from fm_jax import cli, flags
from fm_jax import config as configs
from fm_jax.commands.listed import COMMANDS

ROOT = pathlib.Path(__file__).parent.parent.parent
WORDS = {
    "animals": ("the", "cat", "sat", "on", "a", "mat", "and", "saw", "another", "run"),
    "numbers": ("one", "two", "three", "four", "five", "six", "seven", "eight"),
}


@pytest.fixture(scope="session")
def words() -> dict[str, tuple[str, ...]]:
    """Return the words that each corpus is of."""
    return WORDS


@pytest.fixture(scope="session")
def corpora(tmp_path_factory) -> dict[str, pathlib.Path]:
    """Return folders of texts, by what they are about; of numbers there is less."""
    found = {}
    for (name, words), count in zip(WORDS.items(), (60, 30), strict=True):
        rng = np.random.default_rng(count)
        folder = found[name] = tmp_path_factory.mktemp("corpora") / name
        folder.mkdir()
        for index in range(count):
            text = " ".join(rng.choice(words, int(rng.integers(5, 90))))
            (folder / f"{index:02d}.txt").write_text(text)
    return found


@pytest.fixture(scope="session")
def flags_of(corpora, tmp_path_factory):
    """Return `flags_of(name, **values)`: the command line of a config of one corpus."""
    cache = tmp_path_factory.mktemp("cache")

    def flags_of(name, **values):
        defaults = {
            "data__source": "text",
            "data__paths": (str(corpora[name]),),
            "data__eval_fraction": 0.3,
            "data__tokenizer": "bytes",
            "data__max_length": 17,
            "data__cache_dir": str(cache),
            "train__batch_size": 6,
            "train__steps": 11,
            "train__seed": 5,
        }
        given = (defaults | values).items()
        return [
            f"--config={ROOT}/configs/quickstart.py",
            *(f"--config.{key.replace('__', '.')}={value}" for key, value in given),
        ]

    return flags_of


@pytest.fixture(scope="session")
def config_of(flags_of):
    """Return `config_of(name, **values)`: that config, checked."""
    return lambda name, **values: configs.check(
        flags.parse(COMMANDS["train"], flags_of(name, **values))[1]
    )


@pytest.fixture(scope="session")
def stores(flags_of, tmp_path_factory) -> dict[str, pathlib.Path]:
    """Return a folder with the stores `train` and `eval` of each corpus."""
    folder = tmp_path_factory.mktemp("stores")
    for name in WORDS:
        assert (
            cli.main(["data", "build", *flags_of(name), f"--out={folder / name}"]) == 0
        )
    return {name: folder / name for name in WORDS}


@pytest.fixture
def mixed(stores, config_of):
    """Return `mixed(**values)`: a config of both corpora's stores, animals first."""

    def mixed(**values):
        return config_of(
            "animals",
            **{
                "data__source": "store",
                "data__tokenizer": "store",
                "data__paths": tuple(map(str, stores.values())),
            }
            | values,
        )

    return mixed
