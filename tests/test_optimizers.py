"""Tests of the schedules against their formulas and of AdamW against NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fm_jax import optimizers
from fm_jax.errors import UserError
from fm_jax.models import zoo

STEPS, WARMUP, DECAY, PEAK, FINAL = 200, 20, 50, 0.03, 0.1
SETTINGS = {
    "peak": PEAK,
    "num_steps": STEPS,
    "warmup_fraction": WARMUP / STEPS,
    "decay_fraction": DECAY / STEPS,
    "final_fraction": FINAL,
}


def _rate(name, **overrides):
    return optimizers.schedule(name=name, **SETTINGS | overrides)


def _formula(name, step):
    """Return the rate before update `step`, counted from 0, written out anew."""
    if step < WARMUP:
        return PEAK * (step + 1) / WARMUP
    low = PEAK * FINAL
    done = (step - WARMUP) / (STEPS - WARMUP)
    if name == "cosine":
        return low + (PEAK - low) * (1 + math.cos(math.pi * done)) / 2
    if name == "linear":
        return PEAK + (low - PEAK) * done
    if name == "constant":
        return PEAK
    if name == "wsd":
        left = STEPS - step
        return PEAK if left >= DECAY else low + (PEAK - low) * left / DECAY
    return PEAK * math.sqrt(WARMUP / step)


@pytest.mark.parametrize("name", optimizers.SCHEDULES)
@pytest.mark.parametrize(
    "step", [0, 1, WARMUP // 2, WARMUP - 1, WARMUP, 77, 110, 149, 150, 151, 175, 199]
)
def test_a_schedule_follows_its_formula(name, step):
    assert float(_rate(name)(step)) == pytest.approx(_formula(name, step), rel=1e-5)


@pytest.mark.parametrize("name", optimizers.SCHEDULES)
def test_warm_up_rises_linearly_from_one_part_to_the_peak(name):
    rates = np.array([_rate(name)(step) for step in range(WARMUP + 1)])
    expected = PEAK * np.minimum(np.arange(1, WARMUP + 2) / WARMUP, 1)
    np.testing.assert_allclose(rates, expected, rtol=1e-6)


@pytest.mark.parametrize(
    "name, middle, end",
    [
        ("cosine", 0.55, 0.1),
        ("linear", 0.55, 0.1),
        ("constant", 1.0, 1.0),
        ("wsd", 1.0, 0.1),
        ("inverse_sqrt", math.sqrt(20 / 110), math.sqrt(20 / 200)),
    ],
)
def test_the_middle_and_the_end_are_these_parts_of_the_peak(name, middle, end):
    rate = _rate(name)
    assert float(rate(110)) / PEAK == pytest.approx(middle, rel=1e-5)
    assert float(rate(STEPS)) / PEAK == pytest.approx(end, rel=1e-5)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("final", [0.0, 0.25, 1.0])
def test_a_falling_schedule_ends_at_the_final_fraction_and_stays(name, final):
    rate = _rate(name, final_fraction=final)
    for step in (STEPS, STEPS + 1, 3 * STEPS):
        assert float(rate(step)) == pytest.approx(PEAK * final, rel=1e-5, abs=1e-9)


def test_wsd_has_fallen_half_way_in_the_middle_of_its_decay():
    rate = _rate("wsd", final_fraction=0.0)
    assert float(rate(STEPS - DECAY // 2)) == pytest.approx(PEAK / 2, rel=1e-6)


@pytest.mark.parametrize("name", optimizers.SCHEDULES)
def test_without_warm_up_the_first_update_is_at_the_peak(name):
    assert float(_rate(name, warmup_fraction=0.0)(0)) == pytest.approx(PEAK)


@pytest.mark.parametrize("name", optimizers.SCHEDULES)
def test_warm_up_may_take_all_steps(name):
    rate = _rate(name, warmup_fraction=1.0)
    rates = np.array([rate(step) for step in range(STEPS)])
    np.testing.assert_allclose(rates, PEAK * np.arange(1, STEPS + 1) / STEPS, rtol=1e-5)


@pytest.mark.parametrize("name", optimizers.SCHEDULES)
def test_a_run_of_one_step_has_a_rate(name):
    assert float(_rate(name, num_steps=1)(0)) == pytest.approx(PEAK)


def test_a_schedule_takes_a_traced_step():
    steps = jnp.arange(STEPS)
    traced = jax.jit(jax.vmap(_rate("cosine")))(steps)
    expected = [_formula("cosine", step) for step in range(STEPS)]
    np.testing.assert_allclose(traced, expected, rtol=1e-5)


def test_unknown_schedules_are_refused_with_the_nearest_first():
    with pytest.raises(UserError) as error:
        _rate("cosin")
    assert str(error.value) == (
        "schedule.name must be one of the known names; got 'cosin'. Did you mean "
        "'cosine'? Known: cosine, constant, inverse_sqrt, linear, wsd"
    )


def test_unknown_optimizers_are_refused():
    with pytest.raises(UserError) as error:
        _chain(mask={}, name="adam")
    assert str(error.value) == (
        "optimizer.name must be one of the known names; got 'adam'. Did you mean "
        "'adamw'? Known: adamw"
    )


BASE_RULES = (("norm|bias|embedding", False), (".*", True))


def test_the_rules_of_base_decay_every_kernel_and_the_head_alone(model_config):
    params = zoo.build(model_config(use_bias=True, positions="learned")).abstract
    mask = optimizers.decay_mask(params, BASE_RULES)
    assert mask["embedding"] is False
    assert mask["position_embedding"] is False
    assert mask["head"] is True
    assert mask["final_norm"] == {"scale": False}
    blocks = mask["blocks"]
    assert blocks["attention"]["query"] == {"kernel": True, "bias": False}
    assert blocks["attention"]["out"] == {"kernel": True, "bias": False}
    assert blocks["mlp"]["down"] == {"kernel": True, "bias": False}
    assert blocks["mlp_norm"] == {"scale": False}
    assert jax.tree.structure(mask) == jax.tree.structure(params)


def test_the_balance_of_experts_never_decays(model_config):
    config = model_config(num_experts=3, num_experts_per_token=2)
    mask = optimizers.decay_mask(zoo.build(config).abstract, ((".*", True),))
    assert mask["blocks"]["mlp"]["balance"] is False
    assert mask["blocks"]["mlp"]["router"] == {"kernel": True}


def test_the_first_rule_that_finds_a_path_decides():
    params = {"a": {"kernel": 0, "bias": 0}, "b": {"kernel": 0}}
    rules = (("bias", False), ("^a", True), ("kernel", False))
    assert optimizers.decay_mask(params, rules) == {
        "a": {"kernel": True, "bias": False},
        "b": {"kernel": False},
    }


def test_a_parameter_that_no_decay_rule_finds_is_refused():
    with pytest.raises(UserError) as error:
        optimizers.decay_mask({"head": 0, "kernel": 0}, (("kernel", True),))
    assert str(error.value) == (
        "optimizer.decay_rules must cover every parameter; got no rule for 'head'. "
        "End the rules with one for '.*'."
    )


# The epsilon is large, so that its place outside the root shows.
ADAMW = {
    "name": "adamw",
    "weight_decay": 0.7,
    "beta1": 0.8,
    "beta2": 0.9,
    "epsilon": 0.05,
    "mu_dtype": "float32",
    "nu_dtype": "float32",
    "clip_norm": 0.0,
}


def _chain(rate=lambda step: 0.1, mask=None, **overrides):
    return optimizers.make(rate, mask, **ADAMW | overrides)


def _numpy_adamw(params, grads, rates, decays, *, clip_norm):
    """Return `params` after AdamW updates, in float64; all are flat dicts."""
    beta1, beta2, epsilon = (ADAMW[n] for n in ("beta1", "beta2", "epsilon"))
    params = {name: value.astype(np.float64) for name, value in params.items()}
    first = {name: np.zeros_like(value) for name, value in params.items()}
    second = {name: np.zeros_like(value) for name, value in params.items()}
    for count, (grad, rate) in enumerate(zip(grads, rates, strict=True), start=1):
        norm = math.sqrt(sum(np.sum(g.astype(np.float64) ** 2) for g in grad.values()))
        shrink = min(1.0, clip_norm / norm) if clip_norm else 1.0
        for name, value in params.items():
            g = grad[name].astype(np.float64) * shrink
            first[name] = beta1 * first[name] + (1 - beta1) * g
            second[name] = beta2 * second[name] + (1 - beta2) * g**2
            step = first[name] / (1 - beta1**count)
            step = step / (np.sqrt(second[name] / (1 - beta2**count)) + epsilon)
            if decays[name]:
                step = step + ADAMW["weight_decay"] * value
            params[name] = value - rate * step
    return params


def _params_and_grads(num_steps):
    rng = np.random.default_rng(5)

    def tree():
        return {
            "kernel": rng.standard_normal((3, 5)).astype(np.float32),
            "scale": rng.standard_normal(7).astype(np.float32),
        }

    return tree(), [tree() for _ in range(num_steps)]


@pytest.mark.parametrize("clip_norm", [0.0, 2.0, 4.5, 100.0])
@pytest.mark.parametrize("decays", [(True, False), (False, False), (True, True)])
def test_updates_equal_adamw_in_numpy(clip_norm, decays):
    params, grads = _params_and_grads(6)
    norms = [math.sqrt(sum(np.sum(g**2) for g in grad.values())) for grad in grads]
    assert min(norms) < 4.5 < max(norms)  # so that this bound clips some steps alone
    rates = [0.1, 0.2, 0.3, 0.2, 0.1, 0.05]
    mask = dict(zip(params, decays, strict=True))
    expected = _numpy_adamw(params, grads, rates, mask, clip_norm=clip_norm)
    tx = _chain(lambda step: jnp.array(rates)[step], mask, clip_norm=clip_norm)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for grad in grads:
        updates, state = update(grad, state, params)
        params = optax.apply_updates(params, updates)
    for name, value in expected.items():
        np.testing.assert_allclose(params[name], value, rtol=2e-5, atol=2e-6)


def test_decay_is_the_rate_times_the_weights_where_gradients_are_zero():
    params, _ = _params_and_grads(0)
    zeros = jax.tree.map(np.zeros_like, params)
    tx = _chain(lambda step: 0.25, {"kernel": True, "scale": False})
    updates, _ = tx.update(zeros, tx.init(params), params)
    np.testing.assert_allclose(
        updates["kernel"], -0.25 * 0.7 * params["kernel"], rtol=1e-6
    )
    np.testing.assert_array_equal(updates["scale"], 0.0)


def test_the_rate_is_read_at_the_count_of_updates_made_before():
    seen = []

    def rate(step):
        seen.append(int(step))
        return jnp.float32(0.1)

    params, grads = _params_and_grads(3)
    tx = _chain(rate, {"kernel": True, "scale": True})
    state = tx.init(params)
    for grad in grads:
        _, state = tx.update(grad, state, params)
    assert seen == [0, 1, 2]


MOMENTS = [("bfloat16", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16")]


@pytest.mark.parametrize("mu_dtype, nu_dtype", MOMENTS)
def test_moments_are_kept_in_their_dtypes_and_updates_in_float32(mu_dtype, nu_dtype):
    params, (grad, *_) = _params_and_grads(2)
    tx = _chain(
        mask={"kernel": True, "scale": False}, mu_dtype=mu_dtype, nu_dtype=nu_dtype
    )
    state = tx.init(params)
    updates, after = jax.jit(tx.update)(grad, state, params)
    for adam in (state[0], after[0]):
        assert {leaf.dtype for leaf in jax.tree.leaves(adam.mu)} == {
            jnp.dtype(mu_dtype)
        }
        assert {leaf.dtype for leaf in jax.tree.leaves(adam.nu)} == {
            jnp.dtype(nu_dtype)
        }
        assert adam.count.dtype == jnp.int32
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype("float32")}
    for name, g in grad.items():
        np.testing.assert_array_equal(
            after[0].mu[name], np.float32(0.2 * g).astype(mu_dtype), err_msg=name
        )


@pytest.mark.parametrize("mu_dtype, nu_dtype", MOMENTS)
def test_rounded_moments_do_not_change_the_first_update(mu_dtype, nu_dtype):
    params, (grad,) = _params_and_grads(1)
    mask = {"kernel": True, "scale": False}

    def first(**dtypes):
        tx = _chain(mask=mask, **dtypes)
        return jax.jit(tx.update)(grad, tx.init(params), params)[0]

    exact, found = first(), first(mu_dtype=mu_dtype, nu_dtype=nu_dtype)
    for name, update in exact.items():
        np.testing.assert_allclose(found[name], update, rtol=1e-6)


@pytest.mark.parametrize("mu_dtype, nu_dtype", MOMENTS)
def test_rounded_moments_stay_within_their_rounding(mu_dtype, nu_dtype):
    params, grads = _params_and_grads(6)
    mask = {"kernel": True, "scale": False}

    def last(**dtypes):
        tx = _chain(mask=mask, **dtypes)
        state, update = tx.init(params), jax.jit(tx.update)
        for grad in grads:
            updates, state = update(grad, state, params)
        return updates

    exact, found = last(), last(mu_dtype=mu_dtype, nu_dtype=nu_dtype)
    worst = max(np.abs(found[name] - exact[name]).max() for name in exact)
    largest = max(np.abs(update).max() for update in exact.values())
    # bfloat16 has eight bits; five roundings of a moment that decays.
    assert 2**-13 < worst / largest < 2**-6


MASK = {"kernel": True, "scale": True}


def _updates(tx, params, grads):
    """Return each step's updates, the params left as they are, and the last state."""
    state, found, update = tx.init(params), [], jax.jit(tx.update)
    for grad in grads:
        updates, state = update(grad, state, params)
        found.append(updates)
    return found, state


def test_without_multipliers_and_gate_the_state_is_that_of_the_chain_alone():
    params, _ = _params_and_grads(1)
    alone = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(),
        optax.add_decayed_weights(0.1, mask=MASK),
        optax.scale_by_learning_rate(lambda step: 0.1),
    )
    expected = jax.tree.structure(alone.init(params))
    found = _chain(mask=MASK, clip_norm=1.0, multipliers=None, gate=None).init(params)
    assert jax.tree.structure(found) == expected


def test_multipliers_scale_updates_with_their_decay():
    params, grads = _params_and_grads(3)
    by = {"kernel": np.float32([[0.5], [0], [2]]), "scale": 0.25}
    plain, _ = _updates(_chain(mask=MASK), params, grads)
    found, _ = _updates(_chain(mask=MASK, multipliers=by), params, grads)
    for ours, theirs in zip(found, plain, strict=True):
        for name, rate in by.items():
            np.testing.assert_allclose(ours[name], rate * theirs[name], rtol=1e-6)


def _gate(step):
    """Return a gate: the rows of `kernel` open at 0, 2 and 4, `scale` at 2."""
    opens = jnp.array([[0], [2], [4]])
    return {"kernel": jnp.float32(step >= opens), "scale": jnp.float32(step >= 2)}


@pytest.mark.parametrize("beta2", [0.95, 0.999])
def test_what_a_gate_opens_trains_as_if_it_began_then(beta2):
    params, grads = _params_and_grads(7)
    how = {"mask": MASK, "clip_norm": 0.0, "beta2": beta2, "epsilon": 1e-12}
    found, _ = _updates(_chain(**how, gate=_gate), params, grads)
    for name, row, opens in (
        ("kernel", 0, 0),
        ("kernel", 1, 2),
        ("kernel", 2, 4),
        ("scale", slice(None), 2),
    ):
        late, _ = _updates(_chain(**how), params, grads[opens:])
        for updates in found[:opens]:
            assert not np.any(updates[name][row])
        for ours, theirs in zip(found[opens:], late, strict=True):
            np.testing.assert_allclose(ours[name][row], theirs[name][row], rtol=2e-5)


def test_closed_gradients_do_not_count_towards_the_norm():
    params, (grad,) = _params_and_grads(1)
    norm = np.sqrt(np.sum(grad["kernel"][0] ** 2))
    tx = _chain(mask=MASK, clip_norm=float(norm) / 2, gate=_gate)
    _, state = tx.update(grad, tx.init(params), params)
    adam = next(part for part in state if isinstance(part, optax.ScaleByAdamState))
    expected = (1 - ADAMW["beta1"]) * grad["kernel"][0] / 2
    np.testing.assert_allclose(adam.mu["kernel"][0], expected, rtol=1e-6)
    assert not np.any(adam.mu["kernel"][1:])
    assert not np.any(adam.mu["scale"])
