"""What an isoFLOP fit gets wrong by its window alone, on points of a known law.

A parabola through a skew valley is off its lowest point. About the optimum the third
derivative of E + A/N^alpha + B/D^beta over ln N at constant C is (beta - alpha) times
the second, so that a window from delta - W to delta + W about the true ln N* puts the
vertex (beta - alpha) (delta^2/2 - W^2/10) beside it. A constant part moves k alone; a
part that drifts with C moves the exponent (Czech et al., arXiv 2603.22339). Hence a
slice's flags `wide` and `off_centre`; here all of it is computed.
"""

import dataclasses

import numpy as np

from fm_jax.scaling import lines, slices, valleys


def of(found: slices.Isoflop, law, theta, columns: dict) -> np.ndarray:
    """Return ln N* and ln D* [S, 2] of the fit's method less those of the law.

    The method sees the fit's own rows with the losses `law.loss(theta, columns)`; the
    law's optimum is found numerically at each budget, FLOPs per parameter and token
    being interpolated over ln N. `columns` holds the fit's `params`, `tokens`, `flops`
    and what else the law reads, each [n]. NaN where either has no minimum.
    """
    columns = {name: np.asarray(column, float) for name, column in columns.items()}
    flops = columns.pop("flops")
    loss = np.asarray(law.loss(np.asarray(theta, float), columns), float)
    wrong = np.full((len(found.slices), 2), np.nan)
    for k, one in enumerate(found.slices):
        mine = found.index == k
        rows = {name: column[mine] for name, column in columns.items()}
        axes = [np.log(rows[name]) for name in ("params", "tokens")]
        seen = valleys.cut(one.budget, axes, loss[mine], found.method)
        if seen.params_optimum is None or seen.tokens_optimum is None:
            continue
        if found.method == "akima" and "not_bracketed" in seen.flags:
            continue
        truth = _law_optimum(law, theta, one.budget, rows, flops[mine])
        if truth is not None:
            wrong[k] = np.log([seen.params_optimum, seen.tokens_optimum]) - truth
    return wrong


def corrected(found: slices.Isoflop, wrong) -> slices.Isoflop:
    """Return the fit with its slices' optima less their bias [S, 2], and lines anew.

    Slices of which the bias is not known are left out.
    """
    if found.skipped:
        return found
    shift = wrong[[one.used for one in found.slices]]
    known = np.isfinite(shift).all(1)
    moved = [_moved(*pair) for pair in zip(found.slices, wrong, strict=True)]
    found = dataclasses.replace(found, slices=tuple(moved))
    if known.sum() < 2:
        why = f"the bias is known of {known.sum()} used slices, 2 needed"
        return dataclasses.replace(found, skipped=why)
    log_c, best = slices.optima(moved)
    optima = found.optima[:, known] - shift[known]
    draws, num_refused = lines.of_draws(log_c, optima)
    return dataclasses.replace(
        found, line=lines.pair(log_c, best), draws=draws, optima=optima,
        noise=found.noise[known], num_draws_refused=num_refused,
        skipped="" if len(draws) > 1 else slices.NO_DRAWS,
    )  # fmt: skip


def _moved(one: valleys.Slice, shift) -> valleys.Slice:
    """Return a slice less its bias [2], or not used where that is not known."""
    if not one.used:
        return one
    if not np.isfinite(shift).all():
        flags = (*one.flags, "bias_unknown")
        return dataclasses.replace(one, flags=flags, used=False)
    params, tokens = map(float, np.exp(-shift))
    return dataclasses.replace(
        one,
        params_optimum=one.params_optimum * params,
        tokens_optimum=one.tokens_optimum * tokens,
    )


def _law_optimum(law, theta, budget: float, columns: dict, flops) -> np.ndarray | None:
    """Return ln N* and ln D* of a law at a budget, numerically, to about 1e-9.

    None where no size within 1e4 times those of the slice is best.
    """
    order = np.argsort(columns["params"])
    sizes = np.log(columns["params"][order])
    price = np.log(flops / (columns["params"] * columns["tokens"]))[order]
    others = {
        name: np.median(column)
        for name, column in columns.items()
        if name not in ("params", "tokens")
    }

    def log_tokens(x):
        return np.log(budget) - x - np.interp(x, sizes, price)

    def height(x):
        rows = {"params": np.exp(x), "tokens": np.exp(log_tokens(x))}
        rows |= {name: np.full(len(x), value) for name, value in others.items()}
        return np.asarray(law.loss(np.asarray(theta, float), rows), float)

    low, high = sizes[0] - np.log(1e4), sizes[-1] + np.log(1e4)
    for turn in range(4):
        grid = np.linspace(low, high, 81)
        k = int(np.argmin(height(grid)))
        if turn == 0 and k in (0, 80):
            return None
        low, high = grid[max(k - 1, 0)], grid[min(k + 1, 80)]
    x, step = grid[k], 0.02
    for _ in range(4):  # Newton on five-point differences: far finer than any argmin
        f = height(x + step * np.arange(-2, 3))
        first = (f[0] - 8 * f[1] + 8 * f[3] - f[4]) / (12 * step)
        bend = (-f[0] + 16 * f[1] - 30 * f[2] + 16 * f[3] - f[4]) / (12 * step**2)
        if not bend > 0:
            break
        x -= np.clip(first / bend, -step, step)
    return np.array([x, log_tokens(np.array([x]))[0]])
