"""A sweep's config, checked: what is asked of runs that differ in size and duration.

A sweep file is Python with a get_config(); configs/sweeps/base.py says what each key
means.
"""

import dataclasses
import re

from fm_jax import config as configs
from fm_jax.errors import UserError, unknown
from fm_jax.models import counts
from fm_jax.sweeps import designs, ladder

BASE = "configs/sweeps/base.py"
BYTE_IDS = 257  # of data.tokenizer=bytes
PRETRAINING = {
    "init.model": False,
    "data.examples": "text",
    "finetune.method": "full",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DesignConfig:
    kind: str
    budgets: tuple[float, ...]
    sizes: tuple[int, ...]
    tokens: tuple[float, ...]
    tokens_per_param: tuple[float, ...]
    points: int
    width: float
    centre: float
    decay_fraction: float
    replicates: int
    flops: str
    seed: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class SizeConfig:
    rule: str
    aspect: float
    num_layers: int
    head_dim: int
    group: int
    mlp_ratio: float
    round_to: int
    count: str
    limits: tuple[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    batch: str
    batch_multiple: int
    micro_rows: int
    learning_rate: str
    warmup: str
    anchor_params: float
    anchor_tokens: float
    min_steps: int


SECTIONS = {"design": DesignConfig, "size": SizeConfig, "budget": BudgetConfig}
PLAIN = ("target_flops", "noise")
CHOICES = {
    "design.kind": tuple(designs.KINDS),
    "design.flops": ("6n", "exact"),
    "size.rule": ladder.RULES,
    "size.count": ("total", "non_embedding", "matmul"),
    "budget.batch": ladder.BATCHES,
    "budget.learning_rate": ladder.RATES,
    "budget.warmup": ladder.WARMUPS,
}
AT_LEAST_ONE = (
    "design.points",
    "design.width",
    "design.replicates",
    "size.head_dim",
    "size.group",
    "size.round_to",
    "budget.batch_multiple",
    "budget.min_steps",
)
POSITIVE = ("design.centre", "size.aspect", "size.mlp_ratio", "noise")
NOT_NEGATIVE = (
    "design.seed",
    "size.num_layers",
    "budget.micro_rows",
    "budget.anchor_params",
    "budget.anchor_tokens",
    "target_flops",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """A checked sweep. `base` is the nested dict of the run that all are made from.

    In it the vocabulary and the longest row are filled in, as in `raw`, which is the
    whole config with the anchors too.
    """

    design: DesignConfig
    size: SizeConfig
    budget: BudgetConfig
    target_flops: float
    noise: float
    base: dict
    raw: dict

    @property
    def sizes(self) -> designs.Sizes:
        """The ladder of this sweep."""
        return designs.Sizes(vars(self.size), self.base, self.design.flops)


def check(raw: dict) -> Sweep:
    """Return the checked Sweep of nested dicts.

    Raises UserError on unknown or missing keys, wrong types, values out of range, and a
    base that is no run's config or whose vocabulary is not known before its data.
    """
    known = ("base", *SECTIONS, *PLAIN)
    for name in raw:
        if name not in known:
            raise unknown("config section of a sweep", name, known)
    for name in known:
        if name not in raw:
            raise UserError(
                f"config.{name} must be given; got no value. Start from {BASE}."
            )
        if name not in PLAIN and not isinstance(raw[name], dict):
            raise UserError(f"config.{name} must be a section; got {raw[name]!r}.")
    built = {n: configs.read_section(n, k, raw[n], BASE) for n, k in SECTIONS.items()}
    built |= {name: configs.read_value(name, raw[name], float) for name in PLAIN}
    _check_values(built)
    base = _checked_base(raw["base"])
    _refuse_tuned(base)
    if not built["budget"].anchor_params:
        model = ladder.config_of({}, base["model"])
        anchor = float(getattr(counts.params(model), built["size"].count))
        built["budget"] = dataclasses.replace(built["budget"], anchor_params=anchor)
    whole = {"base": base}
    whole |= {n: v if n in PLAIN else dict(vars(v)) for n, v in built.items()}
    return Sweep(**built, base=base, raw=whole)


def check_run(raw: dict) -> configs.Config:
    """Return the checked Config of a sweep's run; raises UserError in its words."""
    try:
        return configs.check(raw)
    except UserError as error:
        raise UserError(of_base(str(error))) from error


def of_base(message: str) -> str:
    """Return what is said of a run's config as said of its sweep's: config.base.KEY."""
    sections = "|".join(f.name for f in dataclasses.fields(configs.Config))
    message = re.sub(rf"\bconfig\.(?=({sections})\b)", "config.base.", message)
    return re.sub(rf"(?<![\w./'\"])(?=({sections})\.[a-z])", "base.", message)


def _check_values(built: dict) -> None:
    def value(key):
        section, _, name = key.partition(".")
        return getattr(built[section], name) if name else built[section]

    def demand(key, holds, what):
        if not holds:
            raise UserError(f"config.{key} must be {what}; got {value(key)!r}.")

    for key, known in CHOICES.items():
        if value(key) not in known:
            raise unknown(f"config.{key}", value(key), known)
    for key in AT_LEAST_ONE:
        demand(key, value(key) >= 1, ">= 1")
    for key in POSITIVE:
        demand(key, value(key) > 0, "> 0")
    for key in NOT_NEGATIVE:
        demand(key, value(key) >= 0, ">= 0")
    for name in designs.LISTS:
        key = f"design.{name}"
        demand(key, all(v > 0 for v in value(key)), "positive numbers")
    fraction = built["design"].decay_fraction
    demand("design.decay_fraction", 0 < fraction < 1, "between 0 and 1")
    if built["budget"].batch in ladder.NEEDS_TOKENS:
        what = f"> 0 for budget.batch={built['budget'].batch}"
        demand("budget.anchor_tokens", built["budget"].anchor_tokens > 0, what)


def _refuse_tuned(base: dict) -> None:
    """Raise UserError for fine-tuning: its model is given, and it leaves no rows."""
    for key, plain in PRETRAINING.items():
        section, _, name = key.partition(".")
        if base[section][name] != plain:
            raise UserError(
                f"config.base.{key} must be {plain} in a sweep, whose runs are of "
                f"models of its own sizes, trained on text as a whole; got "
                f"{base[section][name]!r}. Use fm train for each fine-tuning run."
            )


def _checked_base(raw: dict) -> dict:
    """Return base with what is derived filled in, and without a duration."""
    train = raw.get("train", {})
    if isinstance(train, dict):  # another thing is refused by its name
        none = dict.fromkeys(("tokens", "epochs", "tokens_per_param"), 0.0)
        raw = raw | {"train": {**train, **none, "steps": 1}}
    config = check_run(raw)
    filled = dataclasses.asdict(config.model) | {"vocab_size": vocabulary(config)}
    return config.raw | {"model": filled}


def vocabulary(config: configs.Config) -> int:
    """Return the model's vocabulary as training will have it, without opening data.

    Raises UserError where only the tokenizer's file can tell.
    """
    if not (size := known_vocabulary(config)):
        raise UserError(
            "config.base.model.vocab_size must be given for data.tokenizer="
            f"{config.data.tokenizer!r}; got 0. Counts are planned before the file is "
            "read."
        )
    return size


def known_vocabulary(config: configs.Config) -> int:
    """Return the model's vocabulary, 0 where only the tokenizer's file can tell."""
    known = {
        "symbols": config.synthetic.num_symbols + 1,
        "bytes": BYTE_IDS,
        "bpe": config.data.vocab_size,
    }
    size = known.get(config.data.tokenizer, 0)
    return config.model.vocab_size or -(-size // 64) * 64
