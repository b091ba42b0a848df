"""Tests of the procedure of Porian et al. against their published exponents."""

import csv

import numpy as np
import pytest

from tests.scaling import porian
from tests.scaling.isoflops import DATA, expected, load

GROUPS = [
    "rw-base-long-kaplan-kaplan-train", "rw-base-long-kaplan-standard-val",
    "rw-base-short-kaplan-standard-val", "rw-base-short-chinchilla-standard-val",
    "rw-tuned-short-const-standard-val", "rw-base-long-kaplan-attention-train",
    "rw-base-short-kaplan-attention-train", "rw-base-short-chinchilla-attention-train",
    "rw-tuned-short-const-attention-train", "rw-tuned-long-const-kaplan-train",
]  # fmt: skip


@pytest.fixture(scope="module")
def table():
    return load("porian_rw_isoflop.csv")


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
