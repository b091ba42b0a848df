import json
import pathlib
import re

import numpy as np
import pytest

from fm_jax import configfile
from fm_jax.scaling import information, laws
from fm_jax.sweeps import costs, outlook, plans, sweep, workdir

SWEEPS = pathlib.Path(__file__).parent.parent.parent / "configs" / "sweeps"


@pytest.fixture
def slow_machine(monkeypatch):
    """A machine of 1e9 FLOP/s, so that times are known."""
    monkeypatch.setattr(costs, "machine_peak", lambda dtype: (1e9, "pretended"))


def _sweep(name="tiny_isoflop", **changed):
    raw = configfile.load(str(SWEEPS / f"{name}.py")).to_dict()
    return sweep.check(raw | changed)


def test_every_run_is_a_line_and_the_totals_are_theirs(slow_machine):
    asked = _sweep("tiny_branches")
    lines, runs = outlook.dry_run(asked, mfu=0.5), plans.plan(asked)
    for one in runs:
        (line,) = (line for line in lines if line.startswith(one.name + " "))
        assert f"{one.tokens:,}" in line
        assert (one.parent[:3] + "@" if one.parent else "@") in line or not one.parent
    flops = sum(one.cost_flops for one in runs)
    assert any(line.startswith(f"compute  {flops:.3g} FLOPs") for line in lines)
    whole = int(flops / 0.5e9 + costs.STARTUP_SECONDS * len(runs))
    (said,) = (line for line in lines if line.startswith("time "))
    found = re.search(r"([\d.,]+) days|(\d+):(\d\d):(\d\d)", said)
    if found[1]:
        assert float(found[1].replace(",", "")) == pytest.approx(whole / 86400, abs=0.1)
    else:
        hours, minutes, seconds = map(int, found.groups()[1:])
        assert abs(hours * 3600 + minutes * 60 + seconds - whole) <= 2
    assert "(an estimate)" in said


def test_runs_that_ended_tell_how_long_the_others_take(slow_machine, tmp_path):
    asked = _sweep()
    runs = workdir.write(asked, tmp_path)
    run = workdir.run_path(tmp_path, runs[0].name)
    run.mkdir(parents=True)
    row = {"step": runs[0].steps, "perf/median_tokens_per_second": 2e4}
    (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (run / "DONE").write_text(f"{runs[0].steps}\n")
    text = "\n".join(outlook.dry_run(asked, tmp_path))
    assert "as measured in 1 finished runs" in text
    assert "pretended" not in text


def test_what_to_expect_is_what_the_information_of_the_design_says():
    asked = _sweep(target_flops=1e16, noise=0.01)
    runs = plans.plan(asked)
    columns = {
        "params": np.array([one.params["total"] for one in runs], float),
        "tokens": np.array([one.tokens for one in runs], float),
    }
    epoch = laws.PUBLISHED["epoch"]
    law = laws.LAWS["chinchilla"]
    sd = information.optimum_sd(law, epoch.theta, columns, 0.01, 1e16)
    (said,) = outlook.expected(asked, runs)
    assert (
        f"at 1e+16 FLOPs N* within a factor {np.exp(1.96 * sd['params']):.3g}" in said
    )


def test_a_trunk_is_no_point_of_the_fit():
    asked = _sweep("tiny_branches")
    runs = plans.plan(asked)
    ends = [one for one in runs if one.role != "trunk"]
    assert outlook.expected(asked, runs) == outlook.expected(asked, ends)


def test_a_design_that_determines_nothing_says_so():
    raw = configfile.load(str(SWEEPS / "tiny_isoflop.py")).to_dict()
    raw["design"] |= {"kind": "grid", "budgets": (), "sizes": (16,), "tokens": (1e6,)}
    asked = sweep.check(raw)
    (said,) = outlook.expected(asked, plans.plan(asked))
    assert "no answer: these runs do not determine the law" in said
