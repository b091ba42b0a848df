"""Which runs to do next: those that best sharpen the optimum at a compute, per FLOP.

The draws of a fit are an ensemble: over them, what a run would show and what is asked,
ln N* at the target, vary together, and a linear-Gaussian update says how much knowing
the one narrows the other. This holds as far as the law does, and cheap extremes look
best where the law is trusted most: so a share of the budget goes to the largest compute
that it can pay, tokens per parameter stay in a range, and repeats are capped.
"""

import json
import math
from collections.abc import Mapping, Sequence

import numpy as np

from fm_jax.errors import UserError
from fm_jax.scaling import information

_NUM_SIZES = 17
_NUM_RATIOS = 9  # of tokens per parameter
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
    max_repeats: int = 2,
    tokens_per_param: tuple[float, float] = (5.0, 120.0),
    params_factor: float = 1.0,
    sizes: Sequence[float] = (),
    top_share: float = 0.25,
    run_charge: float = 0.1,
    noise: float | None = None,
    columns: Mapping[str, float] | None = None,
) -> dict:
    """Return runs worth `budget_flops` that most narrow ln N* at `target_flops`.

    Args:
      fit: the contents of fit.json; its range, residual_sd and delta are read.
      draws: [R, P] of the law's parameters.
      target_flops: the compute whose optimum is asked for.
      budget_flops: for all runs together, each costing 6 * params * tokens.
      max_runs, max_repeats: at most so many runs, and of one place.
      tokens_per_param: (least, most) of a run.
      params_factor: by how much sizes may leave the range of the fitted ones; upward
        they may in any case as far as the share of the largest compute goes.
      sizes: the params that can be had; without, a geometric grid of that range.
      top_share: of the budget, kept for the largest compute that it can pay for.
      run_charge: what a run costs beside its FLOPs, as a share of an even split of the
        budget that is left: 0 looks for the most per FLOP alone, and spends little.
      noise: sd of a run's ln loss; the fit's residual_sd if not given.
      columns: what else the law reads, the same for runs and target.
    Returns:
      a dict: `runs`, each with params, tokens, flops, its share of what is spent and
      the sd expected after it and those before it; sd and 95 % interval of N* before
      and after all; `alternatives` that cost the same; and `warnings`.
    Raises:
      UserError: a number out of its range, or a budget that pays for no run.
    """
    for name, value in (("target_flops", target_flops), ("budget_flops", budget_flops)):
        _demand(name, 0 < value < math.inf, "> 0 and finite", value)
    for name, value in (("max_runs", max_runs), ("max_repeats", max_repeats)):
        _demand(name, value >= 1, ">= 1", value)
    _demand("top_share", 0 <= top_share <= 1, "from 0 to 1", top_share)
    _demand("run_charge", run_charge >= 0, ">= 0", run_charge)
    _demand("params_factor", params_factor >= 1, ">= 1", params_factor)
    low, high = tokens_per_param
    _demand("tokens_per_param", 0 < low < high, "two rising numbers > 0", (low, high))
    _demand("noise", noise is None or 0 < noise < math.inf, "> 0 and finite", noise)
    noise = _noise(fit, noise)
    ensemble = information.Ensemble(draws, law, target_flops, columns)
    # The share of the largest compute may need larger models than there were.
    low, high = (float(end) for end in fit["range"]["params"])
    low, high = low / params_factor, high * params_factor
    if top_share:
        high = max(high, ensemble.centre(top_share * budget_flops))
    params, tokens = _candidates(sizes, (low, high), tokens_per_param, budget_flops)
    flops = 6 * params * tokens
    chosen, after = _greedy(
        ensemble.joint(params, tokens),
        flops,
        budget_flops,
        noise=noise,
        limits=(max_runs, max_repeats),
        top_share=top_share,
        run_charge=run_charge,
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
        "alternatives": _alternatives(
            ensemble, spent, noise, (low, high), tokens_per_param
        ),
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


def _candidates(sizes, ends, ratios, budget):
    """Return params and tokens [n] of the runs that may be suggested."""
    low, high = ends
    sizes = np.asarray(
        sizes if len(sizes) else np.geomspace(low, high, _NUM_SIZES), float
    )
    within = (sizes > low * 0.999) & (sizes < high * 1.001)
    if not within.any():
        raise UserError(
            f"sizes must be within {low:.3g} to {high:.3g} parameters; got "
            f"{', '.join(f'{n:.3g}' for n in sizes)}. Raise params_factor."
        )
    sizes = sizes[within]
    grid = np.geomspace(*ratios, _NUM_RATIOS)
    params = np.repeat(sizes, _NUM_RATIOS)
    tokens = params * np.tile(grid, len(sizes))
    flops = 6 * params * tokens
    pays = flops <= budget
    if not pays.any():
        raise UserError(
            f"the budget must pay for a run; got {budget:.3g} FLOPs, and the cheapest "
            f"costs {flops.min():.3g}. Raise it or params_factor."
        )
    return params[pays], tokens[pays]


def _greedy(joint, flops, budget, *, noise, limits, top_share, run_charge):
    """Return the candidates in the order they are chosen, and the sd after each.

    The last row and column of `joint` are what is asked. The best is the one that takes
    most off its variance for its price.
    """
    max_runs, max_repeats = limits
    joint, times, spent = joint.copy(), np.zeros(len(flops), int), 0.0
    chosen, after = [], []
    # First the share of the largest computes: what guards against a wrong law.
    kept = top_share * budget
    is_top = (flops <= kept) & (flops >= flops[flops <= kept].max(initial=0) / _TOP)
    while len(chosen) < max_runs:
        free = (times < max_repeats) & (flops <= budget - spent)
        top = free & is_top & (flops <= kept - spent)
        free = top if top.any() else free
        if not free.any():
            break
        told = joint[-1, :-1] ** 2 / (np.diag(joint)[:-1] + noise**2)
        even = (budget - spent) / (max_runs - len(chosen))
        score = np.where(free, told / (flops + run_charge * even), -1.0)
        best = int(score.argmax())
        column = joint[:, best].copy()
        joint -= np.outer(column, column) / (column[best] + noise**2)
        times[best] += 1
        spent += flops[best]
        chosen.append(best)
        after.append(math.sqrt(max(joint[-1, -1], 0.0)))
    return chosen, after


def _alternatives(ensemble, spent, noise, ends, ratios) -> list[dict]:
    """Return what else the same compute could do, with the sd expected after it.

    A line of sizes keeps to the limits that the suggested runs have; its sd is None
    where that leaves it no width.
    """
    line = spent / _LINE_POINTS
    centre, biggest = ensemble.centre(line), np.array([ensemble.centre(spent)])
    low = max(centre / _LINE_SPAN, ends[0], math.sqrt(line / 6 / ratios[1]))
    high = min(centre * _LINE_SPAN, ends[1], math.sqrt(line / 6 / ratios[0]))
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


def _noise(fit: Mapping, noise: float | None) -> float:
    """Return the sd of ln loss that a run is worth to a fit of this kind."""
    if noise is None:
        noise = fit["approach3"]["residual_sd"]
        if not noise:
            raise UserError(
                f"residual_sd of the fit must be > 0; got {noise}. Give the sd of a "
                "run's ln loss as --noise."
            )
    delta = fit["options"].get("delta")
    return noise * information.inflation(noise, math.inf if delta is None else delta)


def _demand(name: str, holds: bool, demand: str, value: object) -> None:
    if not holds:
        raise UserError(f"{name} must be {demand}; got {value}.")
