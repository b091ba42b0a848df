"""Predictions of a known law and of published data, and what is refused."""

import json
import math
import pathlib

import numpy as np
import pytest

from fm_jax.errors import UserError
from fm_jax.scaling import fit as fits
from fm_jax.scaling import frontier, laws, predict
from tests.scaling import surfaces

ROOT = pathlib.Path(__file__).parent.parent.parent
EPOCH = ROOT.parent / "shared" / "data" / "scaling" / "chinchilla_epoch.csv"
LAW = laws.LAWS["chinchilla"]
THETA = np.array([1.817218, 477.826, 2143.417, 0.3473105, 0.3671724])
NUM = 400


def _record(theta, law=LAW):
    values = dict(zip(law.names, map(float, theta), strict=True))
    return {"law": law.name, "residual_sd": 0.01} | values


def _fit():
    """Return a fit.json, draws and law: of total and of non-embedding parameters."""
    rng = np.random.default_rng(0)
    other = THETA * [1, 0.8, 1, 1, 1]
    ends = {
        "params": [1e7, 1e10],
        "tokens": [1e9, 1e12],
        "flops": [1.5e18, 1.5e22],  # as a table may count them
        "flops_6nd": [1e18, 1e22],
    }
    fit = {
        "inputs": {"count": "total"},
        "range": ends | {"flops_ratio": 1.5},
        "approach3": _record(THETA),
        "approach2": {
            "a": 0.5,
            "b": 0.5,
            "coefficient": 0.1,
            "coefficient_tokens": 1.6,
        },
        "by_count": {
            "non_embedding": _record(other)
            | {
                "range": {
                    name: [low / 2, high / 2] for name, (low, high) in ends.items()
                },
                "warnings": ["of its own"],
            }
        },
        "warnings": [
            "few decades",
            "approach 1: no curves",
            "approach 2: few sizes",
            "approach 2: few budgets",
        ],
    }
    spread = 1 + 0.01 * rng.standard_normal((NUM, 5))
    line = np.log([0.1, math.e**0.5, 1.6, math.e**0.5])
    draws = {
        "approach3": THETA * spread,
        "approach3_non_embedding": other * spread,
        "approach2": line + 0.01 * rng.standard_normal((NUM, 4)),
    }
    return fit, draws, LAW


def _values(found):
    return {name: found[name]["value"] for name in predict.ASKED}


def test_a_compute_gets_the_optimum_of_the_fit_and_of_its_draws():
    fit, draws, law = _fit()
    found = predict.predict(fit, draws, law, flops=1e21)
    params, tokens = frontier.optimum(LAW, THETA, 1e21)
    assert found["params"]["value"] == params
    assert found["tokens"]["value"] == tokens
    drawn, longest = frontier.optimum(LAW, draws["approach3"], 1e21)
    for name, column in (
        ("params", drawn),
        ("tokens", longest),
        ("tokens_per_param", longest / drawn),
    ):
        ends = np.quantile(column, [0.025, 0.975])
        np.testing.assert_allclose(found[name]["interval"], ends, rtol=1e-12)
        assert ends[0] < found[name]["value"] < ends[1]
    assert found["flops"] == {"value": 1e21, "interval": None}
    at = {"params": np.array([params]), "tokens": np.array([tokens])}
    losses = LAW.loss(draws["approach3"], at)[:, 0]
    assert found["loss"]["value"] == LAW.loss(THETA, at)[0]
    ends = np.quantile(losses, [0.025, 0.975])
    np.testing.assert_allclose(found["loss"]["interval"], ends, rtol=1e-12)
    low, high = frontier.flat_range(LAW, THETA, 1e21)
    assert found["flat_range"] == [low, high]
    assert found["optimum"] is None
    assert found["count"] == "total"


def test_params_or_tokens_alone_get_the_compute_that_they_are_best_for():
    fit, draws, law = _fit()
    whole = predict.predict(fit, draws, law, flops=1e21)
    for name in ("params", "tokens"):
        value = whole[name]["value"]
        found = predict.predict(fit, draws, law, **{name: value})
        assert _values(found) == pytest.approx(_values(whole), rel=1e-7)
        assert found[name]["interval"] is None
        low, high = found["flops"]["interval"]
        assert low < 1e21 < high


@pytest.mark.parametrize(
    "asked",
    [
        {"flops": 6e20, "params": 1e9},
        {"flops": 6e20, "tokens": 1e11},
        {"flops": 6e20, "tokens_per_param": 100.0},
        {"params": 1e9, "tokens": 1e11},
        {"params": 1e9, "tokens_per_param": 100.0},
        {"tokens": 1e11, "tokens_per_param": 100.0},
    ],
)
def test_two_amounts_say_the_run(asked):
    fit, draws, law = _fit()
    found = predict.predict(fit, draws, law, **asked)
    expected = dict(zip(predict.ASKED, (6e20, 1e9, 1e11, 100.0), strict=True))
    assert _values(found) == pytest.approx(expected, rel=1e-12)
    assert all(found[name]["interval"] is None for name in predict.ASKED)
    best = predict.predict(fit, draws, law, flops=6e20)
    assert found["optimum"]["params"] == pytest.approx(best["params"]["value"])
    excess = found["loss"]["value"] / best["loss"]["value"] - 1
    assert found["optimum"]["excess"]["value"] == pytest.approx(excess)
    assert excess > 0


def test_the_other_count_has_a_fit_draws_and_range_of_its_own():
    fit, draws, law = _fit()
    found = predict.predict(fit, draws, law, flops=1e22, count="non_embedding")
    other = THETA * [1, 0.8, 1, 1, 1]
    assert found["params"]["value"] == frontier.optimum(LAW, other, 1e22)[0]
    assert found["count"] == "non_embedding"
    assert found["extrapolation"] == pytest.approx(2)
    assert found["approach2"] is None  # it is of the count that was fitted
    assert found["warnings"][1:] == ["of its own"]


def test_a_table_of_its_own_counts_as_it_is_told():
    fit, draws, law = _fit()
    fit["inputs"]["count"] = "as given"
    found = predict.predict(fit, draws, law, flops=1e21, count="matmul")
    assert found["count"] == "matmul"
    assert found["params"]["value"] == frontier.optimum(LAW, THETA, 1e21)[0]
    found = predict.predict(fit, draws, law, flops=1e21)
    assert found["count"] == "as given"
    assert "N is as given, C = 6ND" in predict.lines(found)[0]


def test_approach_2_stands_beside_at_the_flops_of_its_table():
    fit, draws, law = _fit()
    found = predict.predict(fit, draws, law, flops=1e20)["approach2"]
    assert found["params"]["value"] == pytest.approx(0.1 * math.sqrt(1.5e20))
    assert found["tokens"]["value"] == pytest.approx(1.6 * math.sqrt(1.5e20))
    line = draws["approach2"]
    drawn = np.exp(line[:, 2] + line[:, 3] * np.log(1.5e20))
    ends = np.quantile(drawn, [0.025, 0.975])
    np.testing.assert_allclose(found["tokens"]["interval"], ends, rtol=1e-12)
    fit["approach2"] = {"skipped": "no budgets"}
    assert predict.predict(fit, draws, law, flops=1e20)["approach2"] is None


@pytest.mark.parametrize(
    ("asked", "factor", "said"),
    [
        ({"flops": 1e21}, 0.1, []),
        (
            {"flops": 5e22},
            5,
            ["extrapolation: 5e+22 FLOPs are 5 times beyond the larg"],
        ),
        (
            {"flops": 5e23},
            50,
            ["EXTRAPOLATION: 5e+23 FLOPs are 50 times beyond the la"],
        ),
        (
            {"flops": 2e17},
            2e-5,
            ["extrapolation: 2e+17 FLOPs are 5 times beyond the s"],
        ),
        (
            {"params": 1e9, "tokens": 3e12},
            1.8,
            [
                "extrapolation: 1.8e+22 FLOPs are 1.8 times beyond the largest",
                "extrapolation: 3e+12 tokens are 3 times beyond the largest",
            ],
        ),
    ],
)
def test_how_far_it_is_from_the_runs_is_said(asked, factor, said):
    fit, draws, law = _fit()
    found = predict.predict(fit, draws, law, **asked)
    assert found["extrapolation"] == pytest.approx(factor)
    carried = [w for w in found["warnings"] if "beyond" not in w]
    assert carried[0] == "few decades"
    ours = found["warnings"][: -len(carried)]
    assert len(ours) == len(said)
    assert all(w.startswith(s) for w, s in zip(ours, said, strict=True))


def test_warnings_of_approach_2_are_one_line_beside_its_numbers():
    fit, draws, law = _fit()
    said = predict.predict(fit, draws, law, flops=1e20)["warnings"]
    assert said == [
        "few decades",
        "approach 2 has warnings of its own (2), in fit.json",
    ]
    assert predict.predict(fit, draws, law, params=1e9)["warnings"] == ["few decades"]


def test_draws_without_an_optimum_are_counted():
    fit, draws, law = _fit()
    draws["approach3"][:7, 3] = -0.1
    found = predict.predict(fit, draws, law, flops=1e21)
    assert f"7 of {NUM} draws have no optimum here" in found["warnings"][0]
    assert np.isfinite(found["params"]["interval"]).all()
    draws["approach3"][:201, 3] = -0.1
    with pytest.raises(UserError, match="got 201 of 400 without"):
        predict.predict(fit, draws, law, flops=1e21)


def test_the_text_and_the_json_have_every_number():
    fit, draws, law = _fit()
    found = predict.predict(fit, draws, law, flops=1e23)
    text = "\n".join(predict.lines(found))
    for name in ("flops", "params", "tokens", "tokens_per_param"):
        assert f"{found[name]['value']:.3g}" in text
        for end in found[name]["interval"] or ():
            assert f"{end:.3g}" in text
    assert f"{found['loss']['value']:.4f}" in text
    assert "params, approach 2" in text
    assert "warning: few decades" in text
    assert json.loads(json.dumps(found)) == found
    two = predict.predict(fit, draws, law, flops=1e23, params=1e10)
    assert any("optimum there" in line for line in predict.lines(two))


def test_a_law_that_reads_more_is_told():
    law = laws.LAWS["data_constrained"]
    theta = np.array([1.8690, 521.2, 1488.0, 0.35266, 0.35266, 15.387756, 5.309743])
    fit, draws, _ = _fit()
    fit["approach3"] = _record(theta, law)
    spread = 1 + 0.01 * np.random.default_rng(0).standard_normal((NUM, 7))
    draws = {"approach3": theta * spread}
    given = {"flops": 1e22, "columns": {"unique_tokens": 1e9}}
    found = predict.predict(fit, draws, law, **given)
    params, _ = frontier.optimum(law, theta, 1e22, columns={"unique_tokens": 1e9})
    assert found["params"]["value"] == pytest.approx(params, rel=1e-6)
    missing = "must be told unique_tokens; .* Give --column=unique_tokens=NUMBER"
    with pytest.raises(UserError, match=missing):
        predict.predict(fit, draws, law, flops=1e22)
    given["columns"] = {"unique": 1e9}
    with pytest.raises(UserError, match=r"--column must .*\(unique_tokens\); got uniq"):
        predict.predict(fit, draws, law, **given)
    given["columns"] = {"unique_tokens": -1.0}
    with pytest.raises(UserError, match=r"unique_tokens must be > 0 .*; got -1\.0"):
        predict.predict(fit, draws, law, **given)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"flops": 0.0}, r"--flops must be > 0 and finite; got 0\.0"),
        ({"flops": -1e20}, "--flops must be > 0 and finite; got -1e"),
        ({"flops": math.nan}, "--flops must be > 0 and finite; got nan"),
        ({"params": math.inf}, "--params must be > 0 and finite; got inf"),
        ({"flops": 1e60}, r"from 1e\+09 to 1e\+30 FLOPs; got 1e\+60 for flops 1e"),
        ({"flops": 3.0}, r"from 1e\+09 to 1e\+30 FLOPs; got 3 for flops 3"),
        ({"params": 1e200, "tokens": 1e200}, "FLOPs; got inf for params 1e.200"),
        ({"tokens": 1e30}, r"FLOPs; got \S+ for tokens 1e"),
        ({}, "predict must be given --flops, --params or --tokens, .*; got none"),
        ({"tokens_per_param": 20.0}, "must be given .*; got tokens_per_param 20"),
        (
            {"flops": 1e21, "params": 1e9, "tokens": 1e11},
            "must be given .*; got flops 1e.21, params 1e.09, tokens 1e.11",
        ),
        (
            {"flops": 1e21, "count": "totl"},
            "--count must be one .* Did you mean 'total",
        ),
        (
            {"flops": 1e21, "count": "matmul"},
            r"one that was fitted \(total, non_embedding\); got matmul",
        ),
    ],
)
def test_what_cannot_be_asked_is_refused(asked, message):
    fit, draws, law = _fit()
    with pytest.raises(UserError, match=message):
        predict.predict(fit, draws, law, **asked)


def test_a_fit_without_a_law_or_an_optimum_is_refused():
    fit, draws, law = _fit()
    for broken, why in (
        ({k: v for k, v in fit.items() if k != "approach3"}, "there is no approach 3"),
        (fit | {"approach3": {"skipped": "too few runs"}}, "too few runs"),
    ):
        with pytest.raises(UserError, match=rf"must have the fit of a law.*\({why}\)"):
            predict.predict(broken, draws, law, flops=1e21)
    with pytest.raises(UserError, match="its draws are missing"):
        predict.predict(fit, {}, law, flops=1e21)
    fit["approach3"]["alpha"] = -0.3
    with pytest.raises(UserError, match="must have an optimum where one is asked for"):
        predict.predict(fit, draws, law, flops=1e21)


def test_a_run_is_compared_with_no_optimum_where_there_is_none():
    fit, draws, law = _fit()
    fit["approach3"]["alpha"] = -0.3
    draws["approach3"] = np.tile(THETA * [1, 1, 1, -1, 1], (NUM, 1))
    found = predict.predict(fit, draws, law, flops=1e21, params=1e9)
    assert found["flat_range"] is None
    assert found["optimum"] is None
    assert "nan" not in "\n".join(predict.lines(found))


def test_flops_of_another_rule_change_no_prediction(tmp_path):
    """A table whose flops are 9ND: both approaches, and how far it is, as with 6ND."""
    columns = surfaces.isoflop(sizes=7)
    asked = {"flops": 1e22}
    made = []
    for rule in (6, 9):
        flops = rule * columns["params"] * columns["tokens"]
        path = surfaces.write(tmp_path / f"{rule}.csv", columns | {"flops": flops})
        fitted = fits.run(path, fits.Options(num_bootstraps=100))
        made.append(predict.predict(fitted.record, fitted.draws, fitted.law, **asked))
    six, nine = made
    assert nine["extrapolation"] == pytest.approx(six["extrapolation"])
    for name in ("params", "tokens"):
        assert nine[name]["value"] == pytest.approx(six[name]["value"])
        ours, theirs = nine["approach2"][name], six["approach2"][name]
        assert ours["value"] == pytest.approx(theirs["value"], rel=1e-6)
        assert ours["interval"] == pytest.approx(theirs["interval"], rel=1e-6)


def test_epoch_s_points_give_the_published_ratios():
    """D/N of Hoffmann et al.'s points with its interval, as this data's readers did."""
    if not EPOCH.is_file():
        pytest.skip("the digitised Chinchilla points are not there")
    options = fits.Options(exclude=("outlier=1",), bootstrap="pairs")
    fitted = fits.run(EPOCH, options)
    for flops, low, value, high in (
        (1e21, 15.4, 21.4, 28.5),
        (5.76e23, 7.6, 17.92, 35.9),
    ):
        found = predict.predict(fitted.record, fitted.draws, fitted.law, flops=flops)[
            "tokens_per_param"
        ]
        assert found["value"] == pytest.approx(value, abs=0.05)
        # The ends are themselves known to some 3 % from 4,000 resamples.
        assert found["interval"] == pytest.approx([low, high], rel=0.05)


def test_a_run_has_the_spread_of_the_draws_and_of_its_own_noise():
    losses = np.full(20_001, 2.0)  # draws that agree: what is left is the noise
    low, high = predict.of_a_run(losses, {"residual_sd": 0.01})
    assert np.log([low / 2, high / 2]) == pytest.approx([-0.0196, 0.0196], abs=6e-4)
    fit, draws, law = _fit()
    found = predict.predict(fit, draws, law, flops=1e20)
    (low, high), (inner, outer) = (
        found["loss"][name] for name in ("of_a_run", "interval")
    )
    assert low < inner < outer < high
