"""Tests of a whole fit: what it finds, what it keeps, and what it refuses."""

import json

import numpy as np
import pytest

from fm_jax.errors import UserError
from fm_jax.scaling import files, fit, show
from fm_jax.tables import schema
from tests.scaling import surfaces

TRUTH = surfaces.TRUTH
A = TRUTH["beta"] / (TRUTH["alpha"] + TRUTH["beta"])


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    return surfaces.write(folder / "runs.csv", surfaces.isoflop())


@pytest.fixture(scope="module")
def found(table):
    return fit.run(table, fit.Options(num_bootstraps=500))


def _mistake(path, **options):
    with pytest.raises(UserError) as error:
        fit.run(path, fit.Options(**options))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_truth_is_inside_the_intervals(found):
    third = found.record["approach3"]
    for name, value in (TRUTH | {"a": A, "b": 1 - A}).items():
        low, high = third["ci"][name]
        assert low < value < high, name
        assert low < third[name] < high, name
    low, high = found.record["approach2"]["ci"]["a"]
    assert low < A < high


def test_optima_are_those_of_the_law_and_say_how_far_they_reach(found):
    for one, beyond in zip(found.record["optima"], fit.BEYOND, strict=True):
        assert one["extrapolation"] == pytest.approx(beyond)
        assert 6 * one["params"] * one["tokens"] == pytest.approx(one["flops"])
        third = found.record["approach3"]
        n, d = one["params"], one["tokens"]
        loss = third["E"] + third["A"] / n ** third["alpha"]
        loss += third["B"] / d ** third["beta"]
        assert one["loss"] == pytest.approx(loss, rel=1e-12)
        assert one["flat"][0] < n < one["flat"][1]
        assert one["ci"]["params"][0] < n < one["ci"]["params"][1]


def test_the_same_table_gives_the_same_files(table, found, tmp_path):
    again = fit.run(table, fit.Options(num_bootstraps=500))
    for folder, one in (("a", found), ("b", again)):
        files.write(one.record, one.draws, tmp_path / folder)
    text = [(tmp_path / f / files.FILE).read_text() for f in "ab"]
    assert text[0] == text[1]
    record, draws, law = files.load(tmp_path / "a")
    assert record == found.record
    np.testing.assert_array_equal(draws["approach3"], found.draws["approach3"])
    np.testing.assert_array_equal(
        files.theta(record["approach3"], law),
        [record["approach3"][name] for name in ("E", "A", "B", "alpha", "beta")],
    )


def test_a_fixed_floor_stays_where_it_is(table, tmp_path):
    found = fit.run(table, fit.Options(num_bootstraps=100, fixed={"E": 1.69}))
    assert found.record["approach3"]["E"] == 1.69
    low, high = found.record["approach3"]["ci"]["alpha"]
    assert low < TRUTH["alpha"] < high
    files.write(found.record, found.draws, tmp_path)
    record, draws, law = files.load(tmp_path)
    assert law.names == ("A", "B", "alpha", "beta")
    assert draws["approach3"].shape == (100, 4)
    assert "E 1.69 (held)" in "\n".join(show.lines(record))


def test_a_weight_of_two_is_a_run_told_twice(tmp_path):
    columns = surfaces.isoflop()
    twice = np.arange(36) % 3 == 0
    weighted = columns | {"w": 1.0 + twice}
    again = {n: np.concatenate([c, c[twice]]) for n, c in columns.items()}
    options = {"num_bootstraps": 100}
    a = fit.run(
        surfaces.write(tmp_path / "a.csv", weighted), fit.Options(weight="w", **options)
    ).record["approach3"]
    b = fit.run(
        surfaces.write(tmp_path / "b.csv", again),
        fit.Options(duplicates="keep", **options),
    ).record["approach3"]
    assert a["objective"] == pytest.approx(b["objective"], rel=1e-10)
    for name in TRUTH:
        assert a[name] == pytest.approx(b[name], rel=1e-6)
    file = tmp_path / "a.csv"
    assert _mistake(file, weight="v").startswith("--weight must be one of the known")
    surfaces.write(file, weighted | {"w": 1.0 - twice})
    assert _mistake(file, weight="w").startswith("--weight=w must be > 0 in each row")


def test_options_that_cannot_be_are_refused_by_name(table):
    assert _mistake(table, space="cubic").startswith("--space must be")
    assert _mistake(table, bootstrap="boot").startswith("--bootstrap must be")
    assert _mistake(table, slices="spline").startswith("--slices must be")
    assert _mistake(table, delta=-1.0).startswith("--delta must be >= 0")
    assert _mistake(table, num_bootstraps=9).startswith("--num_bootstraps must")
    assert _mistake(table, seed=-1).startswith("--seed must be")


def test_rows_that_cannot_be_read_may_be_excluded(tmp_path):
    columns = surfaces.isoflop()
    columns["bad"] = (np.arange(36) == 3).astype(float)
    columns["loss"][3] = np.nan
    file = surfaces.write(tmp_path / "gap.csv", columns)
    found = fit.run(file, fit.Options(num_bootstraps=100, exclude=("bad=1",)))
    assert found.record["inputs"]["rows"] == 35
    what = [row["what"] for row in found.record["sensitivity"]]
    assert "with the excluded rows" not in what
    columns["loss"][3] = 5.0
    file = surfaces.write(tmp_path / "high.csv", columns)
    found = fit.run(file, fit.Options(num_bootstraps=100, exclude=("bad=1",)))
    assert found.record["sensitivity"][-1]["runs"] == 36


def test_a_law_may_read_params_alone(tmp_path):
    law = tmp_path / "size.py"
    law.write_text(
        'NAMES = ("E", "A", "alpha")\nCOLUMNS = ("params",)\n'
        "def loss(theta, params):\n"
        "    E, A, alpha = theta\n    return E + A / params**alpha\n"
    )
    columns = surfaces.isoflop()
    columns["loss"] = 1.7 + 400 / columns["params"] ** 0.34
    file = surfaces.write(tmp_path / "runs.csv", columns)
    record = fit.run(file, fit.Options(num_bootstraps=100, law=str(law))).record
    assert record["approach3"]["alpha"] == pytest.approx(0.34, rel=1e-4)
    assert "reads params" in record["optima"][0]["skipped"]
    assert show.lines(record)


def test_a_table_without_curves_still_gives_its_law(tmp_path):
    columns = surfaces.isoflop()
    columns["run"] = np.full(36, "one")
    found = fit.run(
        surfaces.write(tmp_path / "a.csv", columns), fit.Options(num_bootstraps=100)
    )
    assert "curve's params must be one number" in found.record["approach1"]["skipped"]
    assert found.record["approach3"]["certificate"]["converged"]


def test_one_place_with_several_rates_is_said_and_fitted_by_its_best_too(tmp_path):
    columns = {n: np.repeat(c, 3) for n, c in surfaces.isoflop(noise=1e-3).items()}
    columns["learning_rate"] = np.tile([1e-3, 2e-3, 4e-3], 36)
    columns["loss"] = columns["loss"] * np.tile([1.02, 1.0, 1.03], 36)
    file = surfaces.write(tmp_path / "rates.csv", columns)
    record = fit.run(file, fit.Options(num_bootstraps=100)).record
    assert any("differ in learning_rate" in said for said in record["warnings"])
    best = next(r for r in record["sensitivity"] if "best run" in r["what"])
    assert best["runs"] == 36
    assert best["E"] == pytest.approx(1.69, abs=0.03)
    assert record["approach3"]["replicate_sd"] is None
    assert record["rates"]["cells"]


def test_optima_are_at_six_n_d_whatever_the_tables_flops(tmp_path):
    columns = surfaces.isoflop()
    columns["flops"] = 9 * columns["params"] * columns["tokens"]
    file = surfaces.write(tmp_path / "nine.csv", columns)
    record = fit.run(file, fit.Options(num_bootstraps=100)).record
    assert record["range"]["flops"][1] == pytest.approx(1.5e21)
    assert record["range"]["flops_6nd"][1] == pytest.approx(1e21)
    assert record["range"]["flops_ratio"] == pytest.approx(1.5)
    assert record["optima"][0]["flops"] == pytest.approx(1e21)
    assert record["optima"][0]["extrapolation"] == pytest.approx(1)


@pytest.mark.parametrize("column", ["params", "tokens"])
def test_one_size_or_one_length_is_refused_by_name(tmp_path, column):
    columns = surfaces.isoflop()
    columns[column] = np.full(36, 1e9)
    file = surfaces.write(tmp_path / "same.csv", columns)
    held = {"params": "A and alpha", "tokens": "B and beta"}[column]
    assert _mistake(file, duplicates="keep") == (
        f"--law=chinchilla must have runs of different {column}; got 1e+09 in each. "
        f"Add others, or hold {held} with --fix."
    )


def test_fewer_runs_than_parameters_are_refused(tmp_path):
    columns = {name: c[::8] for name, c in surfaces.isoflop().items()}
    few = surfaces.write(tmp_path / "few.csv", columns)
    assert _mistake(few) == (
        "--law=chinchilla must have more runs than its 5 parameters; got 5. Add runs, "
        "or fix a parameter."
    )


def test_a_law_that_reads_a_column_that_is_not_there_says_so(table):
    said = _mistake(table, law="data_constrained")
    assert said.startswith("--law=data_constrained must have unique_tokens for each")


def _run_rows(count, *, bayes=None):
    """Return rows of a run table, of models whose counts differ by a factor."""
    columns = surfaces.isoflop()
    rows = []
    for i in range(len(columns["loss"])):
        given = dict.fromkeys(schema.COLUMNS)
        total, tokens = int(columns["params"][i]), int(columns["tokens"][i])
        given |= {
            "run_id": f"run{i}", "status": "final", "step": 10, "steps": 10,
            "is_final": True, "params_total": total, "tokens": tokens,
            "params_non_embedding": total // 2, "params_matmul": 3 * total // 4,
            "loss": float(columns["loss"][i]), "bayes_loss": bayes,
            "format": schema.FORMAT, "learning_rate": 0.1, "batch_tokens": 8,
            "flops_exact": 6.0 * total * tokens,
        }  # fmt: skip
        rows.append(json.dumps(schema.row(**given)))
    return rows[:count]


def test_every_count_of_a_run_table_is_fitted(tmp_path):
    file = tmp_path / "table.jsonl"
    file.write_text("\n".join(_run_rows(100)) + "\n")
    found = fit.run(file, fit.Options(num_bootstraps=200))
    others = found.record["by_count"]
    assert set(others) == {"non_embedding", "matmul"}
    # Half the params for all runs: A falls by 2^alpha, the rest stays.
    third, half = found.record["approach3"], others["non_embedding"]
    ratio = 2 ** third["alpha"]
    assert half["A"] == pytest.approx(third["A"] / ratio, rel=1e-3)
    assert half["a"] == pytest.approx(third["a"], abs=1e-4)
    assert found.draws["approach3_matmul"].shape == (200, 5)


def test_the_known_entropy_of_the_source_is_held_beside_the_floor(tmp_path):
    file = tmp_path / "table.jsonl"
    file.write_text("\n".join(_run_rows(100, bayes=1.69)) + "\n")
    bayes = fit.run(file, fit.Options(num_bootstraps=200)).record["bayes"]
    assert bayes["loss"] == pytest.approx(1.69, rel=1e-12)
    assert bayes["is_inside_ci"] is True
    file.write_text("\n".join(_run_rows(100, bayes=1.2)) + "\n")
    found = fit.run(file, fit.Options(num_bootstraps=200))
    assert found.record["bayes"]["is_inside_ci"] is False
    assert "OUTSIDE its interval" in "\n".join(show.lines(found.record))


# ---- the text


def test_the_text_gives_each_estimate_with_its_interval(found):
    text = "\n".join(show.lines(found.record))
    third = found.record["approach3"]
    low, high = third["ci"]["a"]
    assert f"a {third['a']:.4g} [{low:.4g}, {high:.4g}]" in text
    assert "100x EXTRAPOLATED" in text
    assert "bootstraps" in text
    assert all(said in text for said in found.record["warnings"])


def test_what_is_no_number_is_a_dash():
    assert show.number(None) == show.number(float("nan")) == "-"
    assert show.bracket([1.0, None]) == "[1, -]"
    assert show.bracket(None) == ""
