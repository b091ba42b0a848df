"""Numbers about a run: where its time went, and how close it is to the machine."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator

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

    @jax.jit
    def product(x):
        return jnp.matmul(x, x, preferred_element_type=jnp.float32)

    return 2 * size**3 / _best_seconds(product, jnp.ones((size, size), dtype), seconds)


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
        self._stack: list[str] = []
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of the block under `name`."""
        self.settle()
        self._stack.append(name)
        try:
            yield
        finally:
            self.settle()
            self._stack.pop()

    def settle(self) -> None:
        """Count the time up to now."""
        now = time.perf_counter()
        name = self._stack[-1] if self._stack else "other"
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now


class CompileWatch:
    """Counts what jax compiled and what its persistent cache spared, from creation."""

    def __init__(self):
        self.hits = self.misses = 0
        self.seconds = self.saved = 0.0
        jax.monitoring.register_event_listener(self._on_event)
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)

    def _on_event(self, event: str, **_) -> None:
        self.hits += event == "/jax/compilation_cache/cache_hits"
        self.misses += event == "/jax/compilation_cache/cache_misses"

    def _on_duration(self, event: str, seconds: float, **_) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.seconds += seconds
        elif event == "/jax/compilation_cache/compile_time_saved_sec":
            self.saved += max(seconds, 0.0)

    def line(self) -> str:
        """Return one line for the log."""
        return (
            f"compiled in {self.seconds:.1f} s; persistent cache: {self.hits} hits "
            f"({self.saved:.1f} s saved), {self.misses} misses"
        )
