"""Tests of what a step costs the host: what is counted, never how much it is."""

import types

import numpy as np

from fm_jax.bench import overhead


class Clock:
    """The host's own seconds, moved by hand."""

    def __init__(self):
        self.now = 0.0

    def work(self, seconds):
        self.now += seconds


class Number:
    """A number on a device: to wait for it costs the host nothing, to read it does."""

    def __init__(self, clock):
        self.clock = clock

    def block_until_ready(self):
        return self

    def __array__(self, dtype=None, copy=None):
        self.clock.work(4)
        return np.asarray(1.5, dtype)


def test_putting_beginning_and_reading_are_counted_after_the_warm_up(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(
        overhead, "time", types.SimpleNamespace(thread_time=lambda: clock.now)
    )

    def put(seconds):
        clock.work(seconds)

    def step(state, batch):
        clock.work(2)
        return state + 1, {"train/loss": Number(clock), "grads/norm": Number(clock)}

    def batches():
        for seconds in [100] * overhead.WARM_UP + [1, 0, 5]:
            clock.work(1000)  # reading it is the data's business
            yield seconds

    parts = types.SimpleNamespace(put=put)
    found = overhead.host_seconds(parts, 0, batches(), step_fn=step)
    assert found == 1 + 2 + 4 + 4
