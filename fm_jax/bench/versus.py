"""fm bench step --vs: a config's step and PyTorch's of the same sizes, in turn."""

import statistics
from collections.abc import Callable
from typing import Any

from fm_jax import config as configs
from fm_jax.bench import race, ratios
from fm_jax.errors import UserError
from fm_jax.models import counts

OURS = "fm_jax"
OTHERS = ("pytorch", "pytorch_compiled")
# What the PyTorch step has, and can have no other.
SHAPE = {
    "norm": "layernorm",
    "norm_position": "pre",
    "positions": "learned",
    "activation": "gelu",
    "tied_embeddings": True,
    "use_bias": False,
    "num_experts": 0,
    "window": 0,
    "qk_norm": False,
    "parallel_block": False,
}


def versus(
    config: configs.Config,
    *,
    num_steps: int,
    rounds: int,
    others: tuple[str, ...] = OTHERS,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Return tokens/s of ours and of each other's training step, and paired ratios.

    All are fed new random ids and read their loss at each step; in each of `rounds`
    every one has a turn of `num_steps` steps in its own process. Ratios above 1 are
    ours faster, the median and the quartiles. `busy` is the part of the machine that
    other processes took meanwhile; bytes are the most host memory that each held.

    Raises UserError for a model of another shape than the PyTorch one has.
    """
    check(config)
    spec = _spec(config, num_steps)
    workers: list[race.Worker] = []
    try:
        for side in (OURS, *others):
            say(f"compiling {side}")
            workers.append(race.Worker(spec | {"side": side}))
        samples = {worker.name: [] for worker in workers}
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            turns = race.run(workers, 1)
            for worker, taken in zip(workers, turns, strict=True):
                samples[worker.name] += taken
        ends = {worker.name: worker.end() for worker in workers}
    finally:
        for worker in workers:
            worker.close()
    tokens = num_steps * config.train.batch_size * config.data.max_length
    flops = tokens * counts.flops_per_token(config.model, config.data.max_length)
    found: dict[str, Any] = {"rounds": rounds, "steps_per_round": num_steps}
    for worker in workers:
        name, taken = worker.name, samples[worker.name]
        median = statistics.median(sample.seconds for sample in taken)
        faults = statistics.median(sample.faults for sample in taken)
        found |= {
            f"{name}_library": worker.ready.get("library", ""),
            f"{name}_tokens_per_second": tokens / median,
            f"{name}_gflops_per_second": flops / median / 1e9,
            f"{name}_faults_per_step": faults / num_steps,
            f"{name}_peak_host_bytes": ends[name]["peak_host_bytes"],
        }
    ours = [sample.seconds for sample in samples[OURS]]
    for name in others:
        theirs = [sample.seconds for sample in samples[name]]
        found |= _named(f"ratio_to_{name}", ratios.paired(theirs, ours))
    busy = [sample.busy for taken in samples.values() for sample in taken]
    return found | {"busy": statistics.median(busy), "busy_most": max(busy)}


def check(config: configs.Config) -> None:
    """Raise UserError for a model that the PyTorch step is not of."""
    for name, wanted in SHAPE.items():
        found = getattr(config.model, name)
        if found != wanted:
            raise UserError(
                f"--vs=nanogpt_like must have model.{name}={wanted!r}, as GPT-2's "
                f"shape; got {found!r}. configs/bench.py is of that shape."
            )
    if config.model.num_heads * config.model.head_dim != config.model.embed_dim:
        raise UserError(
            "--vs=nanogpt_like must have heads that together are as wide as "
            f"model.embed_dim={config.model.embed_dim}; got "
            f"{config.model.num_heads} of {config.model.head_dim}. configs/bench.py is "
            "of that shape."
        )
    if config.model.num_kv_heads != config.model.num_heads:
        raise UserError(
            "--vs=nanogpt_like must have as many model.num_kv_heads as heads; got "
            f"{config.model.num_kv_heads} of {config.model.num_heads}. "
            "configs/bench.py is of that shape."
        )


def _spec(config: configs.Config, num_steps: int) -> dict[str, Any]:
    """Return what the processes are told: ours its config, the others the sizes."""
    model, optimizer = config.model, config.optimizer
    return {
        "config": config.raw,
        "steps": num_steps,
        "dtype": model.dtype,
        "batch_size": config.train.batch_size,
        "sizes": {
            "layers": model.num_layers,
            "width": model.embed_dim,
            "heads": model.num_heads,
            "hidden": model.mlp_dim,
            "vocab": model.vocab_size,
            "length": config.data.max_length,
        },
        "learning_rate": optimizer.learning_rate,
        "weight_decay": optimizer.weight_decay,
        "beta1": optimizer.beta1,
        "beta2": optimizer.beta2,
        "clip_norm": optimizer.clip_norm,
    }


def _named(name: str, paired: dict[str, float]) -> dict[str, float]:
    return {
        name: paired["median"],
        f"{name}_low": paired["low"],
        f"{name}_high": paired["high"],
    }
