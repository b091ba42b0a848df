"""Tests of the loop: what is read when, and what stops it."""

import math

import pytest

from fm_jax.errors import DivergedError
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


def _run(stop, *, start=0, due=(), loss=lambda step: 1.0):
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
            start=start, stop=stop, hooks=hooks, clock=Clock(),
        )  # fmt: skip
    except DivergedError as caught:
        error = str(caught)
    return state, events, error


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
