"""Tests of the plans that are shipped: the page, and that it is the records' own."""

import json
import pathlib
import shlex

import pytest

from fm_jax import config as configs
from fm_jax import flags
from fm_jax.commands.listed import COMMANDS
from fm_jax.planning import shipped, show, topologies

ROOT = pathlib.Path(__file__).parent.parent.parent
needs_data = pytest.mark.skipif(
    not shipped.DATA.exists(), reason="configs/plans.json is not made yet"
)
ONE, TWO = list(shipped.PLANS)[:2]
PLAN = {
    "command": "fm plan --config=configs/a.py --topology=v5e:1x1",
    "date": "2026-01-02",
    "versions": "jax 1.2.3",
    "machine": "v5e:1x1",
    "devices": 1,
    "mesh": {},
    "params": {"total": 1_000, "non_embedding": 800},
    "vocab_size": 64,
    "steps": 5,
    "batch_size": 2,
    "length": 8,
    "micro_batches": 3,
    "remat": "dots",
    "attention": {"compiled": "splash", "there": "splash"},
    "tokens": 80,
    "epochs": None,
    "flops_per_step": {"6n": 1e6, "exact": 2e6, "compiled": 3e6},
    "memory": {
        "params": 4_000, "optimizer": 8_000, "average": 0, "batch": 100,
        "gradients": 4_000, "activations": 900, "host": 0, "needed": 17_000,
        "capacity": 20_000, "fits": True, "is_cpu_estimate": False,
    },
    "collectives": [],
    "checkpoint": {"bytes": 12_000, "host_bytes": 12_000},
    "at_mfu": {"step_seconds": 2.5, "tokens_per_second": 6.4, "hours": 9.0,
               "mfu": 0.4},
    "roofline": {"step_seconds": 1.234, "tokens_per_second": 13.0, "hours": 4.0,
                 "mfu": 0.81, "compute_seconds": 1.234, "memory_seconds": 0.5,
                 "network_seconds": 0.0},
    "compile_seconds": 7.6,
}  # fmt: skip


def _too_big():
    memory = {"needed": 30_000, "capacity": 20_000, "fits": False, "params": 4_000,
              "optimizer": 8_000, "average": 0, "batch": 100,
              "is_cpu_estimate": False}  # fmt: skip
    flops = {"6n": 1e6, "exact": 2e6, "compiled": None}
    found = PLAN | {"memory": memory, "flops_per_step": flops}
    return {k: v for k, v in found.items() if k not in ("roofline", "collectives")}


def test_the_page_has_its_plans_in_the_order_of_the_list():
    page = shipped.page({TWO: PLAN, ONE: PLAN, "a plan that is shipped no more": PLAN})
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    assert rows[2:] == [
        f"| {name} | 17 kB of 20 kB | 1 | 3 | dots | 1.23 s | 81% | 8 s |"
        for name in (ONE, TWO)
    ]
    assert len({row.count("|") for row in rows}) == 1
    heads = [line for line in page.splitlines() if line.startswith("## ")]
    assert heads == [f"## {ONE}", f"## {TWO}"]
    assert "`fm plan --config=configs/a.py --topology=v5e:1x1`, 2026-01-02" in page
    assert "\n".join(["```", *show.lines(PLAN), "```"]) in page


def test_the_page_tells_a_plan_that_does_not_fit():
    page = shipped.page({ONE: _too_big()})
    assert (
        f"| {ONE} | 30 kB of 20 kB (does not fit) | 1 | 3 | dots |  |  | 8 s |" in page
    )
    assert "DOES NOT FIT" in page


def test_the_page_tells_what_fits_instead():
    other = PLAN | {"overrides": {"mesh.fsdp": 16}, "mesh": {"fsdp": 16}}
    page = shipped.page({ONE: _too_big() | {"instead": other}})
    row = f"| {ONE} (with overrides) | 17 kB of 20 kB | fsdp=16 | 3 | dots | 1.23 s |"
    assert row in page
    assert "DOES NOT FIT" in page
    assert "\nThis fits: --config.mesh.fsdp=16\n" in page


@pytest.mark.parametrize("name", shipped.PLANS)
def test_a_shipped_plan_is_of_a_config_and_a_machine_that_exist(name):
    config, topology, *more = shipped.PLANS[name]
    arguments = [f"--config={ROOT / config}", f"--topology={topology}", *more]
    parsed, raw = flags.parse(COMMANDS["plan"], arguments)
    configs.check(raw)
    assert topologies.parse(parsed.topology).name == topology


@needs_data
def test_the_page_is_made_of_the_records_that_lie_beside_it():
    found = json.loads(shipped.DATA.read_text())
    assert shipped.PAGE.read_text() == shipped.page(found)


@needs_data
@pytest.mark.parametrize("name", shipped.PLANS)
def test_every_plan_is_recorded_as_its_command_makes_it(name, monkeypatch):
    found = json.loads(shipped.DATA.read_text())
    assert name in found
    config, topology, *_ = shipped.PLANS[name]
    recorded = found[name]
    fm, plan, *arguments = shlex.split(recorded["command"])
    assert (fm, plan) == ("fm", "plan")
    monkeypatch.chdir(ROOT)
    parsed, raw = flags.parse(COMMANDS["plan"], arguments)
    assert (parsed.config_file, parsed.topology) == (config, topology)
    checked = configs.check(raw)
    assert recorded["machine"] == topology
    # The config has not changed since.
    sizes = [recorded[key] for key in ("batch_size", "length", "micro_batches")]
    train = checked.train
    assert sizes == [train.batch_size, checked.data.max_length, train.accumulation]
    assert recorded["remat"] == checked.model.remat
    used = recorded.get("instead", recorded)
    assert used["memory"]["fits"]


@needs_data
def test_no_record_is_left_of_a_plan_that_is_shipped_no_more():
    assert json.loads(shipped.DATA.read_text()).keys() <= shipped.PLANS.keys()
