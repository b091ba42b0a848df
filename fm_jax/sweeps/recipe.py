"""From a prediction to a run that can be trained: its config and what to expect of it.

Sizes, batch, learning rate and warm-up come from the rules of the sweep that the fit's
runs are from, or else from configs/sweeps/base.py and DeepSeek's laws of batch and rate
(arXiv 2401.02954). What a decoder can be is discrete, so the loss is predicted for the
sizes that are achieved.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from fm_jax import config as configs
from fm_jax import configfile
from fm_jax.errors import UserError
from fm_jax.models import counts
from fm_jax.scaling import optimum, predict
from fm_jax.sweeps import ladder
from fm_jax.sweeps import sweep as sweeps
from fm_jax.tables import schema

SWEEP = configfile.BASE.parent / "sweeps" / "base.py"
COUNT = "total"  # of a table that does not say what its params are
FAR = 0.05  # of a size or a compute that is missed, in ln, before it is said
MANY_STEPS = 1_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A run that can be trained: its overrides of configs/base.py and its numbers.

    `params` are by `count`, `flops` = 6 * params * tokens of that count and
    `flops_exact` count every product; `loss` is {"value", "interval", "of_a_run"}
    as in a prediction, at these params and tokens.
    """

    overrides: dict[str, Any]
    count: str
    params: int
    params_total: int
    tokens: int
    steps: int
    flops: float
    flops_exact: float
    loss: dict[str, Any]
    warnings: tuple[str, ...]


def recipe(found: Mapping, *, fit: Mapping, draws: Mapping, law) -> Recipe:
    """Return the run nearest to a prediction of predict.predict.

    Where a compute was asked for it is kept, and tokens give way to the size that can
    be had; otherwise the tokens are kept. fit, draws and law: what files.load returns.
    Raises UserError where the sweep's rules make no run that a config accepts, or one
    that is too short to be any.
    """
    sweep = sweeps.check(fit.get("sweep") or _default())
    size, base = vars(sweep.size), sweep.base
    is_known = found["count"] in schema.COUNTS
    count = found["count"] if is_known else COUNT
    target = found["params"]["value"]
    dial = ladder.nearest(target, count, size, base["model"])
    model = ladder.model_of(dial, size, base["model"])
    decoder = ladder.config_of(model, base["model"])
    sizes = vars(counts.params(decoder))
    tokens = found["tokens"]["value"]
    if "flops" in found["asked"]:
        tokens = found["asked"]["flops"] / 6 / sizes[count]
    training = ladder.training_of(
        sizes[size["count"]],
        tokens,
        tokens * sweep.sizes.flops_per_token(dial),
        model,
        vars(sweep.budget),
        base,
    )
    if sweep.design.kind == "branches":
        decay = sweep.design.decay_fraction
        training |= {"schedule.name": "wsd", "schedule.decay_fraction": decay}
    warmup = training["schedule.warmup_fraction"]
    training["schedule.warmup_fraction"] = _rounded(warmup, training["train.steps"])
    changed = {f"model.{name}": value for name, value in model.items()} | training
    raw = {name: dict(section) for name, section in base.items()}
    for key, value in changed.items():
        section, name = key.split(".")
        raw[section][name] = value
    configs.check(raw)
    length = base["data"]["max_length"]
    achieved = training["train.steps"] * training["train.batch_size"] * length
    _check(training["train.steps"], achieved, sizes[count], vars(sweep.budget))
    asked = {"params": float(sizes[count]), "tokens": float(achieved)}
    _, record, ensemble = predict.choose(
        fit, draws, law, found["count"] if is_known else ""
    )
    losses = optimum.loss(law, ensemble, **asked, columns=found["columns"])
    if raw["model"]["max_length"] == length:
        raw["model"]["max_length"] = 0  # as configs/base.py says it
    differences = configfile.difference(configfile.load_base(), raw)
    made = Recipe(
        overrides={key: new for key, (_, new) in differences.items()},
        count=count,
        params=sizes[count],
        params_total=sizes["total"],
        tokens=achieved,
        steps=training["train.steps"],
        flops=6.0 * sizes[count] * achieved,
        flops_exact=counts.flops_per_token(decoder, length) * achieved,
        loss=predict.quantity(losses) | {"of_a_run": predict.of_a_run(losses, record)},
        warnings=(),
    )
    remarks = _remarks(found, made, has_sweep="sweep" in fit, is_known=is_known)
    return dataclasses.replace(made, warnings=tuple(remarks))


def _check(steps: int, tokens: int, params: int, budget: Mapping) -> None:
    """Raise UserError for a run too short to be any."""
    if tokens < params:
        raise UserError(
            "a run must have at least one token a parameter; got "
            f"{tokens / params:.2g}, {tokens:,} for {params:,} parameters. Ask for "
            "more compute or tokens."
        )
    if steps < budget["min_steps"]:
        raise UserError(
            f"a run must have at least {budget['min_steps']} steps; got {steps}, of "
            f"{tokens // steps:,} tokens each. Ask for more compute or tokens."
        )


def _default() -> dict:
    """Return the sweep whose rules a fit without one follows.

    Its batch and learning rate are absolute laws of the compute: a fixed batch would
    give a large model millions of steps.
    """
    raw = configfile.load(str(SWEEP)).to_dict()
    raw["budget"] |= {"batch": "deepseek", "learning_rate": "deepseek"}
    raw["budget"] |= {"micro_rows": raw["base"]["train"]["batch_size"]}
    return raw


def _remarks(found, made: Recipe, *, has_sweep: bool, is_known: bool) -> list[str]:
    """Return what the run is not that was asked for, and what was taken for granted."""
    said = []
    for thing, got, asked in (
        ("params", made.params, found["params"]["value"]),
        ("tokens", made.tokens, found["tokens"]["value"]),
        ("FLOPs", made.flops, found["flops"]["value"]),
    ):
        if abs(math.log(got / asked)) > FAR:
            said.append(f"{got:.3g} {thing} are as near as it gets to {asked:.3g}")
    if made.steps > MANY_STEPS:
        said.append(
            f"{made.steps:,} steps are many: the batch is the rule's, small for this "
            "size. train.batch_size and the learning rate want raising together"
        )
    if not is_known:
        said.append(
            f"the table does not say what its params count: taken as {COUNT}. "
            "--count=non_embedding or matmul says otherwise"
        )
    if not has_sweep:
        said.append(
            "the fit is of no sweep: data, shape, batch and learning rate are the "
            "defaults, and the loss holds for runs like those fitted"
        )
    return said


def _rounded(fraction: float, steps: int) -> float:
    """Return the shortest fraction that is the same number of whole steps."""
    tried = (float(f"{fraction:.{digits}g}") for digits in range(1, 17))
    wanted = round(fraction * steps)
    return next((v for v in tried if round(v * steps) == wanted), fraction)
