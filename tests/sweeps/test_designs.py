import math
import pathlib

import pytest

from fm_jax import configfile
from fm_jax.errors import UserError
from fm_jax.sweeps import designs

CONFIGS = pathlib.Path(__file__).parent.parent.parent / "configs"
SIZE = {
    "rule": "width",
    "aspect": 24.0,
    "num_layers": 2,
    "head_dim": 8,
    "group": 1,
    "mlp_ratio": 4.0,
    "round_to": 8,
    "count": "total",
    "limits": (0, 0),
}
DESIGN = {
    "kind": "isoflop",
    "budgets": (),
    "sizes": (),
    "tokens": (),
    "tokens_per_param": (),
    "points": 7,
    "width": 4.0,
    "centre": 20.0,
    "decay_fraction": 0.2,
    "replicates": 1,
    "flops": "6n",
    "seed": 3,
}


def _sizes(flops="6n", **changed):
    base = configfile.load(str(CONFIGS / "base.py")).to_dict()
    base["model"] |= {"vocab_size": 320, "max_length": 64}
    base["data"]["max_length"] = 64
    return designs.Sizes(SIZE | changed, base, flops)


def _points(rungs=None, feasible=lambda dial, tokens: True, **changed):
    return designs.points(DESIGN | changed, rungs or _sizes(), feasible)


@pytest.mark.parametrize("flops", ["6n", "exact"])
def test_every_size_of_a_budget_spends_it_and_lies_around_its_centre(flops):
    sizes, budget = _sizes(flops), 4e13
    points, remarks = _points(sizes, budgets=(budget,))
    assert not remarks
    assert len({p.dial for p in points}) == len(points) == 7
    for point in points:
        spent = sizes.flops_per_token(point.dial) * point.tokens
        assert spent == pytest.approx(budget, rel=1e-12)
        assert point.budget_flops == budget
    centre = math.sqrt(budget / 120)  # C = 6 N * 20 N
    params = [sizes.params(p.dial) for p in points]
    assert params[0] == pytest.approx(centre / 4, rel=0.15)
    assert params[3] == pytest.approx(centre, rel=0.15)
    assert params[-1] == pytest.approx(centre * 4, rel=0.15)


def test_a_budget_takes_the_given_sizes():
    points, _ = _points(budgets=(1e13, 2e13), sizes=(16, 32, 48, 64, 80))
    assert [p.dial for p in points] == 2 * [16, 32, 48, 64, 80]


def test_a_budget_with_few_sizes_says_so_and_stays_within_limits():
    points, remarks = _points(_sizes(limits=(16, 40)), budgets=(1e12,))
    assert {p.dial for p in points} <= {16, 24, 32, 40}
    assert len(remarks) == 1
    assert "1e+12 has" in remarks[0]
    assert "fewer than 5" in remarks[0]


def test_a_budget_without_sizes_is_refused():
    with pytest.raises(UserError, match=r"none for 1e\+12 FLOPs"):
        _points(budgets=(1e12,), feasible=lambda dial, tokens: False)


def test_a_grid_has_every_size_on_every_number_of_tokens():
    points, _ = _points(kind="grid", sizes=(24, 16), tokens=(1e6, 3e6))
    assert [(p.dial, p.tokens) for p in points] == [
        (16, 1e6), (16, 3e6), (24, 1e6), (24, 3e6)]  # fmt: skip


def test_a_ladder_has_tokens_by_parameters():
    sizes = _sizes()
    points, _ = _points(sizes, kind="ladder", sizes=(16, 64), tokens_per_param=(5, 20))
    assert [p.tokens / sizes.params(p.dial) for p in points] == [5, 20, 5, 20]


def test_random_points_lie_within_bounds_and_a_longer_design_begins_with_a_shorter():
    given = {"kind": "random", "sizes": (16, 128), "tokens": (1e5, 1e8)}
    short, _ = _points(points=30, **given)
    long, _ = _points(points=60, **given)
    assert long[:30] == short
    assert all(16 <= p.dial <= 128 and 1e5 <= p.tokens <= 1e8 for p in long)
    logs = sorted(math.log10(p.tokens) for p in long)
    assert logs[30] == pytest.approx(6.5, abs=0.6)  # log-uniform: the middle
    other, _ = _points(points=30, seed=4, **given)
    assert other != short


def test_replicates_are_of_the_smallest_size_alone():
    points, _ = _points(kind="grid", sizes=(16, 24), tokens=(1e6,), replicates=3)
    assert [(p.dial, p.replicate) for p in points] == [
        (16, 0), (16, 1), (16, 2), (24, 0)]  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, r"design.budgets must be given for design.kind=isoflop; got \(\)"),
        ({"kind": "grid", "sizes": (16,)}, "design.tokens must be given"),
        (
            {"budgets": (1e12,), "tokens": (1e6,)},
            r"design.tokens must be \(\) for design.kind=isoflop",
        ),
        (
            {"kind": "random", "sizes": (16,), "tokens": (1e5, 1e6)},
            r"design.sizes must be \(low, high\)",
        ),
    ],
)
def test_lists_that_do_not_go_with_the_kind_are_refused(changed, said):
    with pytest.raises(UserError, match=said):
        _points(**changed)


def test_a_point_of_a_grid_with_too_few_steps_is_refused():
    with pytest.raises(
        UserError, match=r"budget.min_steps steps; got fewer for size 16"
    ):
        _points(
            kind="grid", sizes=(16,), tokens=(10,), feasible=lambda dial, tokens: False
        )
