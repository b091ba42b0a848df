"""Tests of the procedure of Porian et al. against their published exponents."""

import csv
import json
import pathlib

import numpy as np
import pytest

from fm_jax.errors import UserError
from fm_jax.scaling import porian

DATA = pathlib.Path(__file__).parents[3] / "shared" / "data" / "scaling"
GROUPS = [
    "rw-base-long-kaplan-kaplan-train", "rw-base-long-kaplan-standard-val",
    "rw-base-short-kaplan-standard-val", "rw-base-short-chinchilla-standard-val",
    "rw-tuned-short-const-standard-val", "rw-base-long-kaplan-attention-train",
    "rw-base-short-kaplan-attention-train", "rw-base-short-chinchilla-attention-train",
    "rw-tuned-short-const-attention-train", "rw-tuned-long-const-kaplan-train",
]  # fmt: skip  # fmt: skip


@pytest.fixture(scope="module")
def table():
    file = DATA / "porian_rw_isoflop.csv"
    if not file.is_file():
        pytest.skip("the published table in shared/data/scaling is not there")
    with open(file) as lines:
        rows = list(csv.DictReader(lines))
    return {
        name: np.array([row[name] for row in rows], str if name == "group" else float)
        for name in ("params", "flops", "loss", "group")
    }


def expected(name):
    wanted = json.loads((DATA / "expected.json").read_text())[name]
    return pytest.approx(wanted["expected"], rel=wanted["rtol"], abs=wanted["atol"])


@pytest.mark.parametrize("group", GROUPS)
def test_the_experiments_of_porian_give_their_exponents(table, group):
    mine = table["group"] == group
    found = porian.fit(table["params"][mine], table["flops"][mine],
                       loss=table["loss"][mine], sigma=0.002)  # fmt: skip
    assert found["a"] == expected(f"porian.{group}.a")
    assert found["a_deterministic"] == expected(f"porian.{group}.a_deterministic")
    with open(DATA / "porian_rw_expected.csv") as file:
        (published,) = [r for r in csv.DictReader(file) if r["group"] == group]
    assert len(found["budgets"]) == int(published["n_budgets"])
    ends = [float(published[f"published_ci_{end}"]) for end in ("lo", "hi")]
    assert found["ci"]["a"] == pytest.approx(ends, abs=0.004)


def valleys(exponent, *, off=0.0):
    """Return params, flops and losses of budgets whose best size is known."""
    flops = np.repeat(np.geomspace(1e16, 1e20, 6), 9)
    window = np.tile(np.linspace(-2, 2, 9), 6)
    loss = 3 + 0.05 * (window - off) ** 2
    return 0.1 * flops**exponent * np.exp(window), flops, loss


def test_a_known_exponent_is_found_and_lies_inside_its_interval():
    params, flops, loss = valleys(0.45)
    found = porian.fit(params, flops, loss=loss, sigma=0.002)
    low, high = found["ci"]["a"]
    assert found["a_deterministic"] == pytest.approx(0.45, abs=1e-6)
    assert low < 0.45 < high
    assert found["dropped"] == []


def test_a_budget_with_its_minimum_at_an_edge_is_dropped():
    params, flops, loss = valleys(0.45)
    first = flops == flops[0]
    loss[first] = np.arange(9) + 3.0
    found = porian.fit(params, flops, loss=loss, sigma=0.002)
    assert found["dropped"] == [flops[0]]
    assert len(found["budgets"]) == 5


def test_budgets_without_a_minimum_inside_are_refused():
    params, flops, loss = valleys(0.45, off=3.0)
    with pytest.raises(UserError, match="minimum inside must be at least 2; got 0"):
        porian.fit(params, flops, loss=loss, sigma=0.0)
