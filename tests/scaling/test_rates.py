"""Tests of the laws of learning rate and batch size, on surfaces whose law is known."""

import json

import numpy as np
import pytest

from fm_jax.errors import UserError
from fm_jax.scaling import rates

RATE = (1.79, -0.713, 0.307)  # the forms and figures of arXiv 2503.04715
BATCH = (0.58, 0.0, 0.571)
SIZES = (6e7, 2e8, 7e8)
LENGTHS = (2e9, 8e9, 4e10)


def value(law, params, tokens):
    start, p, q = law
    return start * params**p * tokens**q


def sweep(*, reach=2.0, num=5, tilt=0.01, sizes=SIZES, lengths=LENGTHS, off=0.0):
    """Return columns and losses: a grid of rates and batches about each cell's best."""
    rows = []
    for params in sizes:
        for tokens in lengths:
            at = value(RATE, params, tokens), value(BATCH, params, tokens)
            for x in np.linspace(-reach, reach, num) + off:
                for y in np.linspace(-reach, reach, num):
                    loss = 2.5 + 0.02 * x**2 + 0.01 * y**2 + tilt * x * y
                    rows.append((params, tokens, at[0] * np.exp(x),
                                 at[1] * np.exp(y), loss))  # fmt: skip
    names = ("params", "tokens", "learning_rate", "batch_tokens", "loss")
    columns = dict(zip(names, np.array(rows).T, strict=True))
    return columns, columns.pop("loss")


def sweep_of_rates(*, reach=2.0, num=5, **options):
    """Return a sweep of rates alone, at each cell's best batch."""
    columns, loss = sweep(reach=reach, num=num, **options)
    at = value(BATCH, columns["params"], columns["tokens"])
    only = np.isclose(columns["batch_tokens"], at)
    return {name: column[only] for name, column in columns.items()}, loss[only]


def noisy(loss, sd, seed=0):
    return loss + sd * np.random.default_rng(seed).standard_normal(len(loss))


def test_a_known_surface_gives_its_laws_exactly():
    columns, loss = sweep()
    found = rates.fit(columns, loss)
    for name, law in (("learning_rate", RATE), ("batch_tokens", BATCH)):
        expected = [np.log(law[0]), *law[1:]]
        assert found.laws[name].line == pytest.approx(expected, abs=1e-9)
    assert found.warnings == ()
    assert all(cell.used and cell.points == 25 for cell in found.cells)


def test_rates_alone_give_a_law_of_the_rate_alone():
    columns, loss = sweep_of_rates()
    found = rates.fit(columns, loss)
    expected = [np.log(RATE[0]), *RATE[1:]]
    assert found.laws["learning_rate"].line == pytest.approx(expected, abs=1e-9)
    assert "0" in found.laws["batch_tokens"].skipped
    del columns["batch_tokens"]
    assert list(rates.fit(columns, loss).laws) == ["learning_rate"]


def test_the_curvature_is_along_a_thing_with_the_other_at_its_best():
    columns, loss = sweep(tilt=0.02)
    cell = rates.fit(columns, loss).cells[0]
    # Bend [[.04, .02], [.02, .02]]: what is left of one after the other has moved.
    assert cell.curvature["learning_rate"] == pytest.approx(0.04 - 0.02**2 / 0.02)
    assert cell.curvature["batch_tokens"] == pytest.approx(0.02 - 0.02**2 / 0.04)


def test_tokens_that_differ_by_rounding_are_one_cell():
    columns, loss = sweep()
    columns["tokens"] *= np.random.default_rng(1).uniform(0.99, 1.01, len(loss))
    assert len(rates.fit(columns, loss).cells) == 9


def test_a_thing_of_two_values_is_held_at_the_commoner():
    columns, loss = sweep_of_rates()
    more = {name: column[2::5].copy() for name, column in columns.items()}
    more["batch_tokens"] *= 2
    columns = {name: np.append(columns[name], more[name]) for name in columns}
    found = rates.fit(columns, np.append(loss, np.full(9, 1.0)))
    assert found.laws["learning_rate"].line[1] == pytest.approx(RATE[1], abs=1e-9)
    assert all(cell.points == 5 for cell in found.cells)


# ---- flags


def test_a_best_value_outside_those_tried_is_flagged():
    columns, loss = sweep(off=2.3)
    found = rates.fit(columns, loss)
    assert {cell.flags for cell in found.cells} == {("at_edge",)}
    assert not any(cell.used for cell in found.cells)
    assert found.cells[0].best["learning_rate"] is not None
    assert found.warnings[0].startswith("9 of 9 cells left out (N 6e+07, D 2e+09: at")


def test_a_saddle_is_flagged():
    columns, loss = sweep(tilt=0.04)
    found = rates.fit(columns, loss)
    assert {cell.flags for cell in found.cells} == {("not_convex",)}
    assert found.cells[0].best == {"learning_rate": None, "batch_tokens": None}


@pytest.mark.parametrize("num", [2, 1])
def test_few_points_are_flagged(num):
    found = rates.fit(*sweep(num=num))
    assert {cell.flags for cell in found.cells} == {("few_points",)}


def test_as_many_points_as_coefficients_are_too_few():
    columns, loss = sweep_of_rates(num=3)
    found = rates.fit(columns, loss)
    assert {cell.flags for cell in found.cells} == {("few_points",)}


def test_a_flagged_cell_is_left_out_of_the_law():
    columns, loss = sweep()
    first = np.arange(len(loss)) < 25
    loss[first] = 5 - loss[first]
    found = rates.fit(columns, loss)
    assert found.laws["learning_rate"].num_cells == 8
    assert found.laws["learning_rate"].line[1] == pytest.approx(RATE[1], abs=1e-9)


# ---- refusals


def test_three_cells_give_no_law_of_three_coefficients():
    columns, loss = sweep(sizes=(1e8,), lengths=(1e9, 1e10, 1e11))
    found = rates.fit(columns, loss)
    why = "3 coefficients of learning_rate need more than 3 cells"
    assert found.laws["learning_rate"].skipped.startswith(why)
    assert found.record()["skipped"].startswith(why)


def test_sizes_and_lengths_that_move_together_give_no_law():
    parts = [sweep(sizes=(n,), lengths=(20 * n,)) for n in (1e8, 3e8, 1e9, 3e9, 1e10)]
    columns = {k: np.concatenate([c[k] for c, _ in parts]) for k in parts[0][0]}
    loss = np.concatenate([y for _, y in parts])
    found = rates.fit(columns, loss).laws["learning_rate"]
    assert "do not tell params from tokens for learning_rate" in found.skipped


def test_a_rate_of_zero_is_refused():
    columns, loss = sweep()
    columns["learning_rate"][7] = 0
    with pytest.raises(UserError, match=r"learning_rate must be positive .* row 7"):
        rates.fit(columns, loss)


# ---- intervals


@pytest.mark.parametrize("scatter", [0.0, 0.1])
def test_intervals_cover_at_about_their_rate(scatter):
    columns, clean = sweep()
    hits = np.zeros(2)
    for turn in range(120):
        rng = np.random.default_rng((5, turn))
        loss = clean + 0.004 * rng.standard_normal(len(clean))
        moved = dict(columns)
        shift = np.repeat(np.exp(scatter * rng.standard_normal(9)), 25)
        moved["learning_rate"] = columns["learning_rate"] * shift
        found = rates.fit(moved, loss, num_bootstraps=200, seed=turn)
        ci = found.laws["learning_rate"].record()["ci"]
        for k, name in enumerate(("params", "tokens")):
            hits[k] += ci[name][0] <= RATE[1 + k] <= ci[name][1]
    assert (hits / 120 >= 0.89).all()
    assert (hits / 120 <= 0.99).all()


def test_sharp_valleys_weigh_most():
    columns, loss = sweep()
    loss = 2.5 + (loss - 2.5) * np.where(columns["params"] > 5e8, 1.0, 25.0)
    spread = {True: [], False: []}
    for turn in range(40):
        found = rates.fit(columns, noisy(loss, 0.004, turn), num_bootstraps=100)
        cells = [c for c in found.cells if c.used]
        logs = np.log([[np.e, c.params, c.tokens] for c in cells])
        best = np.log([c.best["learning_rate"] for c in cells])
        plain = np.linalg.lstsq(logs, best, rcond=None)[0]
        spread[True].append(found.laws["learning_rate"].line[2] - RATE[2])
        spread[False].append(plain[2] - RATE[2])
    assert np.std(spread[True]) < 0.6 * np.std(spread[False])


def test_the_record_is_json_and_says_what_the_fit_says():
    columns, loss = sweep()
    found = rates.fit(columns, noisy(loss, 0.002), num_bootstraps=100)
    record = json.loads(json.dumps(found.record()))
    law = record["learning_rate"]
    assert law["params"] == found.laws["learning_rate"].line[1]
    assert law["coefficient"] == pytest.approx(
        np.exp(found.laws["learning_rate"].line[0])
    )
    for name in ("coefficient", "params", "tokens"):
        assert law["ci"][name][0] < law[name] < law["ci"][name][1]
    assert len(record["cells"]) == 9
