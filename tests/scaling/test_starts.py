"""Tests that what fits begin from is near the best that a grid can hold."""

import numpy as np
import pytest

from fm_jax.scaling import laws, starts

RNG = np.random.default_rng(0)
COLUMNS = {
    "params": np.exp(RNG.uniform(16, 23, 40)),
    "tokens": np.exp(RNG.uniform(21, 26, 40)),
}


def test_on_the_grid_the_linear_parameters_are_exact():
    truth = np.array([1.7, 400.0, 900.0, starts.EXPONENTS[6], starts.EXPONENTS[4]])
    law = laws.LAWS["chinchilla"]
    found = law.starts(COLUMNS, law.loss(truth, COLUMNS))
    nearest = found[np.argmin(np.abs(found[:, 3:] - truth[3:]).sum(axis=1))]
    np.testing.assert_allclose(nearest, truth, rtol=1e-6)


def test_kaplans_linear_parameters_are_exact_on_its_grid():
    floor, power, ratio = 1.5, starts.SMALL_EXPONENTS[6], starts.RATIOS[5]
    truth = np.array([floor, 5e8, 1e10, power * ratio, power])
    law = laws.LAWS["kaplan"]
    found = starts.kaplan(COLUMNS, law.loss(truth, COLUMNS), np.array([floor]))
    found = np.stack([found[name] for name in law.names], axis=1)
    nearest = found[np.argmin(np.abs(found[:, 3:] - truth[3:]).sum(axis=1))]
    np.testing.assert_allclose(nearest, truth, rtol=1e-6)


@pytest.mark.parametrize(
    "name",
    ["chinchilla(E=1)", "chinchilla(A=99)", "chinchilla(E=1,alpha=0.3)",
     "chinchilla(alpha=0.3,beta=0.4)", "tied", "tied(alpha=0.3)", "tied(A=9,B=99)",
     "kaplan", "kaplan(E=0)", "data_constrained", "data_constrained(R_D=15)"],
)  # fmt: skip
def test_every_start_can_be_descended_from(name):
    law = laws.find(name)
    columns = COLUMNS | {"unique_tokens": COLUMNS["tokens"] / 3}
    found = law.starts(columns, 2 + 1e3 / COLUMNS["params"] ** 0.3)
    assert found.shape[1] == len(law.names)
    assert len(found) > 0
    assert np.isfinite(law.loss(found, columns)).all()
    assert (law.loss(found, columns) > 0).all()


def test_a_loss_that_leaves_no_room_for_e_starts_from_none():
    law = laws.LAWS["chinchilla"]
    loss = 30 / COLUMNS["params"] ** 0.1 + 40 / COLUMNS["tokens"] ** 0.1 - 3
    assert loss.min() > 0
    found = law.starts(COLUMNS, loss)
    assert (found >= 0).all()
    assert (found[:, 0] == 0).any()


def test_random_starts_obey_their_scales_and_repeat():
    scales = {"A": "log", "E": "linear", "q": "signed"}
    found = starts.random(scales, np.array([3.0, 2.0]))
    assert (found["A"] > 0).all()
    assert ((found["E"] >= 0) & (found["E"] <= 2)).all()
    assert found["q"].min() < 0 < found["q"].max()
    again = starts.random(scales, np.array([3.0, 2.0]))
    assert all((found[name] == again[name]).all() for name in scales)
