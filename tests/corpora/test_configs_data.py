"""Tests of the lab pages of data: they load, they check, their commands are taken."""

import re
import shlex
from pathlib import Path

import pytest

from fm_jax import cli, configfile, flags
from fm_jax import config as configs

FOLDER = Path(configfile.BASE).parent / "data"
FILES = sorted(path.name for path in FOLDER.glob("[!_]*.py"))


def _commands():
    """Return (file, arguments) of each `fm` command on the pages."""
    found = []
    for file in FILES:
        page = (FOLDER / file).read_text().split('"""')[1].replace("\\\n", " ")
        for line in page.splitlines():
            words = line.removeprefix("Command").strip()
            if words.startswith("fm "):
                found.append((file, shlex.split(words)[1:]))
    return found


def _differences(file):
    raw = configfile.load(str(FOLDER / file)).to_dict()
    return configfile.difference(configfile.load_base(), raw)


@pytest.mark.parametrize("file", FILES)
def test_a_page_loads_and_checks(file):
    raw = configfile.load(str(FOLDER / file)).to_dict()
    assert configfile.flat(raw).keys() == configfile.flat(configfile.load_base()).keys()
    assert configs.check(raw).data.source != "stdlib"


def test_the_pages_are_of_every_source_that_is_text_or_tokens():
    sources = {_differences(file)["data.source"][1] for file in FILES}
    assert sources == {"text", "tfds", "hf", "store"}


@pytest.mark.parametrize("file", FILES)
def test_a_page_says_what_for_how_where_and_what_to_expect(file):
    page = (FOLDER / file).read_text().split('"""')[1]
    heads = re.findall(r"^(\w+) {2,}", page, flags=re.MULTILINE)
    wanted = ["Purpose", "Paper", "Command", "Hardware", "Time", "Expect"]
    assert heads == [head for head in wanted if head in heads]
    assert {"Purpose", "Command", "Hardware", "Expect"} <= {*heads}
    named = {word for name, words in _commands() if name == file for word in words}
    assert f"--config=configs/data/{file}" in named


@pytest.mark.parametrize(("file", "words"), _commands())
def test_a_command_of_a_page_is_taken(file, words, monkeypatch):
    monkeypatch.chdir(FOLDER.parent.parent)
    name, rest = cli.named(words)
    command = cli.COMMANDS[name]
    _, raw = flags.parse(command, rest)
    assert command.takes_config
    assert configs.check(raw)


def test_the_large_pages_say_that_they_are_not_run_yet():
    for file in ("c4_tfds.py", "fineweb_hf.py"):
        assert "not run yet: it is checked as a config alone" in (
            (FOLDER / file).read_text()
        )
