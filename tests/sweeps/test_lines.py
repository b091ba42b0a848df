import json
import pathlib

import pytest

from fm_jax import configfile
from fm_jax.errors import UserError
from fm_jax.runs import Run
from fm_jax.sweeps import arrays, lines, sweep, task, variants, workdir

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


@pytest.fixture
def branches(tmp_path):
    """The folder of a sweep with trunks and branches, and its runs."""
    raw = configfile.load(str(CONFIGS / "sweeps" / "tiny_branches.py")).to_dict()
    return tmp_path, workdir.write(sweep.check(raw), tmp_path)


@pytest.fixture
def seeds(tmp_path):
    """The folder of a sweep of three seeds, and its runs."""
    raw = configfile.load(str(CONFIGS / "quickstart.py")).to_dict()
    asked = variants.of_grid(raw, ["train.seed=1,2,3"])
    return tmp_path, workdir.write(asked, tmp_path)


def _change(folder, number, **keys):
    file = folder / "sweep.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[number] |= keys
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_runs_are_read_back_as_they_were_planned(branches):
    folder, runs = branches
    found = lines.read(folder)
    assert [one.name for one in found] == [one.name for one in runs]
    for one, planned in zip(found, runs, strict=True):
        assert not configfile.difference(one.config, planned.config)
        assert vars(one) | {"config": 0, "overrides": 0} == vars(planned) | {
            "config": 0,
            "overrides": 0,
        }


def test_a_file_or_its_folder_names_a_sweep(seeds):
    folder, _ = seeds
    assert lines.find(str(folder)) == lines.find(str(folder / "sweep.jsonl")) == folder
    for wrong in (folder / "other.jsonl", folder / "none"):
        with pytest.raises(UserError, match=r"must be a sweep.jsonl or the folder"):
            lines.find(str(wrong))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"index": 2}, "index of line 2 of .* must be 1, its place; got 2"),
        ({"name": "../x"}, "must be|must name runs"),
        ({"name": "001-a b"}, "must name runs as"),
        ({"config": {"train": {"sed": 1}}}, "line 2 of .*config.train key"),
        ({"config": {"train": {"a b": 1}}}, "line 2 of .*must be a name"),
        ({"config": 3}, "config of line 2 of .* must be an object"),
        ({"parent": "002-none"}, "line 2 of .*go on from a line before it"),
        ({"steps": "many"}, "steps of line 2 of .* must be a whole number"),
        ({"steps": 5, "params": {}}, "line 2 of .*must have params with steps"),
        ({"steps": 5, "branch_step": 5}, "line 2 of .*begin before its last step"),
        ({"steps": -4}, "line 2 of .*begin before its last step; got steps -4"),
    ],
)
def test_a_line_that_is_wrong_is_told_with_its_number(seeds, keys, said):
    folder, _ = seeds
    _change(folder, 1, **keys)
    with pytest.raises(UserError, match=said):
        lines.read(folder)


def test_a_file_that_was_cut_is_refused_whole(seeds):
    folder, _ = seeds
    file = folder / "sweep.jsonl"
    for cut in (1, 30):
        whole = file.read_bytes()
        file.write_bytes(whole[:-cut])
        with pytest.raises(UserError, match="must end with a whole line; got one cut"):
            lines.read(folder)
        file.write_bytes(whole)
    file.write_bytes(b"")
    with pytest.raises(UserError, match="must have a run a line; got none"):
        lines.read(folder)


def test_a_line_does_not_say_where_programs_are_kept(seeds):
    folder, runs = seeds
    config = json.loads(json.dumps(runs[0].config))
    config["train"]["compile_cache"] = "/tmp/theirs"
    _change(folder, 0, config=config)
    assert lines.read(folder)[0].config["train"]["compile_cache"] == (
        configfile.own_cache()
    )


@pytest.mark.parametrize(
    ("given", "environ", "index"),
    [
        (4, {"FM_SWEEP_INDEX": "1"}, 4),
        (-1, {"FM_SWEEP_INDEX": "1", "SLURM_ARRAY_TASK_ID": "2"}, 1),
        (-1, {"SLURM_ARRAY_TASK_ID": "2", "JOB_COMPLETION_INDEX": "3"}, 2),
        (-1, {"JOB_COMPLETION_INDEX": "0"}, 0),
    ],
)
def test_the_array_says_which_line_a_task_runs(given, environ, index):
    assert task.index_of(given, environ) == index


def test_a_task_that_is_told_no_line_or_none_that_is_says_so(seeds):
    folder, _ = seeds
    with pytest.raises(UserError, match="must be told which line"):
        task.index_of(-1, {})
    with pytest.raises(UserError, match="FM_SWEEP_INDEX must be a whole number"):
        task.index_of(-1, {"FM_SWEEP_INDEX": "-1"})
    with pytest.raises(UserError, match="--index must be >= 0; got -4"):
        task.index_of(-4, {"FM_SWEEP_INDEX": "1"})
    with pytest.raises(UserError, match=r"below 3, .*got 3. An array of all is 0-2"):
        task.find(folder, 3)


def test_a_branch_waits_for_its_trunk(branches):
    folder, runs = branches
    child = next(one for one in runs if one.parent)
    with pytest.raises(UserError, match=r"which is not done. Run that one first"):
        task.find(folder, child.index)
    parent = next(one for one in runs if one.name == child.parent)
    path = workdir.run_path(folder, parent.name)
    path.mkdir(parents=True)
    Run(path).write("DONE", f"{parent.steps - 1}\n")
    with pytest.raises(UserError, match="which is not done"):
        task.find(folder, child.index)
    Run(path).write("DONE", f"{parent.steps}\n")
    found = task.find(folder, child.index)
    begin = workdir.config_of(folder, found)["init"]["from"]
    assert begin == f"{path}@{child.branch_step}"


def test_indices_are_written_as_ranges():
    assert arrays.ranges([7, 0, 1, 2, 5, 8]) == "0-2,5,7-8"
    assert arrays.ranges([3]) == "3"


def test_an_array_is_one_command_and_larger_ones_are_cut(seeds):
    _, runs = seeds
    many = [type(runs[0])(**vars(runs[0]) | {"index": i, "name": f"{i}-x"})
            for i in range(1200)]  # fmt: skip
    names = {one.name for one in many} - {"1000-x"}
    begin = "launch/slurm/sweep.sbatch 'a b/sweep.jsonl'"
    assert arrays.commands(many, names, "a b/sweep.jsonl") == [
        f"sbatch --array=0-999%16 {begin}",
        f"FM_SWEEP_OFFSET=1000 sbatch --array=1-199%16 {begin}",
    ]
    assert arrays.commands(many, [], "x") == []


def test_what_goes_on_from_others_is_submitted_to_wait_for_them(branches):
    _, runs = branches
    said = arrays.commands(runs, {one.name for one in runs}, "f")
    assert said[0].startswith("JOBS=$(sbatch --parsable --array=")
    assert all("--dependency=afterany:$JOBS " in line for line in said[1:])
    wave = {}
    for number, line in enumerate(said):
        listed = line.partition("--array=")[2].partition("%")[0]
        for part in listed.split(","):
            first, _, last = part.partition("-")
            for index in range(int(first), int(last or first) + 1):
                assert wave.setdefault(index, number) == number
    assert sorted(wave) == list(range(len(runs)))
    place = {one.name: wave[one.index] for one in runs}
    assert all(place[one.parent] < place[one.name] for one in runs if one.parent)
    # Alone, its parent done, it need not wait.
    child = next(one for one in runs if one.parent)
    (alone,) = arrays.commands(runs, {child.name}, "f")
    assert alone == f"sbatch --array={child.index}%16 {arrays.SCRIPT} f"
