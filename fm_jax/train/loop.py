"""The loop: dispatch a step, then read the numbers of the step before.

The device never waits for the host to look at a number, and the host is never more than
one step ahead.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from fm_jax.errors import DivergedError
from fm_jax.metrics import Clock


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hooks:
    """What happens between steps, on the host.

    `on_metrics(step, metrics)` gets host numbers of each finished step, one late;
    `on_step(step, state)` runs after `step` updates, when `is_due(step)` says so, and
    only once the numbers up to that step were read and are finite.
    """

    on_metrics: Callable[[int, dict[str, float]], None]
    is_due: Callable[[int], bool]
    on_step: Callable[[int, Any], None]


def run(
    state: Any,
    step_fn: Callable,
    batches: Iterator,
    put: Callable,
    *,
    start: int,
    stop: int,
    hooks: Hooks,
    clock: Clock,
) -> Any:
    """Return the state after steps `start` to `stop`.

    Raises DivergedError when a number of a step is not finite.
    """
    pending: tuple[int, dict] | None = None
    for step in range(start + 1, stop + 1):
        with clock.phase("wait_for_data"):
            batch = put(next(batches))
        with clock.phase("train"):
            state, metrics = step_fn(state, batch)
            pending = _read(pending, hooks)
            pending = (step, metrics)
            if hooks.is_due(step) or step == stop:
                pending = _read(pending, hooks)
        if hooks.is_due(step):
            hooks.on_step(step, state)
    return state


def _read(pending, hooks) -> None:
    if pending is None:
        return
    step, metrics = pending
    numbers = {name: float(value) for name, value in jax.device_get(metrics).items()}
    for name in ("train/loss", *numbers):
        if not math.isfinite(numbers[name]):
            raise DivergedError(name, numbers[name], step)
    hooks.on_metrics(step, numbers)


class Rate:
    """Steps per second over the last `window` readings, pauses taken out."""

    def __init__(self, window: int = 20):
        self.window = window
        self._times: list[tuple[int, float]] = []
        self._paused = 0.0

    def add(self, step: int) -> None:
        """Note that a step's numbers came in now."""
        self._times.append((step, time.perf_counter() - self._paused))
        del self._times[: -self.window - 1]

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Take the time of the block out: it is not a step."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - began

    def steps_per_second(self) -> float:
        """Return the rate, 0 before two readings."""
        if len(self._times) < 2:
            return 0.0
        (first, began), (last, ended) = self._times[0], self._times[-1]
        return (last - first) / (ended - began)
