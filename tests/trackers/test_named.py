"""What may be asked for by name, and what a tracker is told of a run."""

import importlib.machinery
import importlib.util
import subprocess
import sys

import pytest

from fm_jax.errors import UserError
from fm_jax.trackers import named

RECORD = {
    "config": {"data": {"paths": ("https://me:hunter22@example.com/a", "b")},
               "train": {"steps": 20}, "model": {"num_experts_per_token": 2}},
    "resolved": {"run_id": "my run-1a2b", "init": None, "steps": 20,
                 "params": {"total": 7}, "tokens_per_step": 128.0, "more": 1},
    "history": [{"time": "2024-01-01", "command": ["fm", "train"]}],
}  # fmt: skip


@pytest.fixture
def found(monkeypatch):
    """Let every library be installed but those of the set that is returned."""
    absent = set()

    def find(name):
        if name in absent:
            return None
        return importlib.machinery.ModuleSpec(name, None, origin=f"{name}.py")

    monkeypatch.setattr(importlib.util, "find_spec", find)
    return absent


def test_names_are_taken_once_and_in_order(found):
    assert named.check(["wandb", "mlflow", "wandb"]) == ("wandb", "mlflow")
    assert named.check([]) == ()


def test_a_name_that_is_not_known(found):
    with pytest.raises(UserError) as caught:
        named.check(["wandb", "mlfow"])
    assert str(caught.value) == (
        "--track must be one of the known names; got 'mlfow'. Did you mean 'mlflow'? "
        "Known: mlflow, wandb"
    )


def test_a_tracker_that_is_not_installed(found):
    found |= {"sqlalchemy", "alembic"}
    assert named.check(["wandb"]) == ("wandb",)
    with pytest.raises(UserError) as caught:
        named.check(["wandb", "mlflow"])
    assert str(caught.value) == (
        "--track=mlflow must have its libraries; got no sqlalchemy, alembic. pip "
        "install 'fm_jax[mlflow]'"
    )


def test_the_folder_that_a_library_made_here_is_not_that_library(tmp_path):
    (tmp_path / "no_such_library").mkdir()
    code = (
        "from fm_jax.trackers import named\n"
        "named.LIBRARIES['wandb'] = ('no_such_library',)\n"
        "named.check(['wandb'])\n"
    )
    root = named.__file__.rsplit("/", 3)[0]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(1, {root!r})\n{code}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "got no no_such_library" in done.stderr


def test_neither_is_imported_to_see_if_it_is_there():
    code = (
        "import sys\nfrom fm_jax.trackers import named\n"
        "try: named.check(['wandb', 'mlflow'])\n"
        "except ValueError: pass\n"
        "print([m for m in ('wandb', 'mlflow', 'jax', 'torch') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_a_tracker_is_told_the_config_without_secrets(tmp_path):
    told = named.told(tmp_path / "my run", RECORD)
    assert told["config"] == {
        "data.paths": ["https://[left out]@example.com/a", "b"],
        "train.steps": 20,
        "model.num_experts_per_token": 2,
        "resolved.steps": 20,
        "resolved.params.total": 7,
        "resolved.tokens_per_step": 128.0,
        "resolved.init": None,
    }
    assert told["name"] == "my run"
    assert told["path"] == str(tmp_path / "my run")


def test_an_id_stays_when_the_run_goes_on_and_is_no_other_run_s(tmp_path):
    def told(*history):
        return named.told(tmp_path / "run", RECORD | {"history": list(history)})["id"]

    first, second = {"time": "2024-01-01"}, {"time": "2024-01-02"}
    assert told(first) == told(first, second) != told(second)
    assert told(first).startswith("my-run-1a2b-")  # neither place takes a space
