"""The config file that trains a predicted run: a lab page that says what to expect.

Sizes, batch, learning rate and warm-up come from the rules of the sweep that the fit's
runs are from, or else from configs/sweeps/base.py and DeepSeek's laws of batch and rate
(arXiv 2401.02954). What a decoder can be is discrete, so the loss is predicted for the
sizes that are achieved.
"""

import dataclasses
import json
import math
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fm_jax import config as configs
from fm_jax import configfile
from fm_jax.errors import UserError
from fm_jax.models import counts
from fm_jax.scaling import fit as fits
from fm_jax.scaling import predict
from fm_jax.sweeps import ladder
from fm_jax.sweeps import sweep as sweeps
from fm_jax.tables import schema

SWEEP = configfile.BASE.parent / "sweeps" / "base.py"
COUNT = "total"  # of a table that does not say what its params are
FAR = 0.05  # of a size or a compute that is missed, in ln, before it is said
MANY_STEPS = 1_000_000
UNITS = {
    "flops": "FLOPs",
    "params": "parameters",
    "tokens": "tokens",
    "tokens_per_param": "tokens a parameter",
}
_WIDTH = 88
_INDENT = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A run that can be trained: its overrides of configs/base.py and its numbers.

    `params` are by `count`, `flops` = 6 * params * tokens of that count and
    `flops_exact` count every product; `loss` is {"value", "interval"} as in a
    prediction, at these params and tokens.
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
    be had; otherwise the tokens are kept. fit, draws and law: what fit.load returns.
    Raises UserError where the sweep's rules make no run that a config accepts.
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
    _, record, drawn = predict.choose(fit, draws, found["count"] if is_known else "")
    losses = predict.loss(
        law,
        np.vstack([fits.theta(record, law), drawn]),
        params=sizes[count],
        tokens=achieved,
        columns=found["columns"],
    )
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
        loss=predict.quantity(losses),
        warnings=(),
    )
    remarks = _remarks(found, made, has_sweep="sweep" in fit, is_known=is_known)
    return dataclasses.replace(made, warnings=tuple(remarks))


def _default() -> dict:
    """Return the sweep whose rules a fit without one follows.

    Its batch and learning rate are absolute laws of the compute: a fixed batch would
    give a large model millions of steps.
    """
    raw = configfile.load(str(SWEEP)).to_dict()
    raw["budget"] |= {"batch": "deepseek", "learning_rate": "deepseek"}
    raw["budget"] |= {"micro_rows": raw["base"]["train"]["batch_size"]}
    return raw


def write(made: Recipe, path: Path, *, found: Mapping, fit: Mapping) -> list[str]:
    """Write a recipe as a config file and return what it is, as lines of text.

    A file that is this recipe already stays. Raises UserError when `path` holds
    anything else or is no .py file.
    """
    path = Path(path).expanduser()
    text = source(made, path, found=found, fit=fit)
    if path.suffix != ".py":
        raise UserError(f"the config must be written to a .py file; got {path}.")
    if path.is_file() and path.read_text() == text:
        return lines(made, path)
    if path.exists():
        raise UserError(
            f"the config must be written to a new file; got {path}, which holds "
            "something else. Remove it or give --out."
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        raise UserError(
            f"the config must be written where one can; got {path} ({error.strerror})."
        ) from error
    return lines(made, path)


def lines(made: Recipe, path: Path) -> list[str]:
    """Return what a recipe achieves, as lines of text."""
    return [
        f"config {path}",
        f"  achieved  {_size(made)}",
        f"  expect    {_loss(made)}",
        f"  train     fm train --config={path}",
        *(f"  warning: {text}" for text in made.warnings),
    ]


def file_name(found: Mapping) -> str:
    """Return a name for the config of a prediction, after what was asked for."""
    parts = [f"{name}_{value:.3g}" for name, value in found["asked"].items()]
    return "_".join(parts).replace("+", "").replace(".", "p").replace("-", "m") + ".py"


def source(made: Recipe, path: Path, *, found: Mapping, fit: Mapping) -> str:
    """Return the text of the config file."""
    inputs = fit["inputs"]
    asked = " and ".join(
        f"{value:.4g} {UNITS[name]}" for name, value in found["asked"].items()
    )
    best = "the compute-optimal run" if len(found["asked"]) == 1 else "the run"
    low, high = fit["range"]["flops"]
    page = [
        ("Purpose", f"train {best} of {asked}, as a fit of other runs sees it"),
        (
            "Source",
            f"fit of {inputs['path']} (sha256 {str(inputs['sha256'])[:16]}), law "
            f"{found['law']}, {inputs['rows']} runs from {low:.3g} to {high:.3g} FLOPs",
        ),
        ("Command", f"fm train --config={path}"),
        ("Hardware", f"any that holds it; fm plan --config={path} says which does"),
        ("Size", _size(made)),
        ("Expect", _loss(made)),
    ]
    warnings = [w for w in found["warnings"] if not w.startswith("approach 2")]
    for number, text in enumerate([*warnings, *made.warnings]):
        page.append(("" if number else "Beware", text))
    title = f"A decoder of {_short(made.params_total)} parameters on " + (
        f"{_short(made.tokens)} tokens, its size by a scaling law."
    )
    body = [f"    config{_place(k)} = {_code(v)}" for k, v in made.overrides.items()]
    text = [
        f'"""{title}',
        "",
        *(_field(name, value) for name, value in page),
        '"""',
        "",
        "from ml_collections import ConfigDict",
        "",
        "from configs import base",
        "",
        "",
        "def get_config() -> ConfigDict:",
        '    """Return configs/base.py with what the prediction changes."""',
        "    config = base.get_config()",
        *body,
        "    return config",
    ]
    return "\n".join(text) + "\n"


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


def _size(made: Recipe) -> str:
    counted = made.count.replace("_", "-")
    return (
        f"{made.params:,} {counted} parameters, {made.tokens:,} tokens "
        f"({made.tokens / made.params:.3g} a parameter) in {made.steps:,} steps, "
        f"{made.flops:.4g} FLOPs as 6ND, {made.flops_exact:.4g} by every product"
    )


def _loss(made: Recipe) -> str:
    text = f"held-out loss {made.loss['value']:.4f} nats per token"
    if made.loss["interval"]:
        low, high = made.loss["interval"]
        text += f", {low:.4f} to {high:.4f} in 95 % of the draws"
    return text + " (without the run's own noise)"


def _field(name: str, value: str) -> str:
    # What stands in a docstring may not end it.
    value = value.replace("\\", "/").replace('"""', "'''")
    return textwrap.fill(
        name.ljust(_INDENT) + value,
        width=_WIDTH,
        subsequent_indent=" " * _INDENT,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _place(key: str) -> str:
    """Return the Python that names a key; `init.from` is no attribute."""
    section, name = key.split(".")
    return f'.{section}["from"]' if name == "from" else f".{section}.{name}"


def _code(value: Any) -> str:
    """Return a value as Python source, whole numbers with their thousands apart."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10_000:
        return f"{value:_}"
    return (
        json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
    )


def _rounded(fraction: float, steps: int) -> float:
    """Return the shortest fraction that is the same number of whole steps."""
    tried = (float(f"{fraction:.{digits}g}") for digits in range(1, 17))
    wanted = round(fraction * steps)
    return next((v for v in tried if round(v * steps) == wanted), fraction)


def _short(number: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"
