"""fm bench step: how fast a config trains here, beside what the machine can do."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from fm_jax import config as configs
from fm_jax import machine, metrics
from fm_jax.bench import overhead
from fm_jax.models import counts
from fm_jax.prepare import opened
from fm_jax.train import compose, feeds, loop


def step(config: configs.Config, *, num_steps: int, say) -> dict[str, float]:
    """Return the rates of `num_steps` training steps, after three to warm up.

    Model FLOPs halve causal attention; the ceiling is measured before and after, and
    the better is taken, so that a busy machine does not flatter the ratio.
    """
    data = opened.open_data(config, say)
    config = compose.resolve(config, data.tokenizer)
    compose.use_compile_cache(config.train.compile_cache)
    watch = metrics.CompileWatch()
    layout = compose.open_layout(config)
    parts = compose.build(
        config,
        layout,
        corpus_tokens=data.train.num_targets,
        row_tokens=feeds.row_tokens(data),
        train_names=data.train.names,
        eval_names=data.eval.names,
    )
    with parts.layout.active():
        state = parts.init(jax.random.key(config.train.seed))
        step_fn = parts.train_step.lower(
            parts.abstract, parts.abstract_batch(config.train.batch_size)
        ).compile()
        batches = feeds.train_batches(parts, data, 0)
        pause = 0 if loop.overlaps(step_fn) else loop.PAUSE  # as in training
        seconds, waits = [], []
        for index in range(num_steps + 3):
            began = time.perf_counter()
            batch = parts.put(next(batches))
            fetched = time.perf_counter()
            state, numbers = step_fn(state, batch)
            jax.block_until_ready(numbers)
            time.sleep(pause)
            if index == 0:
                first_step = machine.seconds_since_start()
                peak, source = metrics.peak_flops(config.model.dtype)
            if index >= 3:
                seconds.append(time.perf_counter() - began)
                waits.append(fetched - began)
        on_host = [next(batches) for _ in range(2 * overhead.WARM_UP)]
        host = overhead.host_seconds(parts, state, on_host, step_fn=step_fn)
    peak = max(peak, metrics.peak_flops(config.model.dtype)[0])
    tokens = parts.tokens_per_step
    median = statistics.median(seconds)
    flops = tokens * counts.flops_per_token(config.model, config.data.max_length)
    return {
        "tokens_per_second": tokens / median,
        "step_seconds": median,
        "step_seconds_spread": max(seconds) - min(seconds),
        "model_gflops_per_second": flops / median / 1e9,
        "ceiling_gflops_per_second": peak / 1e9,
        "ceiling_source": source,
        "mfu": flops / median / peak,
        "host_seconds_per_step": host,
        "data_wait_fraction": sum(waits) / sum(seconds),
        "first_step_after_seconds": first_step,
        "compile_seconds": watch.seconds,
        "cache_hits": watch.hits,
        "cache_misses": watch.misses,
        "peak_host_megabytes": machine.peak_memory_bytes() / 1e6,
    }


def open_side(spec: dict[str, Any]) -> tuple[Callable[[], None], dict[str, Any]]:
    """Return `spec["steps"]` steps on new random tokens, and what runs them."""
    config = configs.check(spec["config"])
    compose.use_compile_cache(config.train.compile_cache)
    layout = compose.open_layout(config)
    parts = compose.build(config, layout, corpus_tokens=2**30)
    rng = np.random.default_rng(0)
    rows, length = config.train.batch_size, config.data.max_length
    place_BT = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    ones_BT = np.ones((rows, length), np.int32)
    with parts.layout.active():
        state = parts.init(jax.random.key(config.train.seed))
        step_fn = parts.train_step.lower(
            parts.abstract, parts.abstract_batch(rows)
        ).compile()

    overlap = loop.overlaps(step_fn)

    def work():
        nonlocal state
        for _ in range(spec["steps"]):
            ids = rng.integers(0, config.model.vocab_size, (rows, length + 1))
            ids = ids.astype(np.int32)
            batch = {
                "tokens": ids[:, :-1],
                "targets": ids[:, 1:],
                "loss_weights": ones_BT.astype(np.float32),
                "positions": place_BT,
                "segment_ids": ones_BT,
                "target_bytes": ones_BT,
            }
            state, numbers = step_fn(state, parts.put(batch))
            float(numbers["train/loss"])
            if not overlap:
                time.sleep(loop.PAUSE)

    return work, {"library": f"jax {jax.__version__}"}
