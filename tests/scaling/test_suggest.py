"""Suggested runs on a known law: what they promise, against fits of simulated runs."""

import json
import math

import numpy as np
import pytest

from fm_jax.errors import UserError
from fm_jax.scaling import frontier, information, laws, resamples, solver, suggest

LAW = laws.LAWS["chinchilla"]
THETA = np.array([1.817218, 477.826, 2143.417, 0.3473105, 0.3671724])
NOISE, TARGET, BUDGET, NUM = 0.003, 1e21, 6e18, 800


def _design():
    """Return 15 runs: three budgets up to 1e18, five sizes each."""
    flops = np.repeat([1e17, 3e17, 1e18], 5)
    centre, _ = frontier.optimum(LAW, THETA, flops)
    params = centre * np.tile([0.25, 0.5, 1, 2, 4], 3)
    return {"params": params, "tokens": flops / 6 / params}


def _losses(columns, num, seed):
    loss = LAW.loss(THETA, columns)
    rng = np.random.default_rng(seed)
    return loss * np.exp(NOISE * rng.standard_normal((num, len(loss))))


def _sd(columns, *, seed, delta=np.inf):
    """Return the sd of ln N* at the target over fits to NUM simulations of runs."""
    draws = _draws(columns, seed=seed, delta=delta)
    params, _ = frontier.optimum(LAW, draws, TARGET)
    return np.std(np.log(params))


def _draws(columns, *, seed, delta=np.inf):
    loss = LAW.loss(THETA, columns)
    losses = _losses(columns, NUM, seed)
    return solver.refit(columns, loss, LAW, THETA, losses=losses, delta=delta)[0]


def _fit(columns, delta=np.inf):
    low, high = float(columns["params"].min()), float(columns["params"].max())
    ends = {"params": [low, high], "tokens": [5 * low, 120 * high]}
    return {
        "range": ends | {"loss": [2.0, 4.0]},
        "approach3": {"residual_sd": NOISE},
        # As JSON has it: there is no inf.
        "options": {"delta": None if math.isinf(delta) else delta, "space": "log"},
    }


def _with(columns, runs):
    return {
        name: np.concatenate([column, [run[name] for run in runs]])
        for name, column in columns.items()
    }


@pytest.fixture(scope="module")
def found():
    columns = _design()
    return suggest.suggest(
        _fit(columns),
        _draws(columns, seed=0),
        LAW,
        target_flops=TARGET,
        budget_flops=BUDGET,
    )


def test_fits_to_the_suggested_runs_scatter_as_little_as_promised(found):
    columns = _design()
    assert _sd(columns, seed=1) == pytest.approx(found["sd_before"], rel=0.08)
    realised = _sd(_with(columns, found["runs"]), seed=1)
    assert realised == pytest.approx(found["sd_after"], rel=0.08)
    assert found["sd_after"] < 0.65 * found["sd_before"]


def test_huber_fits_scatter_as_little_as_promised():
    columns = _design()
    delta = 1e-3
    said = suggest.suggest(
        _fit(columns, delta),
        _draws(columns, seed=0, delta=delta),
        LAW,
        target_flops=TARGET,
        budget_flops=BUDGET,
    )
    assert said["noise"] == pytest.approx(NOISE * information.inflation(NOISE, delta))
    realised = _sd(_with(columns, said["runs"]), seed=1, delta=delta)
    assert realised == pytest.approx(said["sd_after"], rel=0.12)


def test_other_designs_of_the_same_compute_do_worse_and_as_promised(found):
    columns = _design()
    realised = _sd(_with(columns, found["runs"]), seed=1)
    assert len(found["alternatives"]) == 2
    for other in found["alternatives"]:
        runs = [
            {"params": n, "tokens": d}
            for n, d in zip(other["params"], other["tokens"], strict=True)
        ]
        spent = sum(6 * run["params"] * run["tokens"] for run in runs)
        assert spent == pytest.approx(found["spent_flops"], rel=1e-9)
        seen = _sd(_with(columns, runs), seed=1)
        assert seen == pytest.approx(other["sd_after"], rel=0.08)
        assert realised < 0.75 * seen


@pytest.mark.parametrize("budget", [3e17, 1e20])
def test_what_other_designs_tell_is_what_the_information_says(budget, monkeypatch):
    monkeypatch.setattr(suggest, "_RUN_CHARGE", 1)
    columns = _design()
    said = suggest.suggest(
        _fit(columns),
        _draws(columns, seed=0),
        LAW,
        target_flops=TARGET,
        budget_flops=budget,
    )

    def sd(columns):
        return information.optimum_sd(LAW, THETA, columns, NOISE, TARGET)["params"]

    line, _ = said["alternatives"]
    runs = [
        {"params": n, "tokens": d}
        for n, d in zip(line["params"], line["tokens"], strict=True)
    ]
    gained = 1 - (line["sd_after"] / said["sd_before"]) ** 2
    expected = 1 - (sd(_with(columns, runs)) / sd(columns)) ** 2
    assert expected > 0.3
    assert gained == pytest.approx(expected, rel=0.05)


def test_one_noisy_fit_with_a_bootstrap_suggests_runs_that_help():
    """As it is used: one set of losses, draws by weights of its runs."""
    columns = _design()
    before = _sd(columns, seed=5)
    for seed in range(3):
        losses = _losses(columns, 1, seed)[0]
        start = solver.fit(columns, losses, LAW, delta=np.inf).theta
        weights = resamples.weights("bayesian", np.arange(15), 1000, seed)
        draws = solver.refit(
            columns, losses, LAW, start, weights=weights, delta=np.inf
        )[0]
        residuals = np.log(losses) - np.log(LAW.loss(start, columns))
        fit = _fit(columns)
        fit["approach3"]["residual_sd"] = np.sqrt(np.sum(residuals**2) / 10)
        said = suggest.suggest(
            fit, draws, LAW, target_flops=TARGET, budget_flops=BUDGET
        )
        after = _sd(_with(columns, said["runs"]), seed=5)
        assert after < 0.7 * before


def test_the_first_run_is_the_best_single_one_by_the_information(monkeypatch):
    monkeypatch.setattr(suggest, "_RUN_CHARGE", 0)
    columns = _design()
    said = suggest.suggest(
        _fit(columns),
        _draws(columns, seed=0),
        LAW,
        target_flops=TARGET,
        budget_flops=BUDGET,
        max_runs=1,
        top_share=0,
    )
    chosen = said["runs"][0]

    def gained(run):
        both = _with(columns, [run])
        sd = [
            information.optimum_sd(LAW, THETA, c, NOISE, TARGET)["params"]
            for c in (columns, both)
        ]
        return (sd[0] ** 2 - sd[1] ** 2) / (run["params"] * run["tokens"])

    low, high = columns["params"].min(), columns["params"].max()
    rivals = [
        {"params": n, "tokens": n * r}
        for n in np.geomspace(low, high, 6)
        for r in np.geomspace(5, 120, 5)
    ]
    assert gained(chosen) > 0.9 * max(map(gained, rivals))


def test_the_limits_hold(found):
    columns = _design()
    said = suggest.suggest(
        _fit(columns),
        _draws(columns, seed=0),
        LAW,
        target_flops=TARGET,
        budget_flops=BUDGET,
        max_runs=5,
        params_factor=2.0,
        top_share=0.5,
    )
    runs = said["runs"]
    assert len(runs) <= 5
    places = [(run["params"], run["tokens"]) for run in runs]
    assert max(map(places.count, places)) <= 2
    assert all(4.999 < run["tokens_per_param"] < 120.001 for run in runs)
    low, high = columns["params"].min() / 2.002, columns["params"].max() * 2.002
    assert all(low < run["params"] < high for run in runs)
    for each in (said, found):
        costs = [6 * run["params"] * run["tokens"] for run in each["runs"]]
        assert sum(costs) == pytest.approx(each["spent_flops"])
        assert sum(costs) <= BUDGET
        assert [run["flops"] for run in each["runs"]] == pytest.approx(costs)
        assert sum(run["share"] for run in each["runs"]) == pytest.approx(1)
        sds = [each["sd_before"], *(run["sd_after"] for run in each["runs"])]
        assert sds == sorted(sds, reverse=True)


def test_the_largest_compute_has_its_share(monkeypatch):
    # With a charge, small runs would not be all that is wanted besides.
    monkeypatch.setattr(suggest, "_RUN_CHARGE", 0)
    columns = _design()
    draws = _draws(columns, seed=0)
    for share in (0.25, 0.5):
        said = suggest.suggest(
            _fit(columns),
            draws,
            LAW,
            target_flops=TARGET,
            budget_flops=BUDGET,
            top_share=share,
        )
        costs = np.array([run["flops"] for run in said["runs"]])
        top = costs[costs > costs.max() / 2]
        assert share * BUDGET / 2 < top.sum() <= BUDGET
        assert top[0] > 1e18  # larger than any run so far


def test_a_large_budget_goes_to_larger_models_than_there_were():
    columns = _design()
    draws = _draws(columns, seed=0)
    given = {"target_flops": TARGET, "budget_flops": 1e23}
    said = suggest.suggest(_fit(columns), draws, LAW, **given)
    most = max(run["params"] for run in said["runs"])
    assert most == pytest.approx(frontier.optimum(LAW, THETA, 2.5e22)[0], rel=0.1)
    said = suggest.suggest(_fit(columns), draws, LAW, **given, top_share=0)
    most = max(run["params"] for run in said["runs"])
    assert most <= columns["params"].max() * 1.001


def test_a_line_of_runs_smaller_than_any_is_no_alternative():
    columns = _design()
    said = suggest.suggest(
        _fit(columns),
        _draws(columns, seed=0),
        LAW,
        target_flops=TARGET,
        budget_flops=1e16,
    )
    line, one = said["alternatives"]
    assert (line["sd_after"], line["params"]) == (None, [])
    assert said["sd_after"] < one["sd_after"]
    assert any("not within the limits" in text for text in suggest.lines(said))


def test_a_charge_for_each_run_buys_a_smaller_sd_for_more_compute(monkeypatch):
    columns = _design()
    draws, made = _draws(columns, seed=0), []
    for charge in (0, 1):
        monkeypatch.setattr(suggest, "_RUN_CHARGE", charge)
        given = {"target_flops": TARGET, "budget_flops": BUDGET, "top_share": 0}
        made.append(suggest.suggest(_fit(columns), draws, LAW, **given))
    cheap, dear = made
    assert cheap["spent_flops"] < 0.05 * dear["spent_flops"]
    assert dear["sd_after"] < 0.9 * cheap["sd_after"]


def test_a_law_that_reads_more_is_told():
    columns, law = _design(), laws.LAWS["data_constrained"]
    theta = np.array([1.8690, 521.2, 1488.0, 0.35266, 0.35266, 15.387756, 5.309743])
    draws = theta * (1 + 0.01 * np.random.default_rng(0).standard_normal((120, 7)))
    given = {"target_flops": TARGET, "budget_flops": BUDGET}
    missing = "must be told unique_tokens; .* Give --column=unique_tokens=NUMBER"
    with pytest.raises(UserError, match=missing):
        suggest.suggest(_fit(columns), draws, law, **given)
    unique = {"unique_tokens": 1e10}
    said = suggest.suggest(_fit(columns), draws, law, **given, columns=unique)
    params, _ = frontier.optimum(law, draws, TARGET, columns=unique)
    assert said["params_median"] == pytest.approx(np.median(params))
    assert said["sd_after"] < said["sd_before"]


def test_intervals_shrink_with_the_sd_about_the_median(found):
    (low, high), (less, more) = found["interval_before"], found["interval_after"]
    ratio = found["sd_after"] / found["sd_before"]
    centre = found["params_median"]
    assert math.log(more / centre) == pytest.approx(ratio * math.log(high / centre))
    assert math.log(less / centre) == pytest.approx(ratio * math.log(low / centre))


def test_the_text_has_every_run_and_both_alternatives(found):
    text = suggest.lines(found)
    assert sum("tokens/param" in line for line in text) == 1
    assert len(text) == 2 + len(found["runs"]) + 2 + 1 + 2
    for run, line in zip(found["runs"], text[2:], strict=False):
        assert f"{run['params']:.3g}" in line
        assert f"{run['sd_after']:.3f}" in line


def test_repeated_places_are_replicates(found):
    rows = [json.loads(line) for line in suggest.jsonl(found)]
    assert len(rows) == len(found["runs"])
    assert len({tuple(row.values()) for row in rows}) == len(rows)
    assert {row["replicate"] for row in rows} == {0, 1}
    assert all(row.keys() == {"params", "tokens", "replicate"} for row in rows)


def test_draws_without_an_optimum_are_said():
    columns = _design()
    draws = _draws(columns, seed=0)
    draws[:5, 3] = -0.1
    said = suggest.suggest(
        _fit(columns), draws, LAW, target_flops=TARGET, budget_flops=BUDGET
    )
    assert f"5 of {NUM} draws have no optimum" in said["warnings"][0]
    assert any("5 of" in line for line in suggest.lines(said))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"target_flops": 0.0}, "target_flops must be from 1e+09 to 1e+30 FLOPs; got"),
        ({"budget_flops": math.inf}, "budget_flops must be from 1e.* FLOPs; got inf"),
        ({"max_runs": 0}, "max_runs must be >= 1; got 0"),
        ({"top_share": 1.5}, "top_share must be from 0 to 1; got 1.5"),
        ({"params_factor": 0.5}, "params_factor must be >= 1; got 0.5"),
        ({"noise": 0.0}, "noise must be > 0 and finite; got 0.0"),
        ({"budget_flops": 1e10}, "the budget must pay for a run; got 1e+10 FLOPs"),
    ],
)
def test_what_cannot_be_is_refused(changed, message):
    columns = _design()
    given = {"target_flops": TARGET, "budget_flops": BUDGET} | changed
    draws = np.tile(THETA, (100, 1))
    with pytest.raises(UserError, match=message.replace("+", r"\+")):
        suggest.suggest(_fit(columns), draws, LAW, **given)


def test_a_fit_that_says_too_little_is_refused():
    columns = _design()
    draws = np.tile(THETA, (99, 1))
    given = {"target_flops": TARGET, "budget_flops": BUDGET}
    with pytest.raises(UserError, match="must have 100 draws with an optimum"):
        suggest.suggest(_fit(columns), draws, LAW, **given)


def test_no_run_is_shorter_than_those_fitted(found):
    columns = _design()
    fit = _fit(columns)
    fit["range"]["tokens"][0] = shortest = float(np.median(columns["tokens"]))
    given = {"target_flops": TARGET, "budget_flops": BUDGET}
    draws = _draws(columns, seed=0)
    made = suggest.suggest(fit, draws, LAW, **given)
    assert min(run["tokens"] for run in found["runs"]) < shortest
    assert min(run["tokens"] for run in made["runs"]) >= shortest
    fit["range"]["tokens"][0] = 1e30
    with pytest.raises(UserError, match="must pay for a run"):
        suggest.suggest(fit, draws, LAW, **given)
