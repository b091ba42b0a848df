"""The loop: dispatch a step, then read the numbers of the step before.

The device never waits for the host to look at a number, and the host is never more than
one step ahead. On a CPU, which is host and device, large steps go one at a time.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Container, Iterator
from typing import Any

import jax
import numpy as np

from fm_jax import trees
from fm_jax.errors import DivergedError, UserError
from fm_jax.metrics import Clock

LARGE = 2**26  # bytes of temporaries that are worth not holding twice
PAUSE = 5e-4  # seconds, in which XLA frees them


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hooks:
    """What happens between steps, on the host.

    `on_metrics(step, metrics)` gets host numbers of each finished step, late by one
    where steps overlap;
    `on_step(step, state)` runs after `step` updates, when `is_due(step)` says so, and
    only once the numbers up to that step were read. `is_due` is asked before a step's
    numbers are read and again after; what makes it true in between must do so at the
    same step in all processes.

    `on_skip(step, name, numbers)` hears of each step that changed nothing, as its loss
    or gradient was not finite, and which number was the first. `max_skips` of them may
    follow each other.
    """

    on_metrics: Callable[[int, dict[str, float]], None]
    is_due: Callable[[int], bool]
    on_step: Callable[[int, Any], None]
    on_skip: Callable[[int, str, dict[str, float]], None] = lambda *_: None
    max_skips: int = 0


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
    overlap: bool = True,
    left_out: Container[int] = (),
    leave_out: Callable[[Any], Any] = lambda state: state,
) -> Any:
    """Return the state after steps `start` to `stop`.

    overlap: begin a step before the numbers of the one before are read; see `overlaps`.
    left_out: steps whose batches are read and passed over: `leave_out` takes them.
    Raises DivergedError when more steps in a row than may be were not finite, or a
    number of another step is not.
    """
    reader = _Reader(hooks)
    pending: tuple[int, dict] | None = None
    is_host = jax.default_backend() == "cpu"
    for step in range(start + 1, stop + 1):
        with clock.phase("wait_for_data"):
            batch = put(next(batches))
        with clock.phase("train"):
            if step in left_out:
                state, metrics = leave_out(state), {}
            else:
                state, metrics = step_fn(state, batch)
            if not is_host:
                for value in metrics.values():
                    value.copy_to_host_async()
            reader.read(pending)
            pending = (step, metrics) if metrics else None
            if not overlap or hooks.is_due(step) or step == stop:
                pending = reader.read(pending)
            if not overlap:
                time.sleep(PAUSE)
        if hooks.is_due(step):
            pending = reader.read(pending)
            hooks.on_step(step, state)
    return state


def overlaps(compiled: jax.stages.Compiled) -> bool:
    """Return whether steps may overlap: not where a CPU would hold large temporaries.

    It gives each program in flight temporaries of its own, and frees them a moment
    after it says that the program is done: one begun before then is given new ones, and
    the process keeps all of them. There is no way to the device to hide, either.
    """
    if jax.default_backend() != "cpu":
        return True
    memory = compiled.memory_analysis()
    return memory is None or memory.temp_size_in_bytes < LARGE


def guarded(compiled: Callable, *names: str, expected: tuple) -> Callable:
    """Return `compiled`, which tells which of its arguments is not what it was.

    names: of its arguments; expected: their abstract trees. It raises UserError with
    the path, what stands there and what should, of the leaves whose shape, dtype or
    sharding is another; what else went wrong is raised as it is.
    """

    def call(*given):
        try:
            return compiled(*given)
        except (TypeError, ValueError) as error:
            told = changed(dict(zip(names, expected, strict=True)),
                           dict(zip(names, given, strict=True)))  # fmt: skip
            if not told:
                raise
            name, wanted, found = told[0]
            more = f" and {len(told) - 1} more like it" if len(told) > 1 else ""
            raise UserError(
                f"{name} must stay {wanted}, for which the step was compiled; got "
                f"{found}{more}. All steps take arguments of one shape, dtype and "
                "sharding."
            ) from error

    return call


def changed(expected: Any, given: Any) -> list[tuple[str, str, str]]:
    """Return the path of each leaf that differs, what it should be and what it is."""
    wanted, found = trees.leaves_by_path(expected), trees.leaves_by_path(given)
    told = []
    for name in {**wanted, **found}:
        if name not in found:
            told.append((name, _kind(wanted[name]), "nothing"))
        elif name not in wanted:
            told.append((name, "absent", _kind(found[name])))
        elif _kind(wanted[name]) != _kind(found[name]):
            told.append((name, _kind(wanted[name]), _kind(found[name])))
        elif not _is_placed(found[name], wanted[name].sharding):
            told.append((name, _cut(wanted[name].sharding), _cut(found[name].sharding)))
    return told


def _kind(leaf: Any) -> str:
    """Return a leaf's dtype and shape, as float32[2,3]."""
    leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _cut(place: jax.sharding.Sharding) -> str:
    """Return the mesh axes that cut each dim; the sharding where it has no mesh."""
    return f"cut by {tuple(place.spec) if hasattr(place, 'spec') else place}"


def _is_placed(leaf: Any, wanted: jax.sharding.Sharding | None) -> bool:
    """Return whether a leaf is where it should be; one of the host goes anywhere."""
    if wanted is None or not isinstance(leaf, jax.Array):
        return True
    return leaf.sharding.is_equivalent_to(wanted, leaf.ndim)


class _Reader:
    """Reads the numbers of steps, and counts those that changed nothing."""

    def __init__(self, hooks: Hooks):
        self._hooks, self._num_skipped = hooks, 0

    def read(self, pending: tuple[int, dict] | None) -> None:
        """Hand a step's numbers on; None: there is no step to read."""
        if pending is None:
            return
        step, metrics = pending
        # A third of what `jax.device_get` takes, and the copies are under way already.
        numbers = {name: float(np.asarray(value)) for name, value in metrics.items()}
        bad = [n for n in ("train/loss", *numbers) if not math.isfinite(numbers[n])]
        if not bad:
            self._num_skipped = 0
            self._hooks.on_metrics(step, numbers)
            return
        self._num_skipped += 1
        is_skipped = not {"train/loss", "grads/norm"}.isdisjoint(bad)
        if not is_skipped or self._num_skipped > self._hooks.max_skips:
            raise DivergedError(bad[0], numbers[bad[0]], step)
        self._hooks.on_skip(step, bad[0], numbers)


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
