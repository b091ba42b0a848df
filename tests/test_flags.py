"""Tests of the flags of each command: their types, overrides and mistakes."""

import pathlib
import re

import pytest

from fm_jax import cli, flags
from fm_jax.cli import COMMANDS
from fm_jax.errors import UserError

CONFIG = """
from ml_collections import ConfigDict

def get_config(variant="small"):
    config = ConfigDict()
    config.model = ConfigDict()
    config.model.num_layers = {"small": 2, "large": 9}[variant]
    config.model.rope_theta = 100.0
    config.model.qk_norm = False
    config.model.use_bias = True
    config.model.norm = "rmsnorm"
    config.data = ConfigDict()
    config.data.paths = ()
    config.data.eval_paths = ("a.txt",)
    config.optimizer = ConfigDict()
    config.optimizer.decay_rules = (("bias", False), (".*", True))
    return config
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Return the name of a small config file in the current folder."""
    (tmp_path / "tiny.py").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    return "tiny.py"


def _config(*argv, command="train"):
    return flags.parse(COMMANDS[command], ["--config=tiny.py", *argv])[1]


def _mistake(command, *argv):
    with pytest.raises(UserError) as error:
        flags.parse(COMMANDS[command], list(argv))
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- the flags of a command


def test_flags_have_the_types_of_their_defaults():
    found, raw = flags.parse(
        COMMANDS["generate"],
        [
            "--run=r",
            "--num_samples=3",
            "--temperature=1",
            "--prompt=a",
            "--prompt",
            "b",
        ],
    )
    expected = {
        "run": "r",
        "step": "latest",
        "prompt": ["a", "b"],
        "num_samples": 3,
        "num_tokens": 128,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 0.95,
        "seed": 0,
        "int8": False,
    }
    assert {name: found.values[name] for name in expected} == expected
    assert isinstance(found.temperature, float)
    assert found.positional == []
    assert raw == {}


@pytest.mark.parametrize("name", COMMANDS)
def test_flags_that_are_not_given_have_their_defaults(name, file):
    command = COMMANDS[name]
    needed = [
        f"--{n}=x" for n, (default, _) in command.flags.items() if default is None
    ]
    config = [f"--config={file}"] if command.takes_config else []
    found, _ = flags.parse(command, needed + config)
    for flag, (default, _) in command.flags.items():
        expected = list(default) if isinstance(default, tuple) else default
        assert getattr(found, flag) == ("x" if default is None else expected)


@pytest.mark.parametrize(
    "argv, expected",
    [
        ([], (False, True)),
        (["--json", "--nostartup"], (True, False)),
        (["--json=true", "--startup"], (True, True)),
        (["--startup", "--nostartup", "--json=false"], (False, False)),
    ],
)
def test_a_bool_flag_needs_no_value_and_has_a_no_form(argv, expected, file):
    found, _ = flags.parse(COMMANDS["bench step"], [f"--config={file}", *argv])
    assert (found.json, found.startup) == expected


def test_positional_arguments_are_kept_for_the_command_that_takes_them():
    found, _ = flags.parse(COMMANDS["report"], ["runs/a", "--out=c.html", "runs/b"])
    assert found.positional == ["runs/a", "runs/b"]
    assert found.out == "c.html"


def test_a_stray_argument_is_refused(file):
    assert _mistake("train", f"--config={file}", "config.model.num_layers=3") == (
        "fm takes no argument 'config.model.num_layers=3' here; flags are written "
        "--flag=value."
    )


def test_an_unknown_flag_is_refused_with_the_nearest(file):
    assert _mistake("train", f"--config={file}", "--workdri=x") == (
        "flag must be one of the known names; got 'workdri'. Did you mean 'workdir'? "
        "Known: workdir, config, coordinator, grace, hang, join_timeout, "
        "num_processes, process_id, rewinds, track"
    )


def test_a_config_is_unknown_to_a_command_that_takes_none():
    assert _mistake("eval", "--run=r", "--config=x").startswith(
        "flag must be one of the known names; got 'config'. "
    )


@pytest.mark.parametrize("argv", [[], ["--run="], ["--prompt=a"]])
def test_a_flag_that_must_be_given_is_asked_for(argv):
    assert _mistake("generate", *argv) == (
        "--run must be given. Example: " + COMMANDS["generate"].example
    )


@pytest.mark.parametrize(
    "flag, reason",
    [
        ("--seed=x", "invalid literal for int() with base 10: 'x'"),
        ("--num_tokens=2.5", "invalid literal for int() with base 10: '2.5'"),
        ("--top_p=high", "could not convert string to float: 'high'"),
    ],
)
def test_a_flag_of_another_type_is_refused(flag, reason):
    assert _mistake("generate", "--run=r", flag) == (
        f"flags must be right; flag {flag}: {reason}"
    )


def test_a_flag_without_its_value_is_refused(file):
    assert _mistake("train", f"--config={file}", "--workdir") == (
        "flags must be right; Missing value for flag --workdir"
    )


# ---- the config


def test_a_config_without_overrides_is_that_of_its_file(file):
    raw = _config()
    assert raw == {
        "model": {
            "num_layers": 2,
            "rope_theta": 100.0,
            "qk_norm": False,
            "use_bias": True,
            "norm": "rmsnorm",
        },
        "data": {"paths": (), "eval_paths": ("a.txt",)},
        "optimizer": {"decay_rules": (("bias", False), (".*", True))},
    }


@pytest.mark.parametrize(
    "argv",
    [
        ["--config=tiny.py"],
        ["--config", "tiny.py"],
        ["-config=tiny.py"],
        ["--workdir=w", "--config", "tiny.py"],
        ["--config=missing.py", "--config=tiny.py"],
    ],
)
def test_the_config_may_be_given_in_these_ways(argv, file):
    found, raw = flags.parse(COMMANDS["train"], argv)
    assert found.config_file == "tiny.py"
    assert raw["model"]["num_layers"] == 2


def test_a_variant_follows_the_file(file):
    found, raw = flags.parse(COMMANDS["train"], ["--config=tiny.py:large"])
    assert found.config_file == "tiny.py:large"
    assert raw["model"]["num_layers"] == 9


@pytest.mark.parametrize(
    "argv, section, key, value",
    [
        (["--config.model.num_layers=5"], "model", "num_layers", 5),
        (["--config.model.num_layers", "5"], "model", "num_layers", 5),
        (["-config.model.num_layers=5"], "model", "num_layers", 5),
        (["--config.model.rope_theta=1e4"], "model", "rope_theta", 10_000.0),
        (["--config.model.rope_theta=7"], "model", "rope_theta", 7.0),
        (["--config.model.norm=layernorm"], "model", "norm", "layernorm"),
        (["--config.model.norm=5"], "model", "norm", "5"),
        (["--config.model.norm="], "model", "norm", ""),
        (["--config.model.qk_norm"], "model", "qk_norm", True),
        (["--config.model.qk_norm=true"], "model", "qk_norm", True),
        (["--config.model.use_bias=false"], "model", "use_bias", False),
        (["--noconfig.model.use_bias"], "model", "use_bias", False),
        (["--config.data.paths=a.txt"], "data", "paths", ("a.txt",)),
        (["--config.data.paths=a/*.txt"], "data", "paths", ("a/*.txt",)),
        (["--config.data.paths=('a','b')"], "data", "paths", ("a", "b")),
        (["--config.data.paths=['a b']"], "data", "paths", ("a b",)),
        (
            ["--config.data.paths=a", "--config.data.paths=b"],
            "data",
            "paths",
            ("a", "b"),
        ),
        (["--config.data.eval_paths=()"], "data", "eval_paths", ()),
        (
            ["--config.optimizer.decay_rules=(('norm',False),('.*',True))"],
            "optimizer",
            "decay_rules",
            (("norm", False), (".*", True)),
        ),
    ],
)
def test_an_override_takes_the_type_of_its_key(argv, section, key, value, file):
    raw = _config(*argv)
    assert raw[section][key] == value
    assert type(raw[section][key]) is type(value)
    before = _config()
    before[section][key] = value
    assert raw == before


@pytest.mark.parametrize(
    "argument, reason",
    [
        ("model.num_layers=abc", "invalid literal for int() with base 10: 'abc'"),
        ("model.num_layers=2.5", "invalid literal for int() with base 10: '2.5'"),
        ("model.num_layers=None", "invalid literal for int() with base 10: 'None'"),
        ("model.rope_theta=x", "could not convert string to float: 'x'"),
        (
            "model.qk_norm=maybe",
            "('Non-boolean argument to boolean flag', 'maybe')",
        ),
    ],
)
def test_an_override_of_another_type_is_refused(argument, reason, file):
    assert _mistake("train", f"--config={file}", f"--config.{argument}") == (
        f"flags must be right; flag --config.{argument}: {reason}"
    )


def test_an_override_without_its_value_is_refused(file):
    assert _mistake("train", f"--config={file}", "--config.model.num_layers") == (
        "flags must be right; Missing value for flag --config.model.num_layers"
    )


@pytest.mark.parametrize(
    "argument", ["--config.model.qk_nrom", "--noconfig.model.qk_nrom=1"]
)
def test_an_unknown_key_is_refused_with_the_nearest(argument, file):
    assert _mistake("train", f"--config={file}", argument) == (
        "config key must be one of the known names; got 'model.qk_nrom'. Did you mean "
        "'model.qk_norm'? Known: model.qk_norm, model.norm, model.rope_theta, "
        "data.eval_paths, data.paths, model.num_layers, model.use_bias, "
        "optimizer.decay_rules"
    )


def test_a_section_is_not_a_key(file):
    assert _mistake("train", f"--config={file}", "--config.model=3").startswith(
        "config key must be one of the known names; got 'model'. "
    )


def test_only_a_bool_key_has_a_no_form(file):
    assert _mistake("train", f"--config={file}", "--noconfig.model.num_layers") == (
        "flag must be one of the known names; got 'noconfig.model.num_layers'. "
        "Known: config, coordinator, grace, hang, join_timeout, num_processes, "
        "process_id, rewinds, track, workdir"
    )


def test_the_value_of_another_flag_may_look_like_a_key(file):
    found, _ = flags.parse(
        COMMANDS["config"], ["--config=tiny.py", "--diff", "config.json"]
    )
    assert found.diff == "config.json"


@pytest.mark.parametrize("argv", [[], ["--config"], ["--config="], ["--workdir=x"]])
def test_a_config_that_must_be_given_is_asked_for(argv):
    assert _mistake("train", *argv) == (
        "--config must be given. Example: --config=configs/quickstart.py"
    )


def test_a_config_file_that_is_missing_is_refused_with_those_beside_it(file):
    assert _mistake("train", "--config=tinny.py") == (
        "--config must be one of the known names; got 'tinny.py'. "
        "Did you mean 'tiny.py'? Known: tiny.py"
    )
    assert _mistake("train", "--config=nowhere/tiny.py") == (
        "--config must be a file; got 'nowhere/tiny.py', which does not exist."
    )


def test_a_config_file_that_raises_is_refused(file, tmp_path):
    (tmp_path / "bad.py").write_text("def get_config():\n    return 1 / 0\n")
    assert _mistake("train", "--config=bad.py") == (
        "--config must be a file whose get_config() returns a ConfigDict; got "
        "'bad.py', which raised ZeroDivisionError: division by zero"
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_the_example_of_a_command_parses(name, monkeypatch):
    monkeypatch.chdir(pathlib.Path(__file__).parent.parent)
    command = COMMANDS[name]
    words = re.findall(r"(?:[^\s']|'[^']*')+", command.example)
    argv = [word.replace("'", "") for word in words]
    assert argv[0] == "fm"
    found, rest = cli.named(argv[1:])
    assert found == name
    flags.parse(command, rest)


def test_a_key_may_be_a_word_that_python_keeps_for_itself(file):
    section = '    config.init = ConfigDict({"from": "", "deep": {"from": 1}})\n'
    pathlib.Path(file).write_text(CONFIG.replace("    return", section + "    return"))
    raw = _config("--config.init.from=runs/a@20", "--config.init.deep.from", "7")
    assert raw["init"] == {"from": "runs/a@20", "deep": {"from": 7}}
    assert _config()["init"]["from"] == ""
