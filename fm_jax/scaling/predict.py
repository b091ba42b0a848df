"""What a fit says of a budget: params, tokens and loss, with intervals and warnings."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from fm_jax.errors import UserError, unknown
from fm_jax.scaling import fit as fits
from fm_jax.scaling import frontier, resamples
from fm_jax.tables import schema

LEVEL = 0.95
TOLERANCE = 0.005  # of the best loss: the flat range of params
FAR = 10.0  # beyond the largest run by more, a prediction is mostly faith
ASKED = ("flops", "params", "tokens", "tokens_per_param")


def predict(
    fit: Mapping,
    draws: Mapping[str, np.ndarray],
    law,
    *,
    flops: float | None = None,
    params: float | None = None,
    tokens: float | None = None,
    tokens_per_param: float | None = None,
    count: str = "",
    columns: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Return the run that is asked for as a fit sees it, C = 6ND.

    One of flops, params and tokens asks for the compute-optimal run that has it; two
    of all four say the run themselves, and it is compared with the optimum of its
    compute. Each number is {"value", "interval"}: the fit's, and the 95 % interval of
    its draws, None of what was given. The loss is that of this run, not of each draw's
    own best one.

    Args:
      fit, draws, law: what fit.load returns.
      flops, params, tokens, tokens_per_param: what is asked for.
      count: of the parameters that `params` are (schema.COUNTS); "" is the fit's. For
        a table with a column of its own it says what that column counts.
      columns: what else the law reads, one number each.
    Raises:
      UserError: an amount or a count that cannot be, a combination that says no run,
        a fit without a law, a law without an optimum there.
    """
    asked = dict(zip(ASKED, (flops, params, tokens, tokens_per_param), strict=True))
    asked = {name: value for name, value in asked.items() if value is not None}
    _check(asked)
    said, record, drawn = choose(fit, draws, count)
    ensemble = np.vstack([fits.theta(record, law), drawn])
    extra = _extra(law, columns)
    amounts = _amounts(law, ensemble, asked, extra)
    if not np.isfinite([column[0] for column in amounts.values()]).all():
        raise UserError(
            "a fit must have an optimum where one is asked for; got a loss that falls "
            f"for ever to one side for {_named(asked)}. Fit runs that bracket it."
        )
    without = int(np.sum(~np.isfinite(amounts["params"][1:])))
    if without > len(drawn) / 2:
        raise UserError(
            f"the draws of a fit must have an optimum; got {without} of {len(drawn)} "
            f"without for {_named(asked)}. Fit more runs, or runs that bracket it."
        )
    found: dict[str, Any] = {"asked": asked, "count": said, "law": law.name}
    found |= {name: quantity(column) for name, column in amounts.items()}
    run = {name: found[name]["value"] for name in ("params", "tokens")}
    losses = loss(law, ensemble, **run, columns=extra)
    found["loss"] = quantity(losses)
    flops = found["flops"]["value"]
    low, high = frontier.flat_range(
        law, ensemble[0], flops, tolerance=TOLERANCE, columns=extra
    )
    found["flat_range"] = [float(low), float(high)]
    found["optimum"] = None
    if len(asked) == 2:
        found["optimum"] = _optimum(law, ensemble, flops, losses, extra)
    found["approach2"] = None
    if set(asked) == {"flops"} and record is fit["approach3"]:
        found["approach2"] = _by_slices(fit, draws, flops)
    ends = record.get("range", fit["range"])
    found["extrapolation"] = flops / ends["flops"][1]
    found["level"], found["num_draws"] = LEVEL, len(drawn)
    found["columns"] = extra
    found["warnings"] = _warnings(found, ends, without) + [
        text
        for text in fit.get("warnings", [])
        if found["approach2"] or not text.startswith("approach 2")
    ]
    return found


def choose(
    fit: Mapping, draws: Mapping[str, np.ndarray], count: str
) -> tuple[str, Mapping, np.ndarray]:
    """Return the count's name, and the record and draws [R, P] of its fit.

    Raises UserError for a count that is unknown or was not fitted, and without a law.
    """
    if count and count not in schema.COUNTS:
        raise unknown("--count", count, schema.COUNTS)
    record = fit.get("approach3") or {"skipped": "there is no approach 3"}
    if "skipped" in record or "approach3" not in draws:
        why = record.get("skipped", "its draws are missing")
        raise UserError(
            f"fit.json must have the fit of a law; got none ({why}). Fit anew with "
            "fm fit."
        )
    own = fit["inputs"]["count"]
    if own not in schema.COUNTS:
        return count or own, record, draws["approach3"]
    if count in ("", own):
        return own, record, draws["approach3"]
    others = fit.get("by_count", {})
    if count not in others or f"approach3_{count}" not in draws:
        known = ", ".join([own, *others])
        raise UserError(
            f"--count must be one that was fitted ({known}); got {count}. Fit anew "
            f"with fm fit --count={count}."
        )
    return count, others[count], draws[f"approach3_{count}"]


def loss(
    law, theta: np.ndarray, *, params: float, tokens: float, columns: Mapping
) -> np.ndarray:
    """Return the loss of one run under theta [..., P], nats per token."""
    at = {"params": params, "tokens": tokens, **columns}
    at = {name: np.array([value]) for name, value in at.items()}
    with np.errstate(all="ignore"):
        return law.loss(theta, at)[..., 0]


def quantity(column: np.ndarray) -> dict[str, Any]:
    """Return the first value and the interval of the others, None where all agree."""
    drawn = column[1:][np.isfinite(column[1:])]
    if not len(drawn) or np.ptp(drawn) <= 1e-9 * abs(column[0]):
        return {"value": float(column[0]), "interval": None}
    ends = resamples.interval(drawn, LEVEL)
    return {"value": float(column[0]), "interval": ends.tolist()}


def lines(found: Mapping) -> list[str]:
    """Return a prediction as lines of text."""
    counted = found["count"].replace("_", "-")
    counted = f"{counted} parameters" if found["count"] in schema.COUNTS else counted
    share = f"{found['level']:.0%}"
    made = [
        f"{_named(found['asked'])}; N is {counted}, C = 6ND, "
        f"law {found['law']}, {share} of {found['num_draws']} draws"
    ]
    for name, label in (
        ("flops", "FLOPs"),
        ("params", "params"),
        ("tokens", "tokens"),
        ("tokens_per_param", "tokens/param"),
        ("loss", "loss, nats/token"),
    ):
        made.append(f"  {label:20}{_shown(found[name], name)}")
    low, high = found["flat_range"]
    made.append(
        f"  {'flat':20}{low:.3g} to {high:.3g} params are within {TOLERANCE:.1%} of "
        "the best loss at this compute"
    )
    best = found["optimum"]
    if best:
        made.append(
            f"  {'optimum there':20}{best['params']:.3g} params, {best['tokens']:.3g} "
            f"tokens, loss {best['loss']['value']:.4f}: this run's is "
            f"{best['excess']['value']:.2%} more"
        )
    other = found["approach2"]
    if other:
        for name in ("params", "tokens"):
            made.append(f"  {f'{name}, approach 2':20}{_shown(other[name], name)}")
    return made + [f"  warning: {text}" for text in found["warnings"]]


def _check(asked: Mapping[str, float]) -> None:
    for name, value in asked.items():
        if not 0 < value < math.inf:
            raise UserError(f"--{name} must be > 0 and finite; got {value}.")
    if len(asked) not in (1, 2) or set(asked) == {"tokens_per_param"}:
        raise UserError(
            "predict must be given --flops, --params or --tokens, or two of these and "
            f"--tokens_per_param; got {_named(asked) or 'none'}."
        )


def _extra(law, columns: Mapping[str, float] | None) -> dict[str, float]:
    """Return what the law reads beside params and tokens, checked."""
    columns = dict(columns or {})
    needed = [name for name in law.columns if name not in ("params", "tokens")]
    for name in needed:
        if name not in columns:
            raise UserError(
                f"the law {law.name} must be told {name}; got no value. Give "
                "its value for the run that is asked for."
            )
        if not 0 < columns[name] < math.inf:
            raise UserError(f"{name} must be > 0 and finite; got {columns[name]}.")
    return {name: float(columns[name]) for name in needed}


def _amounts(law, ensemble, asked, extra) -> dict[str, np.ndarray]:
    """Return flops, params, tokens and their ratio [1 + R], of theta and each draw."""
    flops, params, tokens, ratio = (asked.get(name) for name in ASKED)
    if len(asked) == 1:
        if flops:
            params, tokens = frontier.optimum(law, ensemble, flops, columns=extra)
        elif params:
            tokens = frontier.tokens_of(law, ensemble, params, columns=extra)
        else:
            params = frontier.params_of(law, ensemble, tokens, columns=extra)
    elif flops and ratio:
        params = math.sqrt(flops / 6 / ratio)
        tokens = flops / 6 / params
    elif flops:
        params = params or flops / 6 / tokens
        tokens = flops / 6 / params
    else:
        params = params or tokens / ratio
        tokens = tokens or params * ratio
    params, tokens = (np.broadcast_to(x, len(ensemble)) for x in (params, tokens))
    whole = np.full(len(ensemble), flops) if flops else 6 * params * tokens
    return {
        "flops": whole,
        "params": params,
        "tokens": tokens,
        "tokens_per_param": tokens / params,
    }


def _optimum(law, ensemble, flops, losses, extra) -> dict[str, Any]:
    """Return the best run of a compute, and by what fraction another's loss is more."""
    params, tokens = frontier.optimum(law, ensemble[0], flops, columns=extra)
    run = {"params": float(params), "tokens": float(tokens)}
    best = loss(law, ensemble, **run, columns=extra)
    return run | {"loss": quantity(best), "excess": quantity(losses / best - 1)}


def _by_slices(fit: Mapping, draws: Mapping, flops: float) -> dict[str, Any] | None:
    """Return N* and D* of the lines through the isoFLOP optima, where they are."""
    record = fit.get("approach2") or {}
    if "a" not in record or "approach2" not in draws:
        return None
    ln = math.log(flops)
    found = {}
    for name, coefficient, exponent, at in (
        ("params", "coefficient", "a", 0),
        ("tokens", "coefficient_tokens", "b", 2),
    ):
        value = record[coefficient] * flops ** record[exponent]
        drawn = np.exp(draws["approach2"][:, at] + draws["approach2"][:, at + 1] * ln)
        found[name] = quantity(np.concatenate([[value], drawn]))
    return found


def _warnings(found: Mapping, ends: Mapping, without: int) -> list[str]:
    """Return how far this is from the runs, and what the intervals leave out."""
    made = []
    for name, thing in (("flops", "FLOPs"), ("params", "params"), ("tokens", "tokens")):
        value, (low, high) = found[name]["value"], ends[name]
        if name != "flops" and name not in found["asked"]:
            continue
        factor = max(value / high, low / value)
        if factor > 1.001:
            side = "largest" if value > high else "smallest"
            made.append(
                f"{'EXTRAPOLATION' if factor > FAR else 'extrapolation'}: "
                f"{value:.3g} {thing} are {factor:.3g} times beyond the {side} "
                f"fitted ({high if value > high else low:.3g})"
            )
    if without:
        made.append(
            f"{without} of {found['num_draws']} draws have no optimum here: the "
            "intervals leave them out and are too narrow"
        )
    return made


def _named(asked: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in asked.items())


def _shown(quantity: Mapping, name: str) -> str:
    style = ".4f" if name == "loss" else ".3g"
    text = f"{quantity['value']:{style}}"
    if quantity["interval"]:
        low, high = quantity["interval"]
        text = f"{text:12}[{low:{style}}, {high:{style}}]"
    return text
