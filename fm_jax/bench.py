"""fm bench: how fast a config trains here, beside the ceiling of the same process."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax

from fm_jax import config as configs
from fm_jax import machine, metrics
from fm_jax.errors import UserError
from fm_jax.models import counts
from fm_jax.prepare import opened
from fm_jax.train import compose


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
        row_tokens=compose.row_tokens(data),
        train_names=data.train.names,
        eval_names=data.eval.names,
    )
    with parts.layout.active():
        state = parts.init(jax.random.key(config.train.seed))
        step_fn = parts.train_step.lower(
            parts.abstract, parts.abstract_batch(config.train.batch_size)
        ).compile()
        batches = compose.train_batches(parts, data, 0)
        seconds, waits = [], []
        for index in range(num_steps + 3):
            began = time.perf_counter()
            batch = parts.put(next(batches))
            fetched = time.perf_counter()
            state, numbers = step_fn(state, batch)
            jax.block_until_ready(numbers)
            if index == 0:
                first_step = machine.seconds_since_start()
                peak, source = metrics.peak_flops(config.model.dtype)
            if index >= 3:
                seconds.append(time.perf_counter() - began)
                waits.append(fetched - began)
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
        "data_wait_fraction": sum(waits) / sum(seconds),
        "first_step_after_seconds": first_step,
        "compile_seconds": watch.seconds,
        "cache_hits": watch.hits,
        "cache_misses": watch.misses,
        "peak_host_megabytes": machine.peak_memory_bytes() / 1e6,
    }


def startup(config: configs.Config) -> dict[str, float]:
    """Return seconds from a new process to its first step, compile cache cold and warm.

    Two processes take a step each: the first with an empty cache, the second with the
    first one's. Raises UserError with what a process said that failed.
    """
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.json")
        path.write_text(json.dumps({"config": config.raw}))
        env = dict(
            os.environ,
            JAX_COMPILATION_CACHE_DIR=f"{folder}/cache",
            JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
        )
        command = [sys.executable, "-m", "fm_jax.cli", "bench", f"--config={path}"]
        command += ["--steps=1", "--json", "--nostartup"]
        for kind in ("cold", "warm"):
            done = subprocess.run(
                command, env=env, check=False, capture_output=True, text=True
            )
            if done.returncode:
                said = (done.stderr.strip() or "nothing").splitlines()[-1]
                raise UserError(f"a process to time must end well; got {said}")
            numbers = json.loads(done.stdout)
            for name in ("first_step_after_seconds", "compile_seconds"):
                found[f"{kind}_{name}"] = numbers[name]
    return found
