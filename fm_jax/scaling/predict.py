"""What a fit says of a budget: params, tokens and loss, with intervals and warnings."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from fm_jax.errors import UserError, unknown
from fm_jax.scaling import checks, frontier, optimum
from fm_jax.tables import schema

LEAST_FLOPS, MOST_FLOPS = 1e9, 1e30  # of what may be asked for
FAR = 10.0  # beyond the largest run by more, a prediction is mostly faith
ASKED = ("flops", "params", "tokens", "tokens_per_param")
APART = ("approach 1: ", "approach 2: ", "rates: ")  # warnings not of the law


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
      fit, draws, law: what files.load returns.
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
    said, record, ensemble = choose(fit, draws, law, count)
    extra = columns_of(law, columns)
    amounts = optimum.amounts(law, ensemble, asked, extra)
    flops = float(amounts["flops"][0])
    if flops < LEAST_FLOPS or flops > MOST_FLOPS:
        raise UserError(
            f"a run must take from {LEAST_FLOPS:.3g} to {MOST_FLOPS:.3g} FLOPs; got "
            f"{flops:.3g} for {_named(asked)}. Ask for another."
        )
    if not np.isfinite([column[0] for column in amounts.values()]).all():
        raise UserError(
            "a fit must have an optimum where one is asked for; got a loss that falls "
            f"for ever to one side for {_named(asked)}. Fit runs that bracket it."
        )
    num_draws = len(ensemble) - 1
    without = int(np.sum(~np.isfinite(amounts["params"][1:])))
    if without > num_draws / 2:
        raise UserError(
            f"the draws of a fit must have an optimum; got {without} of {num_draws} "
            f"without for {_named(asked)}. Fit more runs, or runs that bracket it."
        )
    found: dict[str, Any] = {"asked": asked, "count": said, "law": law.name}
    found |= {name: quantity(column) for name, column in amounts.items()}
    found["loss"]["of_a_run"] = of_a_run(amounts["loss"], record)
    best = optimum.amounts(law, ensemble[:1], {"flops": flops}, extra)
    best = {name: float(best[name][0]) for name in ("params", "tokens")}
    found["flat_range"] = found["optimum"] = None
    if math.isfinite(best["params"]):
        ends = frontier.flat_range(law, ensemble[0], flops, columns=extra)
        found["flat_range"] = [float(end) for end in ends]
    if found["flat_range"] and len(asked) == 2:
        least = optimum.loss(law, ensemble, **best, columns=extra)
        excess = quantity(amounts["loss"] / least - 1)
        found["optimum"] = best | {"loss": quantity(least), "excess": excess}
    is_main = record is fit["approach3"]
    found["approach2"] = None
    if set(asked) == {"flops"} and is_main:
        found["approach2"] = _by_slices(fit, draws, flops)
    ends = record.get("range", fit["range"])
    found["extrapolation"] = flops / ends["flops_6nd"][1]
    found["num_draws"], found["columns"] = num_draws, extra
    notes = (fit if is_main else record)["warnings"]
    found["warnings"] = _warnings(found, ends, without, notes)
    return found


def choose(
    fit: Mapping, draws: Mapping[str, np.ndarray], law, count: str
) -> tuple[str, Mapping, np.ndarray]:
    """Return the count's name, the record of its fit, and theta with its draws.

    These are [1 + R, P], the estimate first. Raises UserError for a count that is
    unknown or was not fitted, and without a law.
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
    own, drawn = fit["inputs"]["count"], "approach3"
    if own in schema.COUNTS and count not in ("", own):
        others, drawn = fit.get("by_count", {}), f"approach3_{count}"
        if count not in others or drawn not in draws:
            known = ", ".join([own, *others])
            raise UserError(
                f"the count must be one that was fitted ({known}); got {count}. Fit "
                f"anew with fm fit --count={count}."
            )
        record = others[count]
    theta = np.array([record[name] for name in law.names], float)
    return count or own, record, np.vstack([theta, draws[drawn]])


def columns_of(law, columns: Mapping[str, float] | None) -> dict[str, float]:
    """Return what the law reads beside params and tokens, checked."""
    columns = dict(columns or {})
    needed = [name for name in law.columns if name not in ("params", "tokens")]
    for name in columns.keys() - set(needed):
        raise UserError(
            f"--column must be of what the law {law.name} reads beside params and "
            f"tokens ({', '.join(needed) or 'nothing'}); got {name}."
        )
    for name in needed:
        if name not in columns:
            raise UserError(
                f"the law {law.name} must be told {name}; got no value. Give "
                f"--column={name}=NUMBER, its value for the run that is asked for."
            )
        if not 0 < columns[name] < math.inf:
            raise UserError(f"{name} must be > 0 and finite; got {columns[name]}.")
    return {name: float(columns[name]) for name in needed}


def quantity(column: np.ndarray) -> dict[str, Any]:
    """Return the first value and the interval of the others, None where all agree."""
    drawn = column[1:][np.isfinite(column[1:])]
    if not len(drawn) or np.ptp(drawn) <= 1e-9 * abs(column[0]):
        return {"value": float(column[0]), "interval": None}
    return {"value": float(column[0]), "interval": checks.interval(drawn)}


def of_a_run(losses: np.ndarray, record: Mapping) -> list[float]:
    """Return the 95 % interval of one run's own loss; `losses` [1 + R] as above.

    A run lies about the law as those fitted do: with the residuals' sd of ln loss.
    """
    noise = np.random.default_rng(0).standard_normal(len(losses) - 1)
    return checks.interval(losses[1:] * np.exp(record["residual_sd"] * noise))


def lines(found: Mapping) -> list[str]:
    """Return a prediction as lines of text."""
    counted = found["count"].replace("_", "-")
    counted = f"{counted} parameters" if found["count"] in schema.COUNTS else counted
    made = [
        f"{_named(found['asked'])}; N is {counted}, C = 6ND, "
        f"law {found['law']}, 95 % of {found['num_draws']} draws"
    ]
    for name, label in (
        ("flops", "FLOPs"),
        ("params", "params"),
        ("tokens", "tokens"),
        ("tokens_per_param", "tokens/param"),
        ("loss", "loss, nats/token"),
    ):
        made.append(f"  {label:20}{_shown(found[name], name)}")
    low, high = found["loss"]["of_a_run"]
    made.append(f"  {'a run, its noise too':30}  [{low:.4f}, {high:.4f}]")
    if found["flat_range"]:
        low, high = found["flat_range"]
        made.append(
            f"  {'flat':20}{low:.3g} to {high:.3g} params are within "
            f"{frontier.NEAR:.1%} of the best loss at this compute"
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


def _by_slices(fit: Mapping, draws: Mapping, flops: float) -> dict[str, Any] | None:
    """Return N* and D* of the lines through the isoFLOP optima, where they are.

    The lines are in the FLOPs of the table, which may be another multiple of ND.
    """
    record = fit.get("approach2") or {}
    if "a" not in record or "approach2" not in draws:
        return None
    flops = flops * fit["range"]["flops_ratio"]
    ln = math.log(flops)
    found = {}
    for name, coefficient, exponent, at in (
        ("params", "coefficient", "a", 0),
        ("tokens", "coefficient_tokens", "b", 2),
    ):
        value = record[coefficient] * np.float64(flops) ** record[exponent]
        drawn = np.exp(draws["approach2"][:, at] + draws["approach2"][:, at + 1] * ln)
        found[name] = quantity(np.concatenate([[value], drawn]))
    return found


def _warnings(found, ends: Mapping, without: int, notes: list[str]) -> list[str]:
    """Return how far this is from the runs, what intervals leave out, the fit's own."""
    made = []
    for name, thing in (("flops", "FLOPs"), ("params", "params"), ("tokens", "tokens")):
        low, high = ends["flops_6nd" if name == "flops" else name]
        value = found[name]["value"]
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
    made += [text for text in notes if not text.startswith(APART)]
    doubts = sum(text.startswith("approach 2: ") for text in notes)
    if found["approach2"] and doubts:
        made.append(f"approach 2 has warnings of its own ({doubts}), in fit.json")
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
