import dataclasses
import pathlib

import pytest

from fm_jax import config as configs
from fm_jax import configfile, optimizers
from fm_jax.errors import UserError
from fm_jax.models import counts
from fm_jax.sweeps import plans, sweep

SWEEPS = pathlib.Path(__file__).parent.parent.parent / "configs" / "sweeps"


def _sweep(name, design=(), budget=(), size=(), base=()):
    raw = configfile.load(str(SWEEPS / f"{name}.py")).to_dict()
    for section, values in (("design", design), ("budget", budget), ("size", size)):
        raw[section] |= dict(values)
    for section, values in dict(base).items():
        raw["base"][section] |= values
    return sweep.check(raw)


@pytest.fixture(
    scope="module", params=["tiny_isoflop", "tiny_branches", "gpt2_isoflop"]
)
def planned(request):
    asked = _sweep(request.param)
    return asked, plans.plan(asked)


def test_every_run_has_a_config_that_training_accepts(planned):
    for one in planned[1]:
        config = configs.check(one.config)
        assert config.train.steps == one.steps
        assert one.tokens == one.steps * config.train.batch_size * (
            config.data.max_length
        )
        assert vars(counts.params(config.model)) == one.params
        exact = counts.flops_per_token(config.model, config.data.max_length)
        assert one.flops_exact == pytest.approx(exact * one.tokens, rel=1e-12)


def test_overrides_are_all_that_a_run_changes(planned):
    asked, runs = planned
    for one in runs:
        changed = configfile.difference(asked.base, one.config)
        assert set(changed) <= set(one.overrides)
        flat = configfile.flat(one.config)
        assert all(flat[key] == value for key, value in one.overrides.items())


def test_names_are_unique_and_begin_with_their_place(planned):
    runs = planned[1]
    assert len({one.name for one in runs}) == len({one.hash for one in runs})
    for index, one in enumerate(runs):
        assert one.index == index
        assert one.name.startswith(f"{index:03d}-n")


def test_the_same_sweep_plans_the_same_runs(planned):
    asked, runs = planned
    assert plans.plan(sweep.check(asked.raw)) == runs


def test_names_and_hashes_do_not_change(monkeypatch):
    # The fingerprint of all keys has its own test: here stands what a plan varies.
    def fingerprint(raw, with_duration):
        keys = ("schedule.warmup_fraction", "schedule.decay_fraction", "train.steps")
        return [configfile.flat(raw)[key] for key in keys]

    monkeypatch.setattr(configfile, "fingerprint", fingerprint)
    asked = _sweep(
        "tiny_branches",
        {"sizes": (16,), "tokens_per_param": (20.0, 80.0), "decay_fraction": 0.2},
        {"learning_rate": "fixed", "warmup": "fraction"},
        {"rule": "width", "num_layers": 1, "head_dim": 4, "round_to": 8},
        {
            "model": {"vocab_size": 128, "activation": "relu2", "qk_norm": True},
            "data": {"max_length": 64},
            "train": {"batch_size": 32, "seed": 3},
            "schedule": {"warmup_fraction": 0.05},
        },
    )
    assert {one.name: one.hash for one in plans.plan(asked)} == {
        "000-n7.2e3-d1.2e5-s3-trunk": "0654ed1e1aca64a6",
        "001-n7.2e3-d4.6e5-s3-trunk": "155dbc9ba1558add",
        "002-n7.2e3-d1.5e5-s3": "fc7b5232810b962f",
        "003-n7.2e3-d5.8e5-s3": "cd297b9e19601139",
    }


def test_budgets_are_spent_within_half_a_percent():
    for name in ("tiny_isoflop", "gpt2_isoflop"):
        for one in plans.plan(_sweep(name)):
            assert one.flops == pytest.approx(one.budget_flops, rel=5e-3)
            assert one.flops == 6 * one.params["total"] * one.tokens


def test_exact_flops_can_be_what_a_budget_is_made_of():
    asked = _sweep("tiny_isoflop", {"flops": "exact"})
    for one in plans.plan(asked):
        assert one.flops == one.flops_exact
        assert one.flops == pytest.approx(one.budget_flops, rel=5e-3)


def test_a_run_that_misses_its_budget_is_said():
    # Five and a half steps of the smallest size.
    whole = _sweep("tiny_isoflop")
    rows, length = (
        whole.base["train"]["batch_size"],
        whole.base["data"]["max_length"],
    )
    step = rows * length * whole.sizes.flops_per_token(8)
    design = {"budgets": (5.45 * step,), "sizes": (8,)}
    asked = _sweep("tiny_isoflop", design, {"min_steps": 1})
    runs = plans.plan(asked)
    missed = [one for one in runs if abs(one.flops / one.budget_flops - 1) > 0.05]
    assert missed
    said = "\n".join(plans.remarks(asked, runs))
    assert all(one.name in said for one in missed)


def test_tokens_seen_again_are_said():
    asked = _sweep("tiny_isoflop", base={"synthetic": {"num_tokens": 1_000_000}})
    assert "see tokens again, up to" in " ".join(
        plans.remarks(asked, plans.plan(asked))
    )


def test_replicates_differ_in_their_seed_alone():
    runs = plans.plan(_sweep("tiny_isoflop", {"replicates": 3}))
    first, *others = (one for one in runs if one.dial == runs[0].dial)
    others = [one for one in others if one.budget_flops == first.budget_flops]
    assert [one.replicate for one in others] == [1, 2]
    for one in others:
        assert set(configfile.difference(first.config, one.config)) == {"train.seed"}
        assert one.hash != first.hash


# ---- branches


@pytest.fixture(scope="module")
def trees():
    asked = _sweep("tiny_branches", {"tokens_per_param": (17.0, 31.0, 90.0)})
    found = {}
    for one in plans.plan(asked):
        found.setdefault(one.dial, []).append(one)
    return list(found.values())


def _warmup(one):
    fraction = one.config["schedule"]["warmup_fraction"]
    return max(1, round(fraction * one.steps))


def _rates(one):
    config = configs.check(one.config)
    return optimizers.schedule(
        peak=config.optimizer.learning_rate,
        num_steps=one.steps,
        **dataclasses.asdict(config.schedule),
    )


def test_a_trunk_comes_before_its_branches_and_ends_where_the_last_begins(trees):
    assert len(trees) == 4
    for tree in trees:
        assert [one.role for one in tree] == ["trunk"] * 3 + ["branch"] * 3
        parts, branches = tree[:3], tree[3:]
        begins = [0, *(part.steps for part in parts)]
        assert [part.branch_step for part in parts] == begins[:-1]
        assert [part.parent for part in parts] == ["", parts[0].name, parts[1].name]
        for part, one in zip(parts, branches, strict=True):
            assert (one.parent, one.branch_step) == (part.name, part.steps)
            assert one.overrides["init.from"] == f"runs/{part.name}@{part.steps}"
            assert one.config["checkpoint"] == part.config["checkpoint"]


def test_horizons_far_apart_keep_a_checkpoint_each():
    horizons = (200.0, 410.0, 6400.0)
    runs = plans.plan(
        _sweep("tiny_branches", {"sizes": (16,), "tokens_per_param": horizons})
    )
    assert len(runs) == 6
    state = 12 * runs[0].params["total"]  # weights and two moments
    assert [one.disk_bytes for one in runs] == [state] * 6
    for one, asked in zip(runs[3:], horizons, strict=True):
        assert one.tokens / one.params["total"] == pytest.approx(asked, rel=2e-3)


def test_branches_that_begin_at_one_step_have_one_trunk():
    asked = _sweep(
        "tiny_branches",
        {"sizes": (16,), "tokens_per_param": (9.0, 9.3), "decay_fraction": 0.9},
    )
    trunk, *branches = plans.plan(asked)
    assert [one.parent for one in branches] == [trunk.name] * 2
    assert branches[0].steps < branches[1].steps


def test_a_longer_horizon_is_a_part_of_the_trunk_more():
    short, long = (
        plans.plan(_sweep("tiny_branches", {"sizes": (16,), "tokens_per_param": given}))
        for given in ((17.0, 31.0), (17.0, 31.0, 90.0))
    )
    assert {one.hash for one in short} < {one.hash for one in long}
    assert len(long) == len(short) + 2


def test_a_branch_of_few_steps_is_refused():
    design = {"sizes": (16,), "tokens_per_param": (5.0, 4000.0)}
    budget = {"batch": "power_lines", "anchor_tokens": 1e5}
    with pytest.raises(UserError, match=r"a branch must have 20 steps, budget.min_st"):
        plans.plan(_sweep("tiny_branches", design, budget))


def test_branches_go_on_with_the_optimizer_the_seed_and_the_batch(trees):
    for trunk, *others in trees:
        for one in others:
            assert one.config["init"]["optimizer"] is True
            for key in ("train.batch_size", "train.seed", "optimizer.learning_rate"):
                assert one.overrides[key] == trunk.overrides[key]


def test_the_warm_up_is_the_same_steps_in_a_trunk_and_its_branches(trees):
    for tree in trees:
        assert len({_warmup(one) for one in tree}) == 1


def test_a_branch_has_the_trunk_rate_until_it_begins_and_then_falls(trees):
    for *parts, trunk, a, b, c in trees[:2]:
        stem = _rates(trunk)
        peak = trunk.config["optimizer"]["learning_rate"]
        for part in parts:
            for step in (0, 1, _warmup(part), part.steps - 1):
                assert float(_rates(part)(step)) == float(stem(step))
        for one in (a, b, c):
            rate = _rates(one)
            for step in (0, 1, _warmup(one), one.branch_step - 1):
                assert float(rate(step)) == float(stem(step))
            assert float(rate(one.branch_step)) == pytest.approx(peak, rel=1e-6)
            assert float(rate(one.branch_step + 1)) < peak
            decay = one.steps - one.branch_step
            assert float(rate(one.steps - 1)) == pytest.approx(peak / decay, rel=1e-3)


def test_the_rate_of_a_trunk_never_falls(trees):
    for _, _, trunk, *_ in trees[:2]:
        peak = trunk.config["optimizer"]["learning_rate"]
        for step in (_warmup(trunk), trunk.steps // 2, trunk.steps - 1):
            assert float(_rates(trunk)(step)) == pytest.approx(peak, rel=1e-6)


def test_horizons_are_those_asked_for_and_decays_their_fraction(trees):
    for *_, a, b, c in trees:
        for one, asked in zip((a, b, c), (17.0, 31.0, 90.0), strict=True):
            batch = one.tokens / one.steps / one.params["total"]
            found = one.tokens / one.params["total"]
            assert found == pytest.approx(asked, abs=0.5 * batch)
            assert abs(0.8 * one.steps - one.branch_step) <= 0.5


def test_branches_cost_a_third_less_than_runs_of_their_own():
    # Horizons that double, three times: 1 - (0.8 * 4 + 0.2 * 7) / 7 (2405.18392).
    asked = _sweep(
        "tiny_branches", {"sizes": (48,), "tokens_per_param": (25.0, 50.0, 100.0)}
    )
    runs = plans.plan(asked)
    whole = sum(one.flops_exact for one in runs if one.role == "branch")
    cost = sum(one.cost_flops for one in runs)
    assert 1 - cost / whole == pytest.approx(1 - 4.6 / 7, abs=2e-3)


def test_a_warm_up_beyond_the_first_branch_is_refused():
    asked = _sweep(
        "tiny_branches", base={"schedule": {"name": "constant", "warmup_fraction": 0.9}}
    )
    with pytest.raises(
        UserError, match=r"warm-up of a trunk must end before its first"
    ):
        plans.plan(asked)


# ---- a plan that goes on


def test_more_runs_keep_the_names_of_those_before():
    short = plans.plan(
        _sweep("tiny_isoflop", {"budgets": (2e11, 8e11), "replicates": 1})
    )
    budgets = (1e11, 2e11, 4e11, 8e11)
    longer = _sweep("tiny_isoflop", {"budgets": budgets, "replicates": 1})
    runs = plans.plan(longer, earlier=[vars(one) for one in short])
    names = {one.hash: one.name for one in runs}
    assert all(names[one.hash] == one.name for one in short)
    assert sorted(one.index for one in runs) == list(range(len(runs)))


def test_what_does_not_change_a_run_does_not_change_its_hash():
    one = plans.plan(_sweep("tiny_isoflop"))
    other = plans.plan(
        _sweep("tiny_isoflop", base={"eval": {"every": 50}, "log": {"every": 5}})
    )
    assert [a.hash for a in one] == [b.hash for b in other]
    rate = plans.plan(
        _sweep("tiny_isoflop", base={"optimizer": {"learning_rate": 3e-3}})
    )
    assert not {a.hash for a in one} & {b.hash for b in rate}
