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
from fm_jax.models import counts
from fm_jax.runs import Run
from fm_jax.train import compose


def step(config: configs.Config, *, num_steps: int, say) -> dict[str, float]:
    """Return the rates of `num_steps` training steps, after three to warm up.

    Model FLOPs halve causal attention; the ceiling is measured before and after, and
    the better is taken, so that a busy machine does not flatter the ratio.
    """
    data = compose.open_data(config, say)
    config = compose.resolve(config, data.tokenizer)
    compose.use_compile_cache(config.train.compile_cache)
    parts = compose.build(config, corpus_tokens=len(data.train.store) - 1)
    watch = metrics.CompileWatch()
    peak, source = metrics.peak_flops(config.model.dtype)
    with parts.on_mesh():
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
            if index >= 3:
                seconds.append(time.perf_counter() - began)
                waits.append(fetched - began)
    peak = max(peak, metrics.peak_flops(config.model.dtype)[0])
    tokens = config.train.batch_size * config.data.max_length
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
        "compile_seconds": watch.seconds,
        "cache_hits": watch.hits,
        "cache_misses": watch.misses,
        "peak_host_megabytes": machine.peak_memory_bytes() / 1e6,
    }


def startup(config_path: Path) -> dict[str, dict[str, float]]:
    """Return seconds to the first step of a new process, cold and warm, by part.

    Two processes run one step of the run in `config_path` (a config.json): the first
    with an empty compile cache, the second with the first one's.
    """
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        env = dict(
            os.environ,
            JAX_COMPILATION_CACHE_DIR=f"{folder}/cache",
            JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
        )
        for kind in ("cold", "warm"):
            workdir = Path(folder, kind)
            subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "fm_jax.cli",
                    "train",
                    f"--config={config_path}",
                    f"--workdir={workdir}",
                    "--config.eval.max_batches=1",
                    "--config.sample.num_tokens=0",
                ],
                env=env,
                check=True,
                capture_output=True,
            )
            found[kind] = {
                key.removeprefix("startup/").removesuffix("_seconds"): value
                for row in Run(workdir).rows()
                for key, value in row.items()
                if key.startswith("startup/")
            }
    return found


def one_step_config(config: configs.Config, folder: Path) -> Path:
    """Write a config.json of `config` that stops after one step; return its path."""
    raw = {name: dict(section) for name, section in config.raw.items()}
    raw["train"] |= {"steps": 1, "tokens": 0.0, "epochs": 0.0, "tokens_per_param": 0.0}
    path = folder / "config.json"
    path.write_text(json.dumps({"config": raw}))
    return path
