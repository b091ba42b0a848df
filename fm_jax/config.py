"""From a ConfigDict to checked, frozen dataclasses: the door that config stops at.

Every key stands in configs/base.py with its comment and its default; sections.py gives
its type, demands.py and
combinations.py what is refused. Imports no jax.
"""

import dataclasses
import math
import os
import typing
from typing import Any

from fm_jax import combinations, configfile, demands, redact
from fm_jax import patterns as regexes
from fm_jax.corpora import chains
from fm_jax.errors import UserError, unknown
from fm_jax.models.config import ModelConfig
from fm_jax.sections import Config, TrainConfig

WITHOUT_STEPS = ("probe", "none")  # ways to fine-tune that take no gradient step
MOST_WHOLE, MOST_FLOAT = 2**63, 1e300  # no amount is as large
SEED_LIMIT = 2**31  # what every backend takes for a seed


def check(raw: dict) -> Config:
    """Return the checked Config of nested dicts; sizes given as 0 are derived.

    Raises UserError on unknown or missing keys, wrong types, values out of range and
    impossible combinations.
    """
    sections = {f.name: f.type for f in dataclasses.fields(Config) if f.name != "raw"}
    for name, section in raw.items():
        if name not in sections:
            raise unknown("config section", name, sections)
        if not isinstance(section, dict):
            raise UserError(f"config.{name} must be a section; got {section!r}.")
    raw = {name: dict(raw.get(name, {})) for name in sections}
    built = {n: read_section(n, k, raw[n]) for n, k in sections.items() if n != "model"}
    # A data.max_length below 1 is refused below, by its own name.
    filled = _filled(raw["model"], length=max(1, built["data"].max_length))
    config = Config(**built, model=read_section("model", ModelConfig, filled), raw=raw)
    _check_values(config)
    combinations.check(config)
    return config


def _filled(model: dict, *, length: int) -> dict:
    """Return the model section with the sizes that were given as 0."""
    model = dict(model)
    # What is missing or of another type stays as it is: the section refuses it.
    has_dim = isinstance(model.get("embed_dim"), int)
    if isinstance(model.get("num_heads"), int) and model["num_heads"] > 0:
        model["num_kv_heads"] = model.get("num_kv_heads") or model["num_heads"]
        if has_dim and not model.get("head_dim"):
            if model["embed_dim"] % model["num_heads"]:
                raise UserError(
                    "model.embed_dim must divide by model.num_heads; got "
                    f"{model['embed_dim']} and {model['num_heads']}. "
                    "Change one, or set --config.model.head_dim."
                )
            model["head_dim"] = model["embed_dim"] // model["num_heads"]
    if has_dim:
        model["mlp_dim"] = model.get("mlp_dim") or 4 * model["embed_dim"]
    model["max_length"] = model.get("max_length") or length
    return model


def read_section(
    section: str, kind: type, values: dict, base: str = "configs/base.py"
) -> Any:
    """Return a section's keys as the dataclass `kind`; `base` is where all stand.

    Raises UserError on unknown or missing keys and on values of another type.
    """
    # A key that Python keeps for itself has an underscore after it as a field.
    types = {n.rstrip("_"): (n, t) for n, t in typing.get_type_hints(kind).items()}
    for name in values:
        if name not in types:
            raise unknown(f"config.{section} key", name, types)
    missing = [f"config.{section}.{name}" for name in types if name not in values]
    if missing:
        raise UserError(f"{missing[0]} must be given; got no value. Start from {base}.")
    fields = {
        field: read_value(f"{section}.{key}", values[key], t)
        for key, (field, t) in types.items()
    }
    return kind(**fields)


def read_value(key: str, value: Any, kind: Any) -> Any:
    """Return a key's value as `kind`; raises UserError when it is of another."""
    try:
        return _as(value, kind)
    except TypeError as error:
        shown = str(kind) if typing.get_origin(kind) else kind.__name__
        if isinstance(value, float) and kind is float:
            shown = "finite"
        raise UserError(f"config.{key} must be {shown}; got {value!r}.") from error


def _as(value: Any, kind: Any) -> Any:
    origin = typing.get_origin(kind)
    if origin is tuple and isinstance(value, tuple | list):
        inner = typing.get_args(kind)
        if len(inner) == 2 and inner[1] is Ellipsis:
            return tuple(_as(v, inner[0]) for v in value)
        if len(inner) == len(value):
            return tuple(_as(v, t) for v, t in zip(value, inner, strict=True))
    elif kind is float:
        is_number = type(value) in (int, float) and abs(value) < MOST_FLOAT
        if is_number:  # and no NaN
            return float(value)
    elif kind is int and type(value) is int and abs(value) >= MOST_WHOLE:
        raise TypeError
    elif origin is None and type(value) is kind:
        return value
    raise TypeError


def _check_values(config: Config) -> None:
    """Refuse values that are wrong by themselves."""
    given = [n for n in configfile.DURATIONS if getattr(config.train, n)]
    if len(given) != 1:
        shown = ", ".join(f"train.{n}={getattr(config.train, n)}" for n in given)
        raise UserError(
            "exactly one of train.steps, train.tokens, train.epochs and "
            f"train.tokens_per_param must be set; got {shown or 'none'}. "
            "Set the others to 0."
        )
    for key, known in demands.CHOICES.items():
        if demands.value(config, key) not in known:
            raise unknown(f"config.{key}", demands.value(config, key), known)
    ranges = (
        ((f"train.{given[0]}", *demands.POSITIVE), lambda x: x > 0, "> 0"),
        (demands.AT_LEAST_ONE, lambda x: x >= 1, ">= 1"),
        (demands.NOT_NEGATIVE, lambda x: x >= 0, ">= 0"),
        (demands.NOT_EMPTY, lambda x: x != "", "given"),
        (demands.FRACTIONS, lambda x: 0 <= x <= 1, "between 0 and 1"),
        (demands.BELOW_ONE, lambda x: 0 <= x < 1, "at least 0 and below 1"),
    )
    for keys, holds, wanted in ranges:
        for key in keys:
            demands.must(config, key, holds(demands.value(config, key)), wanted)
    top_p, seed = config.sample.top_p, config.train.seed
    demands.must(config, "sample.top_p", 0 < top_p <= 1, "above 0 and at most 1")
    demands.must(config, "train.seed", seed < SEED_LIMIT, f"below {SEED_LIMIT}")
    for name, (least, most) in chains.RANGES.items():
        key, wanted = f"synthetic.{name}", f"from {least} to {most}"
        is_between = least <= demands.value(config, key) <= most
        demands.must(config, key, is_between, wanted)
    _check_patterns(config)
    _check_urls(config)


def _check_urls(config: Config) -> None:
    """Refuse secrets in what a run writes down, and homes of users that are not."""
    for key in demands.PATHS:
        found = demands.value(config, key)
        for one in (found,) if isinstance(found, str) else found:
            home = one.partition("/")[0]
            if home.startswith("~") and os.path.expanduser(home) == home:
                raise UserError(
                    f"config.{key} must be in a home that is there; got {one[:80]!r}."
                )
            if redact.in_url(one):
                raise UserError(
                    f"config.{key} must have no password or key in a URL, for the run "
                    "writes it down; got one. Give it to fsspec by the environment, as "
                    "FSSPEC_HTTPS, or by its files in ~/.config/fsspec."
                )


def _check_patterns(config: Config) -> None:
    patterns = {
        "optimizer.decay_rules": [p for p, _ in config.optimizer.decay_rules],
        "finetune.rules": [pattern for pattern, _ in config.finetune.rules],
        "lora.targets": [config.lora.targets],
    }
    for key, several in patterns.items():
        for pattern in several:
            regexes.compiled(pattern, f"config.{key}")


def resolve_steps(
    train: TrainConfig, *, tokens_per_step: int, corpus_tokens: int, num_params: int
) -> int:
    """Return the number of steps that the one given duration stands for, at least 1.

    epochs are passes over `corpus_tokens` targets; tokens_per_param counts all params.
    """
    if train.steps:
        return train.steps
    tokens = (
        train.tokens
        or train.epochs * corpus_tokens
        or train.tokens_per_param * num_params
    )
    steps = tokens / tokens_per_step
    if steps >= MOST_WHOLE:
        raise UserError(
            f"a run must have fewer than {MOST_WHOLE:.0e} steps; got {steps:.3g}. "
            "Lower train.epochs or train.tokens_per_param."
        )
    return max(1, math.ceil(steps))
