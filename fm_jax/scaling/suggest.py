"""Which runs to do next: those that best sharpen the optimum at a compute, per FLOP.

The draws of a fit are an ensemble: over them, what a run would show and what is asked,
ln N* at the target, vary together, and a linear-Gaussian update says how much knowing
the one narrows the other. This holds as far as the law does, and cheap extremes look
best where the law is trusted most: so a share of the budget goes to the largest compute
that it can pay, tokens per parameter stay in a range, and repeats are capped.
"""

import json
import math
from collections.abc import Mapping

import numpy as np

from fm_jax.errors import UserError
from fm_jax.scaling import information, predict

_NUM_SIZES = 17
_RATIOS = (5.0, 120.0)  # least and most tokens per parameter of a run
_NUM_RATIOS = 9
_MAX_REPEATS = 2  # of one place
_RUN_CHARGE = 0.1  # beside a run's FLOPs, as a share of an even split of what is left
_LINE_POINTS = 7  # of the isoFLOP line that the runs are compared with
_LINE_SPAN = 4.0  # its sizes, on either side of the optimum
_TOP = 1.25  # a run counts as large within this factor of the largest affordable


def suggest(
    fit: Mapping,
    draws: np.ndarray,
    law,
    *,
    target_flops: float,
    budget_flops: float,
    max_runs: int = 12,
    params_factor: float = 1.0,
    top_share: float = 0.25,
    noise: float | None = None,
    columns: Mapping[str, float] | None = None,
) -> dict:
    """Return runs worth `budget_flops` that most narrow ln N* at `target_flops`.

    Args:
      fit: the contents of fit.json; its range, residual_sd and objective are read.
      draws: [R, P] of the law's parameters.
      target_flops: the compute whose optimum is asked for.
      budget_flops: for all runs together, each costing 6 * params * tokens.
      max_runs: at most so many.
      params_factor: by how much sizes may leave the range of the fitted ones; upward
        they may in any case as far as the share of the largest compute goes.
      top_share: of the budget, kept for the largest compute that it can pay for.
      noise: sd of a run's ln loss; the fit's residual_sd if not given.
      columns: what else the law reads, the same for runs and target.
    Returns:
      a dict: `runs`, each with params, tokens, flops, its share of what is spent and
      the sd expected after it and those before it; sd and 95 % interval of N* before
      and after all; `alternatives` that cost the same; and `warnings`.
    Raises:
      UserError: a number out of its range, or a budget that pays for no run.
    """
    least, most = predict.LEAST_FLOPS, predict.MOST_FLOPS
    for name, value in (("target_flops", target_flops), ("budget_flops", budget_flops)):
        within = f"from {least:.3g} to {most:.3g} FLOPs"
        _demand(name, least <= value <= most, within, value)
    _demand("max_runs", max_runs >= 1, ">= 1", max_runs)
    _demand("top_share", 0 <= top_share <= 1, "from 0 to 1", top_share)
    _demand("params_factor", 1 <= params_factor < math.inf, ">= 1", params_factor)
    _demand("noise", noise is None or 0 < noise < math.inf, "> 0 and finite", noise)
    noise = information.run_noise(fit, noise)
    columns = predict.columns_of(law, columns)
    ensemble = information.Ensemble(draws, law, target_flops, columns)
    # The share of the largest compute may need larger models than there were.
    low, high = (float(end) for end in fit["range"]["params"])
    low, high = low / params_factor, high * params_factor
    if top_share:
        high = max(high, ensemble.centre(top_share * budget_flops))
    shortest = fit["range"]["tokens"][0] / params_factor
    params, tokens = _candidates(low, high, shortest, budget_flops)
    flops = 6 * params * tokens
    chosen, after = _greedy(
        ensemble.joint(params, tokens),
        flops,
        budget_flops,
        noise=noise,
        max_runs=max_runs,
        top_share=top_share,
    )
    spent = float(flops[chosen].sum())
    runs = [
        {
            "params": float(params[j]),
            "tokens": float(tokens[j]),
            "tokens_per_param": float(tokens[j] / params[j]),
            "flops": float(flops[j]),
            "share": float(flops[j] / spent),
            "sd_after": sd,
        }
        for j, sd in zip(chosen, after, strict=True)
    ]
    return {
        "target_flops": float(target_flops),
        "budget_flops": float(budget_flops),
        "spent_flops": spent,
        "noise": noise,
        "runs": runs,
        "sd_before": ensemble.sd,
        "sd_after": after[-1],
        "params_median": ensemble.median,
        "interval_before": ensemble.interval(ensemble.sd),
        "interval_after": ensemble.interval(after[-1]),
        "alternatives": _alternatives(ensemble, spent, noise, (low, high)),
        "warnings": ensemble.warnings,
    }


def lines(found: Mapping) -> list[str]:
    """Return what `suggest` found as lines of text."""
    made = [
        f"{len(found['runs'])} runs, {found['spent_flops']:.3g} of "
        f"{found['budget_flops']:.3g} FLOPs, for N* at {found['target_flops']:.3g}; "
        f"noise of ln loss {found['noise']:.2g}",
        "      params     tokens  tokens/param      FLOPs  share  sd of ln N* after",
    ]
    made += [
        f"  {r['params']:10.3g} {r['tokens']:10.3g} {r['tokens_per_param']:13.3g} "
        f"{r['flops']:10.3g} {r['share']:6.1%} {r['sd_after']:12.3f}"
        for r in found["runs"]
    ]
    for when in ("before", "after"):
        low, high = found[f"interval_{when}"]
        made.append(
            f"  {when:7} sd of ln N* {found[f'sd_{when}']:.3f}, "
            f"N* 95 % [{low:.3g}, {high:.3g}]"
        )
    made.append("  for the same FLOPs")
    for other in found["alternatives"]:
        sd = other["sd_after"]
        said = "not within the limits" if sd is None else f"sd of ln N* after {sd:.3f}"
        made.append(f"    {other['what']:52}{said}")
    return made + [f"  warning: {w}" for w in found["warnings"]]


def jsonl(found: Mapping) -> list[str]:
    """Return one JSON object a run, as a sweep takes them: params, tokens, replicate.

    Runs of the same place are numbered from 0, so that each has a seed of its own.
    """
    seen: dict[tuple, int] = {}
    made = []
    for run in found["runs"]:
        place = (run["params"], run["tokens"])
        seen[place] = seen.get(place, -1) + 1
        row = {"params": place[0], "tokens": place[1], "replicate": seen[place]}
        made.append(json.dumps(row))
    return made


def _candidates(low: float, high: float, shortest: float, budget: float):
    """Return params and tokens [n] of the runs that may be suggested.

    None is shorter than those fitted: what a law says of a few steps is not to be
    relied on, and would be the cheapest evidence.
    """
    sizes = np.geomspace(low, high, _NUM_SIZES)
    params = np.repeat(sizes, _NUM_RATIOS)
    tokens = params * np.tile(np.geomspace(*_RATIOS, _NUM_RATIOS), len(sizes))
    long = tokens >= shortest
    params, tokens = params[long], tokens[long]
    flops = 6 * params * tokens
    pays = flops <= budget
    if not pays.any():
        least = f", and the cheapest costs {flops.min():.3g}" if len(flops) else ""
        raise UserError(
            f"the budget must pay for a run; got {budget:.3g} FLOPs{least}. Raise it "
            "or params_factor."
        )
    return params[pays], tokens[pays]


def _greedy(joint, flops, budget, *, noise, max_runs, top_share):
    """Return the candidates in the order they are chosen, and the sd after each.

    The last row and column of `joint` are what is asked. The best is the one that takes
    most off its variance for its price.
    """
    joint, times, spent = joint.copy(), np.zeros(len(flops), int), 0.0
    chosen, after = [], []
    # First the share of the largest computes: what guards against a wrong law.
    kept = top_share * budget
    is_top = (flops <= kept) & (flops >= flops[flops <= kept].max(initial=0) / _TOP)
    while len(chosen) < max_runs:
        free = (times < _MAX_REPEATS) & (flops <= budget - spent)
        top = free & is_top & (flops <= kept - spent)
        free = top if top.any() else free
        if not free.any():
            break
        told = joint[-1, :-1] ** 2 / (np.diag(joint)[:-1] + noise**2)
        even = (budget - spent) / (max_runs - len(chosen))
        score = np.where(free, told / (flops + _RUN_CHARGE * even), -1.0)
        best = int(score.argmax())
        column = joint[:, best].copy()
        joint -= np.outer(column, column) / (column[best] + noise**2)
        times[best] += 1
        spent += flops[best]
        chosen.append(best)
        after.append(math.sqrt(max(joint[-1, -1], 0.0)))
    return chosen, after


def _alternatives(ensemble, spent, noise, ends) -> list[dict]:
    """Return what else the same compute could do, with the sd expected after it.

    A line of sizes keeps to the limits that the suggested runs have; its sd is None
    where that leaves it no width.
    """
    line = spent / _LINE_POINTS
    centre, biggest = ensemble.centre(line), np.array([ensemble.centre(spent)])
    low = max(centre / _LINE_SPAN, ends[0], math.sqrt(line / 6 / _RATIOS[1]))
    high = min(centre * _LINE_SPAN, ends[1], math.sqrt(line / 6 / _RATIOS[0]))
    made = {"what": f"an isoFLOP line: {_LINE_POINTS} runs of {line:.2g} FLOPs"}
    if high < 2 * low:
        made |= {"params": [], "tokens": [], "sd_after": None}
    else:
        sizes = np.geomspace(low, high, _LINE_POINTS)
        made |= _told(ensemble, sizes, line / 6 / sizes, noise)
    what = f"one run of {spent:.2g} FLOPs at its predicted optimum"
    one = _told(ensemble, biggest, spent / 6 / biggest, noise)
    return [made, {"what": what} | one]


def _told(ensemble, params: np.ndarray, tokens: np.ndarray, noise: float) -> dict:
    sd = ensemble.sd_after(params, tokens, noise)
    return {"params": params.tolist(), "tokens": tokens.tolist(), "sd_after": sd}


def _demand(name: str, holds: bool, demand: str, value: object) -> None:
    if not holds:
        raise UserError(f"{name} must be {demand}; got {value}.")
