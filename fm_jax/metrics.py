"""Numbers about a run: where its time went, and how close it is to the machine."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from fm_jax import accelerators
from fm_jax.accelerators import Chip


def peak_flops(dtype: str) -> tuple[float, str]:
    """Return the FLOP/s that all devices together can reach, and where it comes from.

    The published peak where there is one for this dtype, else a product timed here.
    """
    chip = accelerators.by_kind(jax.devices()[0].device_kind)
    if chip is not None and dtype in chip.flops:
        return chip.flops[dtype] * jax.device_count(), f"published for {chip.kind}"
    measured = measure_matmul(dtype)
    # Simulated devices of one CPU share its cores.
    count = 1 if jax.default_backend() == "cpu" else jax.device_count()
    return measured * count, "measured matmul"


def this_chip(peak: float, dtype: str) -> Chip:
    """Return what one device here can do, whose share of `peak` FLOP/s in `dtype` is.

    Of one that no maker publishes, memory and links are taken to cost nothing.
    """
    share = {dtype: peak / jax.device_count()}
    kind = jax.devices()[0].device_kind
    chip = accelerators.by_kind(kind)
    if chip is not None:
        return dataclasses.replace(chip, flops=share | chip.flops)
    return Chip(
        name=kind,
        kind=kind,
        flops={"bfloat16": share[dtype]} | share,
        hbm_bytes=0,
        usable_hbm_bytes=0,
        hbm_bytes_per_second=math.inf,
        link_bytes_per_second=math.inf,
        dcn_bytes_per_second=math.inf,
        chips_per_host=jax.local_device_count(),
        source="measured here",
    )


def measure_matmul(dtype: str, size: int = 2048, seconds: float = 0.4) -> float:
    """Return the best FLOP/s of a square product with float32 output, on one device."""

    return 2 * size**3 / _best_seconds(_product, jnp.ones((size, size), dtype), seconds)


@jax.jit
def _product(x: jax.Array) -> jax.Array:
    return jnp.matmul(x, x, preferred_element_type=jnp.float32)


def _best_seconds(do, x: jax.Array, seconds: float) -> float:
    do(x).block_until_ready()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        do(x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return best


class Clock:
    """Wall time by phase; an inner phase's time is not counted in the outer one."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.times: dict[str, int] = {}  # that each phase was begun
        self._stack: list[str] = []
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of the block under `name`."""
        self.settle()
        self._stack.append(name)
        self.times[name] = self.times.get(name, 0) + 1
        try:
            yield
        finally:
            self.settle()
            self._stack.pop()

    @property
    def current(self) -> str:
        """The innermost phase now, `other` outside of all."""
        return self._stack[-1] if self._stack else "other"

    def settle(self) -> None:
        """Count the time up to now."""
        now, name = time.perf_counter(), self.current
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now


class CompileWatch:
    """Counts what jax compiled and what its persistent cache spared, from creation."""

    def __init__(self):
        self.hits = self.misses = 0
        self.seconds = self.saved = 0.0
        self._guarded: tuple[Clock, Callable[[str], None]] | None = None
        jax.monitoring.register_event_listener(self._on_event)
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)

    def guard(self, clock: Clock, say: Callable[[str], None]) -> None:
        """From now on say what is compiled again: a shape has changed.

        The first time of a phase of `clock` may compile what that phase needs.
        """
        self._guarded = clock, say

    def end(self) -> None:
        """Say nothing from now on: what another run compiles is no matter of this."""
        self._guarded = None

    def _on_event(self, event: str, **_) -> None:
        self.hits += event == "/jax/compilation_cache/cache_hits"
        self.misses += event == "/jax/compilation_cache/cache_misses"

    def _on_duration(self, event: str, seconds: float, fun_name: str = "", **_) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.seconds += seconds
            if self._guarded:
                self._tell(fun_name, seconds)
        elif event == "/jax/compilation_cache/compile_time_saved_sec":
            self.saved += max(seconds, 0.0)

    def _tell(self, name: str, seconds: float) -> None:
        clock, say = self._guarded
        phase = clock.current
        if clock.times.get(phase) != 1:
            say(
                f"WARNING: {name or 'a program'} was compiled in {seconds:.1f} s after "
                f"the first step, in phase {phase}: its arguments' shapes, dtypes or "
                "shardings are new"
            )

    def line(self) -> str:
        """Return one line for the log."""
        return (
            f"compiled in {self.seconds:.1f} s; persistent cache: {self.hits} hits "
            f"({self.saved:.1f} s saved), {self.misses} misses"
        )
