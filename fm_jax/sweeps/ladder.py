"""The ladder: one dial to a decoder's sizes, and a budget to its batch, rate, warm-up.

Sizes come from a rule (`size` of a sweep config), counts from models/counts.py. Budget
rules are of two kinds. Absolute laws bring their own constants: steplaw, deepseek.
Anchored laws bring an exponent alone and go through the values that the sweep's base
has at `budget.anchor_params` and `budget.anchor_tokens`, where they were tuned: porian,
power_lines, width. N in them is counted as `size.count` says, C as `design.flops`.
"""

import math
from typing import Any

from fm_jax.errors import UserError
from fm_jax.models import counts
from fm_jax.models.config import ModelConfig

RULES = ("width", "layers")
BATCHES = ("fixed", "porian", "steplaw", "deepseek", "power_lines")
RATES = ("fixed", "porian", "steplaw", "deepseek", "width")
WARMUPS = ("fraction", "porian")
NEEDS_TOKENS = ("power_lines",)  # rules that are anchored at a number of tokens
LAST_DIAL = 2**20  # no decoder is looked for beyond

# ---- sizes


def model_of(dial: int, size: dict, base_model: dict) -> dict:
    """Return the model fields that the size rule sets for a dial.

    Rule `width`: the dial is embed_dim and num_layers = embed_dim / aspect, or as
    given; rule `layers`: the dial is num_layers and embed_dim = aspect * num_layers,
    rounded up to whole heads. Raises UserError on a width that is not whole heads.
    """
    head_dim, aspect = size["head_dim"], size["aspect"]
    if size["rule"] == "layers":
        num_layers = dial
        width = max(1, math.ceil(aspect * dial / head_dim - 1e-9)) * head_dim
    else:
        width = dial
        num_layers = size["num_layers"] or max(1, round(dial / aspect))
        if width % head_dim:
            raise UserError(
                "a width of design.sizes must divide by size.head_dim; got "
                f"{width} and {head_dim}. Change one."
            )
    num_heads = width // head_dim
    shared = max(n for n in range(1, size["group"] + 1) if num_heads % n == 0)
    round_to = size["round_to"]
    mlp_dim = max(1, round(size["mlp_ratio"] * width / round_to)) * round_to
    return {
        "num_layers": num_layers,
        "embed_dim": width,
        "num_heads": num_heads,
        "num_kv_heads": num_heads // shared,
        "head_dim": head_dim,
        "mlp_dim": mlp_dim,
    }


def config_of(model: dict, base_model: dict) -> ModelConfig:
    """Return the ModelConfig of a base model with some fields replaced.

    `base_model` must say vocab_size and max_length: without them nothing is counted.
    """
    merged = {**base_model, **model}
    for field in ("vocab_size", "max_length"):
        if not merged[field]:
            raise UserError(
                f"config.base.model.{field} must be given to count parameters; got 0."
            )
    merged["remat_names"] = tuple(merged["remat_names"])
    return ModelConfig(**merged)


def count_of(dial: int, count: str, size: dict, base_model: dict) -> int:
    """Return the parameters of a dial's decoder, by one of the counts."""
    config = config_of(model_of(dial, size, base_model), base_model)
    return getattr(counts.params(config), count)


def dial_step(size: dict) -> int:
    """Return what dials are multiples of."""
    return size["head_dim"] if size["rule"] == "width" else 1


def nearest(target_params: float, count: str, size: dict, base_model: dict) -> int:
    """Return the dial whose decoder is nearest to `target_params` on a log scale.

    Looked for beyond the dials of the sweep itself, from the smallest decoder on.
    """
    step = dial_step(size)

    def far(number: int) -> float:
        achieved = count_of(number * step, count, size, base_model)
        return math.log(achieved / target_params)

    low, high = 1, 1  # in steps
    while far(high) < 0 and high * step < LAST_DIAL:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if far(middle) < 0 else (low, middle)
    # Grouped heads make the count uneven: look a little to both sides.
    around = range(max(1, low - 3), high + 4)
    return min(around, key=lambda number: abs(far(number))) * step


def flops_per_token(config: ModelConfig, how: str, count: str, length: int) -> float:
    """Return training FLOPs per token: `6n` of a count (2001.08361), or `exact`."""
    if how == "exact":
        return counts.flops_per_token(config, length)
    return 6.0 * getattr(counts.params(config), count)


# ---- budgets: batch sizes in tokens, peak learning rates, warm-up in tokens


def porian_batch(batch: float, params: float, anchor_params: float) -> float:
    """Return batch * (N / N_anchor)^(2/3) (2406.19146)."""
    return batch * (params / anchor_params) ** (2 / 3)


def steplaw_batch(tokens: float) -> float:
    """Return 0.58 D^0.571 tokens (2503.04715)."""
    return 0.58 * tokens**0.571


def deepseek_batch(flops: float) -> float:
    """Return 0.2920 C^0.3271 tokens (2401.02954).

    Their C counts attention and leaves out the vocabulary.
    """
    return 0.2920 * flops**0.3271


def power_lines_batch(batch: float, tokens: float, anchor_tokens: float) -> float:
    """Return batch * (D / D_anchor)^0.383 (2505.13738)."""
    return batch * (tokens / anchor_tokens) ** 0.383


def porian_rate(rate: float, params: float, anchor_params: float) -> float:
    """Return rate * (N / N_anchor)^(-1/3) (2406.19146)."""
    return rate * (params / anchor_params) ** (-1 / 3)


def steplaw_rate(params: float, tokens: float) -> float:
    """Return 1.79 N^-0.713 D^0.307, N without the vocabulary (2503.04715)."""
    return 1.79 * params**-0.713 * tokens**0.307


def deepseek_rate(flops: float) -> float:
    """Return 0.3118 C^-0.1250 (2401.02954); C as in `deepseek_batch`."""
    return 0.3118 * flops**-0.1250


def width_rate(rate: float, width: int, anchor_width: int) -> float:
    """Return rate * anchor_width / width: muP's rule for hidden weights (2203.03466).

    Given to all weights alike, which muP does not do for embeddings and norms.
    """
    return rate * anchor_width / width


def batch_rows(
    params: float, tokens: float, flops: float, budget: dict, base: dict
) -> int:
    """Return the rows of a step by `budget.batch`, rounded to what is feasible.

    That is a multiple of budget.batch_multiple, and of base's train.accumulation
    unless budget.micro_rows sets that.
    """
    length, rows = base["data"]["max_length"], base["train"]["batch_size"]
    rule = budget["batch"]
    if rule == "fixed":
        return rows
    if rule == "porian":
        asked = porian_batch(rows * length, params, budget["anchor_params"])
    elif rule == "steplaw":
        asked = steplaw_batch(tokens)
    elif rule == "deepseek":
        asked = deepseek_batch(flops)
    else:
        asked = power_lines_batch(rows * length, tokens, budget["anchor_tokens"])
    multiple = budget["batch_multiple"]
    if not budget["micro_rows"]:
        multiple = math.lcm(multiple, base["train"]["accumulation"])
    return max(1, round(asked / length / multiple)) * multiple


def accumulation(rows: int, budget: dict, base: dict) -> int:
    """Return the micro-batches of a step: the fewest of at most budget.micro_rows."""
    most = budget["micro_rows"]
    if not most:
        return base["train"]["accumulation"]
    return next(n for n in range(1, rows + 1) if rows % n == 0 and rows // n <= most)


def peak_rate(
    params: float, tokens: float, flops: float, model: dict, budget: dict, base: dict
) -> float:
    """Return the peak learning rate by `budget.learning_rate`, to four digits."""
    rate, rule = base["optimizer"]["learning_rate"], budget["learning_rate"]
    if rule == "porian":
        rate = porian_rate(rate, params, budget["anchor_params"])
    elif rule == "steplaw":
        body = counts.params(config_of(model, base["model"])).non_embedding
        rate = steplaw_rate(body, tokens)
    elif rule == "deepseek":
        rate = deepseek_rate(flops)
    elif rule == "width":
        rate = width_rate(rate, model["embed_dim"], base["model"]["embed_dim"])
    return float(f"{rate:.4g}") if rule != "fixed" else rate


def warmup_steps(
    params: float, steps: int, batch_tokens: int, budget: dict, base: dict
) -> int:
    """Return the steps of warm-up by `budget.warmup`, at least 1.

    fraction: base's schedule.warmup_fraction of all steps; porian: as many tokens as
    parameters, at most that fraction (2406.19146).
    """
    most = base["schedule"]["warmup_fraction"] * steps
    if budget["warmup"] == "porian":
        most = min(most, params / batch_tokens)
    return max(1, round(most))


def training_of(
    params: float, tokens: float, flops: float, model: dict, budget: dict, base: dict
) -> dict[str, Any]:
    """Return the overrides `{"section.key": value}` that train `model` on `tokens`.

    `params` and `flops` are counted as the sweep counts them, `budget` is a section
    whose anchors are filled in. Steps are whole, so that the tokens of the overrides
    are near those asked for, not equal to them.
    """
    rows = batch_rows(params, tokens, flops, budget, base)
    batch_tokens = rows * base["data"]["max_length"]
    steps = max(1, round(tokens / batch_tokens))
    warmup = warmup_steps(params, steps, batch_tokens, budget, base)
    return {
        "train.steps": steps,
        "train.tokens": 0.0,
        "train.epochs": 0.0,
        "train.tokens_per_param": 0.0,
        "train.batch_size": rows,
        "train.accumulation": accumulation(rows, budget, base),
        "optimizer.learning_rate": peak_rate(
            params, tokens, flops, model, budget, base
        ),
        "schedule.warmup_fraction": warmup / steps,
    }
