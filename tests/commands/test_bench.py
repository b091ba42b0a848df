"""Tests of the commands that measure: what they refuse, and how they show numbers."""

import importlib.util
import json
import types

import pytest

from fm_jax import cli
from fm_jax.commands import bench

CONFIG = "--config=configs/bench.py:tiny"


def _refused(capsys, *argv):
    assert cli.main(["bench", *argv]) == cli.EXIT_MISTAKE
    out, said = capsys.readouterr()
    assert out == ""
    assert said.count("\n") == 1
    return said.strip()


def test_bench_alone_lists_its_parts(capsys):
    assert cli.main(["bench"]) == cli.EXIT_MISTAKE
    shown = capsys.readouterr().out
    for part in ("step", "generate", "data", "checkpoint", "fit", "table"):
        assert f"\n  bench {part} " in shown


@pytest.mark.parametrize(
    "part, known", [("step", "nanogpt_like"), ("generate", "transformers")]
)
def test_an_unknown_yardstick_is_refused_with_those_known(part, known, capsys):
    assert _refused(capsys, part, CONFIG, "--vs=megatron") == (
        "fm: --vs must be one of the known names; got 'megatron'. " + f"Known: {known}"
    )


@pytest.mark.parametrize(
    "part, vs, missing",
    [
        ("step", "nanogpt_like", "torch"),
        ("generate", "transformers", "torch and transformers"),
    ],
)
def test_a_yardstick_that_is_not_installed_is_told(
    part, vs, missing, capsys, monkeypatch
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert _refused(capsys, part, CONFIG, f"--vs={vs}") == (
        f"fm: --vs={vs} must have {missing} installed; got none. pip install "
        "'fm_jax[parity]', or give --vs= for ours alone."
    )


@pytest.mark.parametrize(
    "argv, name",
    [
        (["step", CONFIG, "--steps=0"], "steps"),
        (["step", CONFIG, "--rounds=0"], "rounds"),
        (["generate", CONFIG, "--vs=", "--rounds=0"], "rounds"),
        (["data", CONFIG, "--rounds=0"], "rounds"),
        (["checkpoint", CONFIG, "--rounds=0"], "rounds"),
        (["fit", "--rounds=0"], "rounds"),
        (["fit", "--resamples=0"], "resamples"),
        (["fit", "--sample=0"], "sample"),
    ],
)
def test_a_count_below_one_is_refused(argv, name, capsys):
    assert _refused(capsys, *argv) == f"fm: --{name} must be >= 1; got 0."


def test_a_folder_that_is_not_there_is_refused(capsys, tmp_path):
    asked = f"--folder={tmp_path}/none"
    assert _refused(capsys, "checkpoint", CONFIG, asked) == (
        f"fm: --folder must be a folder that exists; got {tmp_path}/none."
    )


def test_numbers_are_shown_in_a_table_or_as_json(capsys):
    found = {"tokens_per_second": 1234.567, "same_text": True, "library": "torch 2"}
    bench._show(found, types.SimpleNamespace(json=True))
    assert json.loads(capsys.readouterr().out) == found
    bench._show(found, types.SimpleNamespace(json=False))
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["tokens_per_second", "1,235"],
        ["same_text", "True"],
        ["library", "torch", "2"],
    ]
