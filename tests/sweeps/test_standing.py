"""Where the runs of a sweep are, as their folders tell, whatever ran them."""

import json
import pathlib

import pytest

from fm_jax import configfile
from fm_jax.runs import Run
from fm_jax.sweeps import records, standing, sweep, task, variants, workdir
from tests import folders

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


@pytest.fixture
def seeds(tmp_path):
    """The folder of a sweep of four seeds, and its runs."""
    raw = configfile.load(str(CONFIGS / "quickstart.py")).to_dict()
    asked = variants.of_grid(raw, ["train.seed=1,2,3,4"])
    return tmp_path, workdir.write(asked, tmp_path)


def _path(folder, one):
    return workdir.run_path(folder, one.name)


def _states(folder):
    return [line.state for line in standing.read(folder)[1]]


def _commands(folder):
    return [line for line in standing.table(folder, "f") if "sbatch" in line]


def test_a_task_that_was_refused_has_failed_with_its_reason(seeds):
    folder, runs = seeds
    task.refused(folder, runs[2], "config.data.paths must be files; got none.")
    assert _states(folder) == ["waiting", "waiting", "failed", "waiting"]
    said = "\n".join(standing.table(folder, "f"))
    assert "config.data.paths must be files" in said
    assert _commands(folder) == [
        "sbatch --array=2%16 launch/slurm/sweep.sbatch f",
        "sbatch --array=0-3%16 launch/slurm/sweep.sbatch f",
    ]
    task.begins(folder, runs[2])
    assert _states(folder) == ["waiting"] * 4


def test_a_run_folder_says_more_than_what_was_noted_before_it(seeds):
    folder, runs = seeds
    old = {"state": "failed", "why": "a machine ago"}
    records.write(folder, {one.name: old for one in runs})
    folders.run(_path(folder, runs[0]), seconds=1)
    folders.run(_path(folder, runs[1]), seconds=300)
    assert _states(folder) == ["running", "lost", "failed", "failed"]
    said = "\n".join(standing.table(folder, "f"))
    assert "its machine is gone" in said
    assert _commands(folder)[0].startswith("sbatch --array=1-3%16 ")


def test_a_folder_that_tells_nonsense_hides_no_other(seeds):
    folder, runs = seeds
    broken = _path(folder, runs[1])
    broken.mkdir(parents=True)
    (broken / "config.json").write_text("{}")
    task.refused(folder, runs[3], "no")
    assert _states(folder) == ["waiting", "unreadable", "waiting", "failed"]


def test_what_goes_on_from_a_failed_run_is_submitted_behind_it(tmp_path):
    raw = configfile.load(str(CONFIGS / "sweeps" / "tiny_branches.py")).to_dict()
    runs = workdir.write(sweep.check(raw), tmp_path)
    first = runs[0]
    below = {first.name}
    for one in runs:
        below |= {one.name} if one.parent in below else set()
    task.refused(tmp_path, first, "no")
    repeat, *rest = _commands(tmp_path)
    assert f"--array={first.index}%" in repeat and "--dependency" not in repeat
    waves = [json.dumps(line) for line in rest]
    assert "--dependency" not in waves[0] and "--dependency" in waves[1]
    child = next(one for one in runs if one.parent == first.name)
    first_wave = rest[0].partition("--array=")[2].partition("%")[0].split(",")
    assert str(first.index) in first_wave and str(child.index) not in first_wave
    # Of one that diverged nothing can go on, and nothing is offered.
    (tmp_path / "logs" / f"{first.name}.refused").unlink()
    folders.run(_path(tmp_path, first))
    Run(_path(tmp_path, first)).write("FAILED", "DivergedError: train/loss\n")
    states = dict(zip([o.name for o in standing.read(tmp_path)[0]], _states(tmp_path),
                      strict=True))  # fmt: skip
    assert states[first.name] == "diverged"
    assert {states[name] for name in below - {first.name}} == {"blocked"}
    asked = set()
    for line in _commands(tmp_path):
        for part in line.partition("--array=")[2].partition("%")[0].split(","):
            a, _, b = part.partition("-")
            asked |= set(range(int(a), int(b or a) + 1))
    assert asked == {one.index for one in runs if one.name not in below}
