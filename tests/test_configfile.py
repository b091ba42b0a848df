"""Tests of config files: how they load, differ, and name a run."""

import hashlib
import json
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from fm_jax import configfile
from fm_jax.errors import UserError
from fm_jax.runs import Run

VARIANTS = """
from ml_collections import ConfigDict

def get_config(size="small"):
    config = ConfigDict()
    config.model = ConfigDict({"num_layers": {"small": 2, "large": 9}[size]})
    return config
"""


@pytest.fixture
def write(tmp_path):
    """Return `write(text, name)`, which makes a file and returns its path."""

    def make(text, name="tiny.py"):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return make


def _mistake(path):
    with pytest.raises(UserError) as error:
        configfile.load(path)
    return str(error.value)


# ---- load


def test_a_python_file_gives_what_its_get_config_returns(write):
    found = configfile.load(write(VARIANTS))
    assert isinstance(found, ConfigDict)
    assert found.to_dict() == {"model": {"num_layers": 2}}


def test_what_follows_the_colon_is_given_to_get_config(write):
    path = write(VARIANTS)
    assert configfile.load(f"{path}:large").model.num_layers == 9
    assert configfile.load(f"{path}:").model.num_layers == 2


def test_a_run_gives_the_config_that_it_was_begun_with(write, tmp_path):
    config = {"model": {"num_layers": 3}, "data": {"paths": ["a"], "rules": [["b", 0]]}}
    file = write(json.dumps({"config": config, "history": []}), "config.json")
    # What it lacks is newer than the run, and stands at its default.
    expected = configfile.load_base()
    expected["model"] |= {"num_layers": 3}
    expected["data"] |= {"paths": ("a",), "rules": (("b", 0),)}
    assert configfile.load(file).to_dict() == expected
    assert configfile.load(str(tmp_path)).to_dict() == expected


def test_an_older_run_is_read_with_what_is_newer_at_its_default(tmp_path):
    base = configfile.load_base()
    full = base | {"train": base["train"] | {"steps": 3}}
    older = {name: keys for name, keys in full.items() if name not in ("init", "log")}
    older["model"] = {k: v for k, v in full["model"].items() if k != "qk_norm"}
    run = Run(tmp_path / "old")
    run.begin()
    record = {"config": older, "history": [], "changed_from_base": {}, "data": {}}
    resolved = {"steps": 3, "model": {"embed_dim": 9}}
    run.write_config(record | {"resolved": resolved})
    found = configfile.read_run(run)
    assert found["config"] == full
    assert found["resolved"] == {
        "run_id": f"old-{configfile.fingerprint(full)[:8]}",
        "init": None,
        "steps": 3,
        "model": full["model"] | {"embed_dim": 9},
    }
    began = {"path": "/runs/first", "run_id": "first-87654321", "step": 4}
    began |= {"tokens": 64.0, "with_optimizer": True}
    kept = {"run_id": "first-12345678", "init": began}
    run.write_config(record | {"resolved": resolved | kept})
    assert found["resolved"] | kept == configfile.read_run(run)["resolved"]


def test_the_rules_of_runs_begun_before_experts_are_still_the_default():
    """Another default would refuse to go on with every run that stood at this one."""
    rules = configfile.load_base()["optimizer"]["decay_rules"]
    assert rules == (("norm|bias|embedding", False), (".*", True))


def test_a_run_is_called_by_its_folder_its_config_and_its_beginning(
    tmp_path, monkeypatch
):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    plain = configfile.run_id(Path("."), RAW)
    assert plain == configfile.run_id(tmp_path / "here", RAW)
    assert plain == f"here-{configfile.fingerprint(RAW)[:8]}"
    begun = {configfile.run_id(Path("."), RAW, {"step": n}) for n in (1, 2)}
    assert len({plain, *begun}) == 3


def test_the_written_config_of_base_loads_as_it_was(write):
    base = configfile.load_base()
    file = write(json.dumps({"config": base}), "config.json")
    assert configfile.load(file).to_dict() == base


def test_a_file_that_is_missing_is_refused_with_those_beside_it(write, tmp_path):
    write(VARIANTS)
    write(VARIANTS, "other.py")
    path = tmp_path / "tinny.py"
    near, far = tmp_path / "tiny.py", tmp_path / "other.py"
    assert _mistake(f"{path}:large") == (
        f"--config must be one of the known names; got {str(path)!r}. "
        f"Did you mean {str(near)!r}? Known: {near}, {far}"
    )


def test_a_file_that_is_missing_from_an_empty_place_is_refused(tmp_path):
    path = str(tmp_path / "nowhere" / "tiny.py")
    assert _mistake(path) == (
        f"--config must be a file; got {path!r}, which does not exist."
    )


@pytest.mark.parametrize(
    "text, raised",
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def f(:", "SyntaxError: invalid syntax (tiny.py, line 1)"),
        ("import nothing_here", "ModuleNotFoundError: No module named 'nothing_here'"),
        (
            "x = 1",
            "AttributeError: module 'config_tiny' has no attribute 'get_config'",
        ),
        ("def get_config():\n    raise KeyError('size')", "KeyError: size"),
    ],
)
def test_a_file_that_raises_is_refused_with_its_reason(text, raised, write):
    path = write(text)
    assert _mistake(path) == (
        "--config must be a file whose get_config() returns a ConfigDict; got "
        f"{path!r}, which raised {raised}"
    )


def test_a_variant_that_is_not_there_is_refused(write):
    path = write(VARIANTS) + ":huge"
    assert _mistake(path) == (
        "--config must be a file whose get_config('huge') returns a ConfigDict; got "
        f"{path!r}, which raised KeyError: huge"
    )


def test_a_users_mistake_within_a_file_stays_as_it_is(write):
    path = write(
        "from fm_jax.errors import UserError\n"
        "def get_config():\n    raise UserError('size must be small')"
    )
    assert _mistake(path) == "size must be small"


def test_a_get_config_of_something_else_is_refused(write):
    path = write("def get_config():\n    return {}")
    assert _mistake(path) == (
        f"get_config must return a ConfigDict; got <class 'dict'> from {path!r}."
    )


def test_json_that_is_broken_is_refused(write, tmp_path):
    path = write('{"config": ', "config.json")
    assert _mistake(str(tmp_path)) == (
        f"{path} must be a JSON file written by a run; got Expecting value: "
        "line 1 column 12 (char 11)."
    )


@pytest.mark.parametrize("text", ['{"model_type": "gpt2"}', "[1]", '{"config": 3}'])
def test_json_without_a_config_is_refused(text, write):
    path = write(text, "config.json")
    assert _mistake(path) == (
        f"--config must be a config file or a run; got {path!r}, whose JSON holds no "
        "config."
    )


def test_json_that_cannot_be_read_is_refused(tmp_path):
    path = tmp_path / "missing.json"
    with pytest.raises(UserError) as error:
        configfile.read_json(path)
    assert str(error.value) == (
        f"{path} must be a JSON file written by a run; got [Errno 2] No such file or "
        f"directory: '{path}'."
    )


# ---- flat, difference, fingerprint

RAW = {
    "model": {"num_layers": 4, "dtype": "float32"},
    "data": {"paths": ("a", "b"), "cache_dir": "~/c"},
    "train": {"steps": 10, "batch_size": 3},
    "optimizer": {"decay_rules": (("bias", False), (".*", True))},
}


def _with(key, value):
    section, name = key.split(".")
    return RAW | {section: RAW.get(section, {}) | {name: value}}


def test_a_flat_config_has_dotted_keys():
    assert configfile.flat({"a": {"b": {"c": 1}, "d": (2,)}, "e": {}, "f": None}) == {
        "a.b.c": 1,
        "a.d": (2,),
        "f": None,
    }


def test_a_difference_holds_the_old_and_the_new_value_of_changed_keys():
    new = {
        "model": {"num_layers": 6, "dtype": "float32", "norm": "rmsnorm"},
        "data": {"paths": ("a", "b")},
    }
    old = {"model": {"num_layers": 4, "dtype": "float32"}, "data": RAW["data"]}
    assert configfile.difference(old, new) == {
        "data.cache_dir": ("~/c", None),
        "model.norm": (None, "rmsnorm"),
        "model.num_layers": (4, 6),
    }


def test_a_config_does_not_differ_from_itself_read_back_as_json():
    assert configfile.difference(RAW, json.loads(json.dumps(RAW))) == {}


@pytest.mark.parametrize(
    "key, value",
    [
        ("checkpoint.every", 7),
        ("eval.batch_size", 7),
        ("log.every", 7),
        ("mesh.fsdp", 2),
        ("sample.prompt", "x"),
        ("data.cache_dir", "/c"),
        ("init.from", "runs/a@3"),
        ("train.compile_cache", ""),
        ("train.steps", 20),
        ("train.tokens", 1e6),
        ("train.epochs", 2.0),
        ("train.tokens_per_param", 20.0),
    ],
)
def test_what_may_change_is_not_in_the_fingerprint(key, value):
    assert configfile.may_change(key)
    assert configfile.fingerprint(_with(key, value)) == configfile.fingerprint(RAW)


@pytest.mark.parametrize(
    "key, value",
    [
        ("model.num_layers", 5),
        ("model.dtype", "bfloat16"),
        ("data.paths", ("a",)),
        ("data.eval_paths", ("a",)),
        ("train.batch_size", 4),
        ("train.seed", 1),
        ("optimizer.decay_rules", ((".*", True),)),
        ("schedule.name", "wsd"),
    ],
)
def test_every_other_key_is_in_the_fingerprint(key, value):
    assert not configfile.may_change(key)
    assert configfile.fingerprint(_with(key, value)) != configfile.fingerprint(RAW)


def test_what_came_later_does_not_name_a_config_of_before_anew():
    """Golden: what base was called before any of YOUNGER was a key of it."""
    base = configfile.load_base()
    assert configfile.fingerprint(base) == "e012101eaa564bfe"
    assert configfile.fingerprint(json.loads(json.dumps(base))) == "e012101eaa564bfe"
    defaults = configfile.flat(base)
    assert {key: defaults[key] for key in configfile.YOUNGER} == configfile.YOUNGER


@pytest.mark.parametrize("key", configfile.YOUNGER)
def test_a_younger_key_at_another_value_is_in_the_fingerprint(key):
    default = configfile.YOUNGER[key]
    same, other = (
        configfile.fingerprint(_with(key, value)) for value in (default, ("other",))
    )
    assert same == configfile.fingerprint(RAW) != other


@pytest.mark.parametrize("key, value", [("train.steps", 20), ("init.from", "runs/a")])
def test_new_runs_are_told_apart_by_how_long_and_from_where(key, value):
    new, old = (
        configfile.fingerprint(raw, with_duration=True)
        for raw in (_with(key, value), RAW)
    )
    assert new != old


def test_only_these_keys_of_base_may_change():
    base = configfile.flat(configfile.load_base())
    free = {key for key in base if configfile.may_change(key)}
    sections = ("checkpoint", "eval", "log", "mesh", "sample")
    assert {key for key in free if key.split(".")[0] not in sections} == {
        "data.cache_dir",
        "data.num_workers",
        "init.from",
        "model.remat",
        "model.remat_names",
        "train.accumulation",
        "train.compile_cache",
        "train.loss_chunk",
        "train.max_skips",
        "train.steps",
        "train.tokens",
        "train.epochs",
        "train.tokens_per_param",
    }
    assert all(key in free for key in base if key.split(".")[0] in sections)


def test_a_fingerprint_does_not_depend_on_the_order_of_keys_or_on_json():
    backwards = {name: dict(reversed(RAW[name].items())) for name in reversed(RAW)}
    assert configfile.fingerprint(backwards) == configfile.fingerprint(RAW)
    read_back = json.loads(json.dumps(RAW))
    assert configfile.fingerprint(read_back) == configfile.fingerprint(RAW)


def test_a_fingerprint_is_the_start_of_the_digest_of_sorted_json():
    text = (
        '{"data.paths": ["a", "b"], "model.dtype": "float32", "model.num_layers": 4, '
        '"optimizer.decay_rules": [["bias", false], [".*", true]], '
        '"train.batch_size": 3}'
    )
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert configfile.fingerprint(RAW) == digest[:16] == "4f5df00335a13b15"
