"""Tests of the envelope fit on curves whose law is known, and on published curves."""

import json
import pathlib

import numpy as np
import pytest

from fm_jax.errors import UserError
from fm_jax.scaling import envelope, laws, resamples
from fm_jax.tables import table

DATA = pathlib.Path(__file__).parents[3] / "shared" / "data" / "scaling"
THETA = np.array([1.69, 406.4, 410.7, 0.34, 0.28])
A = 0.28 / 0.62  # exponent of N*
LAW = laws.find("chinchilla")


INSIDE = (1e18, 1e20)  # FLOPs at which sizes reach beyond the best one on both sides


def curves(*, sizes=41, points=200, decades=(6.5, 9.5), span=INSIDE, finals=None):
    """Return the points of runs of constant rate, one for each size, over a span."""
    size = np.repeat(np.geomspace(*(10.0**d for d in decades), sizes), points)
    tokens = np.tile(np.geomspace(*span, points), sizes) / 6 / size
    loss = LAW.loss(THETA, {"params": size, "tokens": tokens})
    run = np.repeat([f"run {k}" for k in range(sizes)], points)
    final = np.tile(np.arange(points) == points - 1, sizes)
    return of(size, tokens, loss, run, is_final=final if finals is None else finals)


def unequal(*, sizes=9, points=200):
    """Return `curves` of the same tokens each, whose spans of FLOPs differ."""
    given = curves(sizes=sizes, points=points)
    tokens = np.tile(np.geomspace(1e8, 3e11, points), sizes)
    loss = LAW.loss(THETA, {"params": given.params, "tokens": tokens})
    return of(given.params, tokens, loss, given.run, is_final=given.is_final)


def take(points, kept):
    """Return the points of the rows that a mask keeps."""
    return of(points.params[kept], points.tokens[kept], points.loss[kept],
              points.run[kept], is_final=points.is_final[kept],
              **{k: v[kept] for k, v in points.extra.items()})  # fmt: skip


def of(size, tokens, loss, run, *, is_final, cluster=None, **extra):
    return table.Points(
        params=size, tokens=tokens, loss=loss, flops=6 * size * tokens,
        cluster=np.asarray(run if cluster is None else cluster), is_final=is_final,
        run=np.asarray(run), budget=np.full(len(size), np.nan),
        extra={k: np.asarray(v, float) for k, v in extra.items()}, record={},
    )  # fmt: skip


def constant(points):
    """Return points with the columns of a constant rate."""
    rate = np.full(len(points), 0.003)
    points.extra.update(learning_rate=rate, learning_rate_now=rate.copy())
    return points


def slopes(found):
    """Return the exponents of N* and D* of an envelope, drawn or not."""
    log_c, *at = np.log([found.flops, found.params, found.tokens])
    return [np.polyfit(log_c, y, 1)[0] for y in at]


def best(flops):
    ratio = (0.34 * 406.4 / (0.28 * 410.7)) ** (1 / 0.62)
    return ratio * (flops / 6) ** A


def test_the_envelope_of_dense_sizes_recovers_the_exponents():
    found = envelope.fit(constant(curves()))
    assert found.line[1] == pytest.approx(A, abs=0.005)
    assert found.line[1] + found.line[3] == pytest.approx(1, abs=1e-9)
    start = found.line[0] + found.line[1] * np.log(1e19)
    assert start == pytest.approx(np.log(best(1e19)), abs=0.02)
    assert found.edge_fraction == 0


def test_the_envelope_is_the_least_loss_of_all_curves():
    points = constant(curves(sizes=9))
    found = envelope.fit(points)
    sizes = np.unique(points.params)
    for flops, size, loss in zip(found.flops, found.params, found.loss, strict=True):
        at = {"params": sizes, "tokens": flops / (6 * sizes)}
        losses = LAW.loss(THETA, at)
        assert size == pytest.approx(sizes[losses.argmin()])
        assert loss == pytest.approx(losses.min(), rel=1e-4)
    assert found.tokens == pytest.approx(found.flops / (6 * found.params))


def test_few_sizes_are_counted_and_named():
    found = envelope.fit(constant(unequal(sizes=7)))
    assert found.num_sizes == len(np.unique(found.params)) <= 7
    said = f"The envelope has only {found.num_sizes} different sizes."
    assert said in found.warnings
    assert found.record()["num_sizes"] == found.num_sizes


def test_the_range_of_compute_is_varied():
    points = constant(curves(sizes=25))
    found = envelope.fit(points)
    for part in found.parts:
        alone = envelope.fit(constant(curves(sizes=25, span=part["flops"])))
        assert slopes(alone)[0] == pytest.approx(part["a"], abs=2e-3)
        assert alone.num_sizes == part["num_sizes"]
    assert [p["part"] for p in found.parts] == list(envelope.PARTS)
    assert not any("depends on the range" in said for said in found.warnings)
    few = envelope.fit(constant(curves(sizes=13)))
    assert max(abs(part["a"] - few.line[1]) for part in few.parts) > 0.05
    assert any("depends on the range of C: lower two" in w for w in few.warnings)


def test_sizes_that_end_too_early_are_named():
    points = constant(curves(sizes=41, decades=(8.5, 9.5), span=(5e17, 1e20)))
    found = envelope.fit(points)
    assert found.edge_fraction > 0.5
    assert any("a better size may be missing" in said for said in found.warnings)


# ---- which rows take part


def test_rows_of_a_decaying_schedule_count_only_at_its_end():
    points = curves(sizes=9, points=20)
    points.extra.update(learning_rate=np.full(len(points), 0.003),
                        learning_rate_now=np.full(len(points), 0.001))  # fmt: skip
    found = envelope.fit(points)
    assert found.skipped.startswith("no curve has two points")
    assert found.warnings == (
        "171 of 180 rows are from before the end of a schedule and take no part in "
        "approach 1.",
    )


def test_a_warm_up_takes_no_part_in_a_curve_of_constant_rate():
    points = constant(curves(sizes=25, points=20))
    points.extra["learning_rate_now"][::20] /= 10
    found = envelope.fit(points)
    assert "25 of 500 rows" in found.warnings[0]
    assert not found.skipped


def test_a_table_that_does_not_know_its_ends_is_warned_of():
    found = envelope.fit(curves(sizes=25, finals=np.ones(25 * 200, bool)))
    assert "does not say where schedules ended: 25 runs" in found.warnings[0]
    assert not found.skipped


def test_branches_of_a_trunk_are_one_curve():
    whole = constant(curves(sizes=9, points=12))
    names = [f"branch {k}" for k in range(len(whole))]
    branches = of(whole.params, whole.tokens, whole.loss, names,
                  is_final=np.ones(len(whole), bool), cluster=whole.run)  # fmt: skip
    found, expected = envelope.fit(branches), envelope.fit(whole)
    assert found.num_curves == 9
    assert found.line == pytest.approx(expected.line)
    assert np.array_equal(found.draws, expected.draws)


def test_a_single_point_takes_part_only_where_it_is():
    points = constant(curves(sizes=9))
    alone = (1.1e8, 1e19 / 6 / 1.1e8)
    added = of(np.append(points.params, alone[0]), np.append(points.tokens, alone[1]),
               np.append(points.loss, 1.0), [*points.run, "alone"],
               is_final=np.append(points.is_final, True))  # fmt: skip
    constant(added)
    found = envelope.fit(added)
    (at,) = np.flatnonzero(np.isclose(found.params, alone[0]))
    assert found.flops[at] == pytest.approx(1e19, rel=0.002)
    assert found.loss[at] == pytest.approx(1.0)


def test_repeats_at_the_same_compute_leave_the_better_one():
    points = constant(curves(sizes=9, points=30))
    twice = of(np.tile(points.params, 2), np.tile(points.tokens, 2),
               np.append(points.loss, points.loss * 1.1), np.tile(points.run, 2),
               is_final=np.tile(points.is_final, 2))  # fmt: skip
    found = envelope.fit(constant(twice))
    assert found.line == pytest.approx(envelope.fit(points).line)


def test_compute_that_only_one_size_reached_does_not_count():
    points = constant(unequal())
    found = envelope.fit(points)
    ends = [points.flops[points.params == size] for size in np.unique(points.params)]
    # The second smallest begins where the next can be compared, and so at the end.
    starts, stops = np.sort([(c[0], c[-1]) for c in ends], axis=0).T
    assert found.flops[0] == pytest.approx(starts[1], rel=0.02)
    assert found.flops[-1] == pytest.approx(stops[-2], rel=0.02)


# ---- draws, refusals


@pytest.mark.parametrize(("make", "sizes"), [(curves, 12), (unequal, 6)])
def test_draws_are_the_fits_of_the_runs_they_keep(make, sizes):
    points = constant(make(sizes=sizes))
    found = envelope.fit(points, num_bootstraps=60, seed=3)
    names = np.array(list(dict.fromkeys(points.run)))
    expected = []
    for here in resamples.weights("cluster", names, 60, 3) > 0:
        kept = take(points, np.isin(points.run, names[here]))
        again = envelope.fit(kept, num_bootstraps=2)
        if again.num_sizes >= envelope.MIN_SIZES:
            expected.append(slopes(again))
    assert 0 < found.num_draws_refused == 60 - len(expected)
    # The grid of a fit is over the span of its own curves: the same only for `curves`.
    close = 1e-9 if make is curves else 0.003
    assert found.draws[:, 1::2] == pytest.approx(np.array(expected), abs=close)
    assert found.record()["draws_refused"] == found.num_draws_refused


def test_draws_without_an_envelope_are_named_and_most_of_them_give_none():
    found = envelope.fit(constant(unequal(sizes=6)))
    share = found.num_draws_refused / 1000
    assert any(
        f"{share:.1%} of the draws have no envelope" in w for w in found.warnings
    )
    few = envelope.fit(constant(curves(sizes=7)))
    assert few.num_sizes == 3
    assert few.skipped.startswith("too few curves to resample: ")
    assert few.line is few.draws is None


def test_one_cluster_is_resampled_curve_by_curve():
    points = constant(unequal())
    same = of(points.params, points.tokens, points.loss, points.run,
              is_final=points.is_final, cluster=["all"] * len(points))  # fmt: skip
    found = envelope.fit(constant(same))
    assert found.draws[:, 1].std() > 0
    assert any("each is resampled by itself" in said for said in found.warnings)
    assert found.record()["bootstrap"] == "curve"


def test_two_sizes_are_no_envelope():
    found = envelope.fit(constant(curves(sizes=2, decades=(8, 8.6))))
    assert found.skipped == "the envelope has 2 sizes, 3 needed"
    assert found.record()["skipped"] == found.skipped


def test_sizes_that_never_meet_are_no_envelope():
    size = np.repeat([1e6, 1e7, 1e8], 2)
    tokens = np.array([1e8, 2e8] * 3)
    found = envelope.fit(
        constant(of(size, tokens, np.full(6, 3.0), np.repeat(["a", "b", "c"], 2),
                    is_final=np.array([False, True] * 3)))
    )  # fmt: skip
    assert found.skipped == "at no FLOPs are there two sizes to compare"


def test_a_curve_of_two_sizes_is_refused():
    points = constant(curves(sizes=9))
    points.params[3] *= 2
    with pytest.raises(UserError, match=r"params must be one number; got .* run run 0"):
        envelope.fit(points)


def test_the_record_is_json():
    found = envelope.fit(constant(curves()), num_bootstraps=100)
    record = json.loads(json.dumps(found.record()))
    assert record["a"] == found.line[1]
    low, high = record["ci"]["a"]
    assert low <= record["a"] <= high
    assert (record["bootstrap"], record["draws"]) == ("cluster", 100)


def test_published_cosine_curves_give_the_exponent_of_a_plain_envelope():
    """The same curves' exponent from an independent argmin, with 7 sizes."""
    file = DATA / "misfitting_curves.csv"
    if not file.is_file():
        pytest.skip("the published curves in shared/data/scaling are not there")
    points = table.read(file, curves=True, mapping="run=group", duplicates="keep")
    found = envelope.fit(cut(points, 3e17, 1e19))
    assert found.line[1] == pytest.approx(0.488, abs=1.5e-3)
    assert found.num_sizes == 7
    assert "does not say where schedules ended" in found.warnings[0]


def cut(points, low, high):
    """Return curves between two FLOPs, with a point of their own at either end."""
    rows = []
    for run in np.unique(points.run):
        mine = np.flatnonzero(points.run == run)
        mine = mine[np.argsort(points.flops[mine])]
        x, size = np.log(points.flops[mine]), points.params[mine[0]]
        at = np.unique(np.clip(x, np.log(low), np.log(high)))
        for c in at[(at >= x[0]) & (at <= x[-1])]:
            loss = np.exp(np.interp(c, x, np.log(points.loss[mine])))
            rows.append((size, np.exp(c) / (6 * size), loss, run))
    size, tokens, loss, run = map(np.array, zip(*rows, strict=True))
    return of(size, tokens, loss, run, is_final=np.ones(len(run), bool))
