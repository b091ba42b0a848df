import json
import pathlib

import pytest

from fm_jax import config, configfile
from fm_jax.errors import UserError
from fm_jax.sweeps import outlook, variants, workdir

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
RATE, SEED = "optimizer.learning_rate", "train.seed"


def _base(**sections):
    raw = configfile.load(str(CONFIGS / "quickstart.py")).to_dict()
    return {name: raw[name] | sections.get(name, {}) for name in raw}


def _of_lines(tmp_path, *lines, base=None):
    file = tmp_path / "lines.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return variants.of_file(base or _base(), file)


def test_a_line_is_a_run_of_the_config_with_its_values(tmp_path):
    lines = [{RATE: 0.001, SEED: 3}, {RATE: 0.002}, {"schedule.name": "constant"}]
    asked = _of_lines(tmp_path, *map(json.dumps, lines))
    runs = variants.plan(asked)
    base = _base()
    for index, (one, line) in enumerate(zip(runs, lines, strict=True)):
        changed = configfile.difference(base, one.config)
        assert {key: new for key, (_, new) in changed.items()} == line
        assert (one.index, one.overrides) == (index, line)
        assert one.name == f"{index:03d}-{one.hash[:8]}"
    assert len({one.hash for one in runs}) == len(lines)


def test_a_grid_is_every_combination_the_last_fastest():
    asked = variants.of_grid(_base(), [f"{RATE}=1e-3,2e-3", f"{SEED}=5,6,7"])
    found = [(one.overrides[RATE], one.overrides[SEED]) for one in variants.plan(asked)]
    assert found == [(r, s) for r in (1e-3, 2e-3) for s in (5, 6, 7)]


def test_values_of_a_grid_have_their_keys_types():
    keys = ["model.qk_norm=True,false", "schedule.name=cosine", "mesh.fsdp=1"]
    one, other = variants.plan(variants.of_grid(_base(), keys))
    assert config.check(one.config).model.qk_norm is True
    assert config.check(other.config).model.qk_norm is False
    assert config.check(one.config).schedule.name == "cosine"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2 of .*lines.jsonl must be JSON"),
        ("[1]", "line 2 of .*lines.jsonl must be an object"),
        ('{"optimizer.learning_rat": 1}', "line 2 of .*Did you mean 'optimizer.lea"),
        ('{"optimizer": {"learning_rate": 1}}', "line 2 of .*got 'optimizer'"),
        (f'{{"{RATE}": "high"}}', "line 2 of .*config.optimizer.learning_rate must be"),
        (f'{{"{RATE}": -1.0}}', "line 2 of .*config.optimizer.learning_rate must be"),
        (f'{{"{RATE}": 0.001}}', "line 2 of .*a run of its own; got that of line 1 of"),
        ('{"train.steps": 10, "train.tokens": 1e6}', "line 2 of .*exactly one of"),
    ],
)
def test_a_wrong_line_is_told_with_its_number(tmp_path, line, said):
    with pytest.raises(UserError, match=said):
        variants.plan(_of_lines(tmp_path, f'{{"{RATE}": 0.001}}', line))


@pytest.mark.parametrize(
    "lines",
    [
        ('{"optimizer.learning_rate": 1}', '{"optimizer.learning_rate": 1.0}'),
        ("{}", '{"train.seed": 0}'),
        ('{"data.paths": []}', "{}"),
    ],
)
def test_the_same_run_in_other_words_is_the_same(tmp_path, lines):
    with pytest.raises(UserError, match=r"line 2 of .*got that of line 1"):
        variants.plan(_of_lines(tmp_path, *lines))


def test_files_and_grids_that_are_none_are_refused(tmp_path):
    with pytest.raises(UserError, match="must be a file of JSON lines; got"):
        variants.of_file(_base(), tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="must have a run a line; got none"):
        _of_lines(tmp_path, "")
    with pytest.raises(UserError, match=r"--grid must be section.key=VALUE"):
        variants.of_grid(_base(), [RATE])
    with pytest.raises(UserError, match=r"each key once; got train.seed twice"):
        variants.of_grid(_base(), ["train.seed=1,2", "train.seed=3"])
    with pytest.raises(UserError, match=r"line 1 of .*must be JSON; got a key twice"):
        _of_lines(tmp_path, '{"train.seed": 1, "train.seed": 2}')
    with pytest.raises(UserError, match=r"--grid at .*config key must be one of"):
        variants.plan(variants.of_grid(_base(), ["train.sed=1"]))


def test_one_duration_takes_the_place_of_another(tmp_path):
    (one,) = variants.plan(_of_lines(tmp_path, '{"train.tokens": 1e6}'))
    train = config.check(one.config).train
    assert (train.steps, train.tokens) == (0, 1e6)
    per_step = train.batch_size * config.check(one.config).data.max_length
    assert one.steps == -(-1_000_000 // per_step)
    assert one.tokens == one.steps * per_step


def test_what_the_data_alone_can_tell_is_left_open(tmp_path):
    (epochs,) = variants.plan(_of_lines(tmp_path, '{"train.epochs": 2.0}'))
    assert epochs.params and (epochs.steps, epochs.tokens, epochs.flops) == (0, 0, 0.0)
    line = '{"data.tokenizer": "some/tokenizer.json"}'
    (strange,) = variants.plan(_of_lines(tmp_path, line))
    assert (strange.params, strange.steps) == ({}, 0)
    assert "in 0 of them" in outlook.variants([strange])[-1]


def test_what_changes_no_number_is_a_run_of_its_own_too(tmp_path):
    lines = ['{"train.accumulation": 1}', '{"train.accumulation": 2}']
    one, other = variants.plan(_of_lines(tmp_path, *lines))
    assert configfile.fingerprint(one.config) == configfile.fingerprint(other.config)
    assert one.hash != other.hash


def test_more_lines_are_added_and_keep_the_names_of_the_first(tmp_path):
    lines = [json.dumps({SEED: seed}) for seed in (1, 2, 3)]
    first = workdir.write(_of_lines(tmp_path, *lines[1:]), tmp_path / "s")
    runs = workdir.write(_of_lines(tmp_path, *lines), tmp_path / "s")
    names = {one.overrides[SEED]: one.name for one in runs}
    assert [names[2], names[3]] == [one.name for one in first]
    assert names[1].startswith("002-")
    with pytest.raises(UserError, match="the same config with other values"):
        workdir.write(_of_lines(tmp_path, *lines[:1]), tmp_path / "s")


def test_a_file_of_runs_is_not_written_over_by_another(tmp_path):
    """Beside an --out, which may lie where there is more, nothing else says so."""
    folder = tmp_path / "s"
    folder.mkdir()
    (folder / "notes.txt").touch()
    asked = _of_lines(tmp_path, json.dumps({SEED: 1}))
    runs = workdir.planned(asked, folder, must_be_free=False)
    workdir.write_plan(asked, folder, runs)
    (folder / workdir.PLAN).unlink()  # the file alone was copied
    other = _of_lines(tmp_path, json.dumps({SEED: 2}))
    with pytest.raises(UserError, match="must be this sweep's"):
        workdir.planned(other, folder, must_be_free=False)
    assert workdir.planned(asked, folder, must_be_free=False) == runs
