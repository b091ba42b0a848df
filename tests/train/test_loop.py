"""Tests of the loop: what is read when, and what stops it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.errors import DivergedError, UserError
from fm_jax.metrics import Clock
from fm_jax.train import loop


class Number:
    """A device's number: noted when the host reads it."""

    def __init__(self, name, value, events):
        self.name, self.value, self.events = name, value, events

    def __array__(self, dtype=None, copy=None):
        import numpy as np

        self.events.append(f"read {self.name}")
        return np.asarray(self.value, dtype)


def _run(stop, *, start=0, due=(), loss=lambda step: 1.0, **how):
    events = []

    def step_fn(state, batch):
        step = state + 1
        events.append(f"dispatch {step}")
        metrics = {"train/loss": Number(step, loss(step), events), "grads/norm": 1.0}
        return step, metrics

    hooks = loop.Hooks(
        on_metrics=lambda step, numbers: events.append(f"metrics {step}"),
        is_due=lambda step: step in due,
        on_step=lambda step, state: events.append(f"hook {step}"),
    )
    state, error = None, None
    try:
        state = loop.run(
            start, step_fn, iter(range(100)), lambda batch: batch,
            start=start, stop=stop, hooks=hooks, clock=Clock(), **how,
        )  # fmt: skip
    except DivergedError as caught:
        error = str(caught)
    return state, events, error


def test_steps_that_do_not_overlap_are_read_before_the_next_is_dispatched():
    state, events, _ = _run(2, overlap=False)
    assert state == 2
    assert events == [
        "dispatch 1", "read 1", "metrics 1", "dispatch 2", "read 2", "metrics 2",
    ]  # fmt: skip


@pytest.mark.parametrize(("size", "expected"), [(2**11, True), (2**12, False)])
def test_on_a_cpu_steps_of_large_temporaries_do_not_overlap(size, expected):
    shape = jax.ShapeDtypeStruct((size, size), jnp.float32)
    program = jax.jit(lambda x: x @ x @ x).lower(shape).compile()
    assert loop.overlaps(program) is expected


def test_the_numbers_of_a_step_are_read_after_the_next_is_dispatched():
    state, events, _ = _run(3)
    assert state == 3
    assert events == [
        "dispatch 1",
        "dispatch 2", "read 1", "metrics 1",
        "dispatch 3", "read 2", "metrics 2", "read 3", "metrics 3",
    ]  # fmt: skip


def test_a_hook_sees_a_step_whose_numbers_were_read():
    _, events, _ = _run(4, start=1, due=(2,))
    assert events == [
        "dispatch 2", "read 2", "metrics 2", "hook 2",
        "dispatch 3",
        "dispatch 4", "read 3", "metrics 3", "read 4", "metrics 4",
    ]  # fmt: skip


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_hook(bad):
    _, events, error = _run(9, due=(3,), loss=lambda step: bad if step == 3 else 1.0)
    assert f"train/loss must stay finite; got {bad} at step 3." in error
    assert "hook 3" not in events
    assert "metrics 3" not in events


def test_nothing_is_left_to_do_at_the_end():
    state, events, _ = _run(5, start=5)
    assert (state, events) == (5, [])


def test_the_rate_is_of_the_last_steps_without_their_pauses(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])
    rate = loop.Rate(window=2)
    assert rate.steps_per_second() == 0.0
    for step, moment in ((1, 0.0), (2, 10.0), (3, 11.0), (4, 12.0)):
        now[0] = moment
        rate.add(step)
    assert rate.steps_per_second() == 1.0
    with rate.paused():
        now[0] += 100
    now[0] += 3
    rate.add(5)
    assert rate.steps_per_second() == 0.5


# ---- one program, one shape


@pytest.fixture(scope="module")
def doubled():
    """Return a step compiled for a state and a batch over two devices, guarded."""
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    cut = jax.NamedSharding(mesh, jax.P("data"))
    whole = jax.NamedSharding(mesh, jax.P())
    state = {"blocks": {"kernel": jax.ShapeDtypeStruct((3, 5), "float32")}}
    state["step"] = jax.ShapeDtypeStruct((), "int32")
    state = jax.tree.map(lambda x: x.update(sharding=whole), state)
    batch = {"tokens": jax.ShapeDtypeStruct((4, 7), "int32", sharding=cut)}
    step = jax.jit(lambda state, batch: (state, batch["tokens"].sum()))
    compiled = step.lower(state, batch).compile()
    return loop.guarded(compiled, "state", "batch", expected=(state, batch)), cut


def _arguments(cut, tokens=None, kernel=None):
    tokens = np.ones((4, 7), "int32") if tokens is None else tokens
    kernel = np.ones((3, 5), "float32") if kernel is None else kernel
    whole = jax.NamedSharding(cut.mesh, jax.P())
    state = {"blocks": {"kernel": kernel}, "step": np.int32(2)}
    return jax.device_put(state, whole), {"tokens": jax.device_put(tokens, cut)}


def test_what_is_as_it_was_compiled_runs(doubled):
    step, cut = doubled
    state, total = step(*_arguments(cut))
    assert (int(state["step"]), int(total)) == (2, 28)


@pytest.mark.parametrize(
    "change, said",
    [
        (
            {"tokens": np.ones((4, 6), "int32")},
            "batch/tokens must stay int32[4,7], for which the step was compiled; got "
            "int32[4,6].",
        ),
        (
            {"tokens": np.ones((4, 7), "float32")},
            "batch/tokens must stay int32[4,7], for which the step was compiled; got "
            "float32[4,7].",
        ),
        (
            {"kernel": jnp.ones((3, 5), "bfloat16")},
            "state/blocks/kernel must stay float32[3,5], for which the step was "
            "compiled; got bfloat16[3,5].",
        ),
        (
            {"kernel": np.ones((3, 4), "float32"), "tokens": np.ones((2, 7), "int32")},
            "batch/tokens must stay int32[4,7], for which the step was compiled; got "
            "int32[2,7] and 1 more like it.",
        ),
    ],
)
def test_an_argument_that_is_another_is_named(doubled, change, said):
    step, cut = doubled
    with pytest.raises(UserError) as error:
        step(*_arguments(cut, **change))
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)


def test_an_argument_that_is_placed_elsewhere_is_named(doubled):
    step, cut = doubled
    state, batch = _arguments(cut)
    batch = jax.device_put(batch, jax.NamedSharding(cut.mesh, jax.P()))
    with pytest.raises(UserError) as error:
        step(state, batch)
    assert str(error.value).startswith(
        "batch/tokens must stay cut by ('data',), for which the step was compiled; got "
        "cut by ()."
    )


def test_an_argument_that_is_missing_or_new_is_named(doubled):
    step, cut = doubled
    state, batch = _arguments(cut)
    with pytest.raises(UserError, match=r"^state/step must stay int32\[\], .* nothing"):
        step({"blocks": state["blocks"]}, batch)
    with pytest.raises(UserError, match=r"^batch/more must stay absent, .* got int32"):
        step(state, batch | {"more": np.int32(3)})


def test_what_is_not_about_arguments_is_raised_as_it_is():
    def broken(x):
        raise ValueError("another matter")

    expected = (jax.ShapeDtypeStruct((2,), "float32"),)
    step = loop.guarded(broken, "x", expected=expected)
    with pytest.raises(ValueError, match="another matter"):
        step(np.ones(2, "float32"))
