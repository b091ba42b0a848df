"""From a ConfigDict to checked, frozen dataclasses: the door that config stops at.

Every key stands in configs/base.py with its comment and its default; the dataclasses
here give the types and the checks, and have no defaults. Imports no jax.
"""

import dataclasses
import math
import typing
from typing import Any

from fm_jax.errors import UserError, unknown
from fm_jax.models.config import ModelConfig

# What the checks below demand of plain numbers; everything else has a check of its own.
POSITIVE = ("optimizer.learning_rate", "optimizer.epsilon")
AT_LEAST_ONE = (
    "train.batch_size",
    "train.accumulation",
    "data.max_length",
    "eval.batch_size",
    "checkpoint.keep",
    "log.every",
    "sample.num_samples",
)
NOT_NEGATIVE = (
    "eval.every",
    "eval.max_batches",
    "checkpoint.every",
    "checkpoint.keep_best",
    "checkpoint.keep_every",
    "train.loss_chunk",
    "train.z_loss",
    "train.seed",
    "optimizer.clip_norm",
    "optimizer.weight_decay",
    "sample.num_tokens",
    "sample.temperature",
    "sample.top_k",
)
FRACTIONS = (
    "schedule.warmup_fraction",
    "schedule.decay_fraction",
    "schedule.final_fraction",
)
BELOW_ONE = ("optimizer.beta1", "optimizer.beta2", "train.ema_decay")
DURATIONS = ("steps", "tokens", "epochs", "tokens_per_param")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    source: str
    paths: tuple[str, ...]
    eval_paths: tuple[str, ...]
    eval_fraction: float
    name: str
    tfds_dir: str
    split: str
    eval_split: str
    text_field: str
    on_bad_text: str
    tokenizer: str
    vocab_size: int
    end_token: str
    max_length: int
    mask_documents: bool
    cache_dir: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    name: str
    learning_rate: float
    weight_decay: float
    decay_rules: tuple[tuple[str, bool], ...]
    beta1: float
    beta2: float
    epsilon: float
    clip_norm: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    name: str
    warmup_fraction: float
    decay_fraction: float
    final_fraction: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    steps: int
    tokens: float
    epochs: float
    tokens_per_param: float
    batch_size: int
    accumulation: int
    seed: int
    z_loss: float
    loss_chunk: int
    ema_decay: float
    compile_cache: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    data: int
    fsdp: int
    tensor: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    every: int
    batch_size: int
    max_batches: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every: int
    keep: int
    keep_best: int
    keep_every: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    every: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
    prompt: str
    num_samples: int
    num_tokens: int
    temperature: float
    top_k: int
    top_p: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run. `raw` is the nested dict of every key, as given."""

    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    train: TrainConfig
    mesh: MeshConfig
    eval: EvalConfig
    checkpoint: CheckpointConfig
    log: LogConfig
    sample: SampleConfig
    raw: dict


def check(raw: dict) -> Config:
    """Return the checked Config of nested dicts; derived sizes are filled in.

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
    model = raw["model"]
    # What is missing or of another type stays as it is: the sections refuse it below.
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
    built = {n: _section(n, k, raw[n]) for n, k in sections.items() if n != "model"}
    # A data.max_length below 1 is refused below, by its own name.
    length = max(1, built["data"].max_length)
    model["max_length"] = model.get("max_length") or length
    built["model"] = _section("model", ModelConfig, model)
    config = Config(**built, raw=raw)
    _check_values(config)
    return config


def _section(section: str, kind: type, values: dict):
    types = typing.get_type_hints(kind)
    for name in values:
        if name not in types:
            raise unknown(f"config.{section} key", name, types)
    missing = [f"config.{section}.{name}" for name in types if name not in values]
    if missing:
        raise UserError(
            f"{missing[0]} must be given; got no value. Start from configs/base.py."
        )
    typed = {n: _typed(f"{section}.{n}", values[n], t) for n, t in types.items()}
    return kind(**typed)


def _typed(key: str, value: Any, kind: Any) -> Any:
    origin = typing.get_origin(kind)
    if origin is tuple and isinstance(value, tuple | list):
        inner = typing.get_args(kind)
        if len(inner) == 2 and inner[1] is Ellipsis:
            return tuple(_typed(key, v, inner[0]) for v in value)
        if len(inner) == len(value):
            pairs = zip(value, inner, strict=True)
            return tuple(_typed(key, v, t) for v, t in pairs)
    elif kind is float and isinstance(value, int | float) and value is not True:
        if math.isfinite(value) and value is not False:
            return float(value)
    elif origin is None and type(value) is kind:
        return value
    shown = kind.__name__ if origin is None else str(kind)
    raise UserError(f"config.{key} must be {shown}; got {value!r}.")


def _check_values(config: Config) -> None:
    def value(key):
        section, name = key.split(".")
        return getattr(getattr(config, section), name)

    def demand(holds, key, demand):
        if not holds:
            raise UserError(f"config.{key} must be {demand}; got {value(key)!r}.")

    given = [n for n in DURATIONS if getattr(config.train, n)]
    if len(given) != 1:
        shown = ", ".join(f"train.{n}={getattr(config.train, n)}" for n in given)
        raise UserError(
            "exactly one of train.steps, train.tokens, train.epochs and "
            f"train.tokens_per_param must be set; got {shown or 'none'}. "
            "Set the others to 0."
        )
    for key in (f"train.{given[0]}", *POSITIVE):
        demand(value(key) > 0, key, "> 0")
    for key in AT_LEAST_ONE:
        demand(value(key) >= 1, key, ">= 1")
    for key in NOT_NEGATIVE:
        demand(value(key) >= 0, key, ">= 0")
    for key in FRACTIONS:
        demand(0 <= value(key) <= 1, key, "between 0 and 1")
    for key in BELOW_ONE:
        demand(0 <= value(key) < 1, key, "at least 0 and below 1")
    demand(0 < config.sample.top_p <= 1, "sample.top_p", "above 0 and at most 1")
    _demand_divides(config, "train.batch_size", "train.accumulation")
    if config.train.loss_chunk:
        _demand_divides(config, "data.max_length", "train.loss_chunk")
    if config.model.positions == "learned":
        demand(
            config.model.max_length >= config.data.max_length,
            "model.max_length",
            f">= data.max_length={config.data.max_length} for learned positions",
        )
    if config.data.end_token:
        demand(
            config.data.tokenizer not in ("bytes", "bpe"),
            "data.tokenizer",
            "a tokenizer.json when data.end_token is set",
        )
    if config.checkpoint.keep_best and (
        not config.eval.every or config.checkpoint.every % config.eval.every
    ):
        raise UserError(
            "checkpoint.every must be a multiple of eval.every when "
            "checkpoint.keep_best is set; got "
            f"{config.checkpoint.every} and {config.eval.every}."
        )


def _demand_divides(config: Config, whole: str, part: str) -> None:
    sizes = []
    for key in (whole, part):
        section, name = key.split(".")
        sizes.append(getattr(getattr(config, section), name))
    if sizes[0] % sizes[1]:
        raise UserError(
            f"{whole} must divide by {part}; got {sizes[0]} and {sizes[1]}."
        )


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
    return max(1, math.ceil(tokens / tokens_per_step))
