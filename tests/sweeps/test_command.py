import os
import pathlib
import types

import pytest

from fm_jax import configfile
from fm_jax.errors import UserError
from fm_jax.sweeps import command, runner

ROOT = pathlib.Path(__file__).parent.parent.parent
CONFIG = ROOT / "configs" / "sweeps" / "tiny_isoflop.py"


def _sweep(**given):
    flags = {
        "config_file": str(CONFIG),
        "workdir": "",
        "dry_run": False,
        "overrides": "",
        "grid": [],
        "out": "",
        "parallel": 1,
        "mfu": 0.4,
        "fit": "",
    }
    if given.pop("quickstart", False):
        flags["config_file"] = str(ROOT / "configs" / "quickstart.py")
    raw = configfile.load(str(flags["config_file"])).to_dict()
    return command.sweep(raw, types.SimpleNamespace(**flags | given))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"workdir": "sweeps/a:b"}, "--workdir must have no colon in its path; got /"),
        ({"out": "a/b.jsonl"}, "--out must be a sweep.jsonl, in a folder of its swe"),
        ({"out": "a/sweep.jsonl", "workdir": "a"}, "must not be given both: the runs"),
        ({"out": "a:b/sweep.jsonl"}, "--out must have no colon in its path; got /"),
        ({"grid": ["train.seed=1"]}, "--config must be a run's, as configs/quicksta"),
        ({"overrides": "x.jsonl"}, "--config must be a run's, as configs/quickstart"),
        (
            {"quickstart": True},
            "--config must be a sweep's, as .*--grid or --overrides",
        ),
        ({"config_file": ""}, "--config or --workdir must be given: what to plan, or"),
        (
            {"config_file": "", "dry_run": True, "workdir": "a"},
            "must be given with --out and --dry_r",
        ),
        ({"config_file": "", "workdir": "a"}, "must be a sweep.jsonl or the folder"),
        ({"parallel": 0}, "--parallel must be >= 1; got 0"),
        ({"mfu": 1.5}, "--mfu must be above 0 and at most 1; got 1.5"),
    ],
)
def test_mistakes_are_told_before_anything_is_made(tmp_path, monkeypatch, given, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said):
        _sweep(**given)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_the_same_however_it_is_spelled(tmp_path, monkeypatch):
    here = tmp_path / "home" / "here"
    here.mkdir(parents=True)
    (tmp_path / "link").symlink_to(here)
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    found = []
    monkeypatch.setattr(
        runner, "run", lambda sweep, folder, **given: found.append(folder) or 7
    )
    for spelled in ("", "sweeps/tiny_isoflop", "~/here/sweeps/tiny_isoflop",
                    "../here/./sweeps/tiny_isoflop",
                    f"{tmp_path}/link/sweeps/tiny_isoflop"):  # fmt: skip
        assert _sweep(workdir=spelled) == 7
    assert {os.fspath(folder) for folder in found} == {f"{here}/sweeps/tiny_isoflop"}
