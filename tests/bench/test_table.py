"""Tests of the page of benchmarks: what stands in it, and what commands made it."""

import subprocess
import types

import pytest

from fm_jax import cli, flags
from fm_jax import config as configs
from fm_jax.bench import table
from fm_jax.errors import UserError


@pytest.mark.parametrize("quick", [False, True])
def test_every_command_of_the_page_is_taken(quick):
    for section in table.sections(quick=quick):
        for argv in section.columns.values():
            name, rest = cli.named(["bench", *argv])
            command = cli.COMMANDS[name]
            found, raw = flags.parse(command, [*rest, "--json"])
            assert found.rounds == (2 if quick else 5)
            if command.takes_config:
                configs.check(raw)


def test_sizes_and_precisions_are_all_beside_pytorch(monkeypatch):
    monkeypatch.setattr(table.importlib.util, "find_spec", lambda name: name)
    step = table.sections(quick=False)[0]
    assert list(step.columns) == ["tiny", "tiny_bf16", "small", "small_bf16"]
    assert all("--vs=nanogpt_like" in argv for argv in step.columns.values())
    monkeypatch.setattr(table.importlib.util, "find_spec", lambda name: None)
    without = table.sections(quick=False)[0]
    assert all("--vs=" in argv for argv in without.columns.values())


def test_quartiles_stand_beside_their_median():
    numbers = {
        "tiny": {
            "rate_per_second": 1234.56,
            "ratio_batch_1": 2.0,
            "ratio_low_batch_1": 1.5,
            "ratio_high_batch_1": 2.5,
            "read_ratio": 3.0,
            "read_ratio_least": 2.9,
            "read_ratio_most": 3.125,
            "same_text": True,
        },
        "small": {"rate_per_second": 7, "gap_least": 1e-9, "library": "torch 2"},
    }
    assert table.rows(numbers) == [
        "| | tiny | small |",
        "|---|---:|---:|",
        "| rate_per_second | 1,235 | 7 |",
        "| ratio_batch_1 | 2 [1.5, 2.5] |  |",
        "| read_ratio | 3 [2.9, 3.125] |  |",
        "| same_text | True |  |",
        "| gap_least |  | 1e-09 |",
        "| library |  | torch 2 |",
    ]


def _finished(status, out="", said=""):
    return types.SimpleNamespace(returncode=status, stdout=out, stderr=said)


def test_a_page_has_the_machine_the_commands_and_the_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(
        subprocess, "run", lambda command, **how: _finished(0, '{"ratio": 1.25}')
    )
    monkeypatch.setattr(table.machine, "versions", lambda: {"system": "S", "jax": "9"})
    said = []
    out = table.write(tmp_path / "page.md", quick=True, say=said.append)
    page = out.read_text()
    assert "Made by `fm bench table --quick` on 20" in page
    assert "\n- S\n- jax 9" in page
    for section in table.sections(quick=True):
        assert f"## {section.title}\n" in page
    for line in said:
        assert line.startswith("fm bench ")
        assert f"\n{line}\n" in page
    assert page.count("| ratio |") == len(table.sections(quick=True))


def test_a_part_that_fails_is_told_and_nothing_is_written(tmp_path, monkeypatch):
    failed = _finished(2, "", "a line\nfm: the disk must have room\n")
    monkeypatch.setattr(subprocess, "run", lambda command, **how: failed)
    with pytest.raises(UserError) as error:
        table.write(tmp_path / "page.md", quick=True, say=lambda line: None)
    assert str(error.value).startswith("a part must end well; fm bench step --config")
    assert str(error.value).endswith("said: fm: the disk must have room")
    assert list(tmp_path.iterdir()) == []


def test_a_page_that_cannot_be_written_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(UserError, match="--out must be a file in a folder that exists"):
        table.write(tmp_path / "none" / "page.md", quick=True, say=print)
