"""The README's commands are ones that the program takes."""

import pathlib
import re
import shlex

import pytest

from fm_jax import cli, flags
from fm_jax import config as configs
from fm_jax.sweeps import sweep, variants

ROOT = pathlib.Path(__file__).parent.parent


def _commands():
    """Return the `fm` commands in the README's blocks, as lists of arguments."""
    text = (ROOT / "README.md").read_text()
    found = []
    for block in re.findall(r"```\n(.*?)```", text, flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if not line.startswith(("fm ", "./launch/local.sh ")):
                continue  # what a command prints
            words = shlex.split(line.replace("[", "").replace("]", ""), comments=True)
            if words[:1] == ["./launch/local.sh"]:
                words = words[1:]
            if words[:1] == ["fm"]:
                found.append(words[1:])
    return found


def test_the_readme_shows_the_main_commands():
    assert {cli.named(words)[0] for words in _commands()} == set(cli.COMMANDS)


@pytest.mark.parametrize("words", _commands(), ids=" ".join)
def test_a_command_of_the_readme_is_taken(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    name, rest = cli.named(words)
    command = cli.COMMANDS[name]
    given, raw = flags.parse(command, rest)
    if name == "sweep" and not raw:
        assert given.workdir  # whose file says what to run
    elif name == "sweep" and given.grid:
        variants.plan(variants.of_grid(raw, given.grid))
    elif name == "sweep" and not given.overrides:
        sweep.check(raw)
    elif command.takes_config:
        if name == "transfer":  # which makes a base where none is given
            raw["init"]["from"] = raw["init"]["from"] or "runs/base"
        configs.check(raw)


def test_files_that_the_readme_links_to_exist():
    text = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("#"):
            titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
            assert target[1:] in [t.lower().replace(" ", "-") for t in titles]
        elif not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_the_readme_counts_the_keys_as_they_are():
    keys = sum(len(section) for section in configs.configfile.load_base().values())
    assert f"({keys} keys)" in (ROOT / "README.md").read_text()
