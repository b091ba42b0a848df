"""The isoFLOP fit (approach 2): each budget's best size, and a power law through them.

Rows of one budget C make a slice. A curve through its losses over ln N, and another
over ln D, has its lowest point at the best size and the best number of tokens; then
ln N* = k + a ln C, and the same of D* (Hoffmann et al., arXiv 2203.15556, approach 2).

A parabola through a skew valley is off its lowest point. About the optimum the third
derivative of E + A/N^alpha + B/D^beta over ln N at constant C is (beta - alpha) times
the second, so that a window from delta - W to delta + W about the true ln N* puts the
vertex (beta - alpha) (delta^2/2 - W^2/10) beside it. A constant part moves k alone; a
part that drifts with C moves the exponent (Czech et al., arXiv 2603.22339). Hence a
slice's flags `wide` and `off_centre`, and `bias`, which computes all of it for a law.
"""

import dataclasses

import numpy as np

from fm_jax import errors
from fm_jax.scaling import lines, resamples, valleys

METHODS = valleys.METHODS
BOOTSTRAPS = ("noise", "bayesian")
NO_DRAWS = "under the noise no two budgets keep a minimum inside"
TOLERANCE = 0.10  # of a row's FLOPs about its budget


@dataclasses.dataclass(frozen=True)
class Isoflop:
    """The fit: ln N* = line[0] + line[1] ln C and ln D* = line[2] + line[3] ln C.

    `draws` is [R, 4] like `line`; `optima` [R, S, 2] the ln N* and ln D* of the used
    slices in each, NaN where a draw's curve has no minimum inside the window; `noise`
    [S] the standard deviation of a loss in each, in nats; `excess` that of ln N* about
    the line beyond what the noise explains. `skipped` says why there is no line.
    """

    method: str
    slices: tuple[valleys.Slice, ...]
    line: np.ndarray | None
    draws: np.ndarray | None
    optima: np.ndarray | None
    weights: np.ndarray | None
    noise: np.ndarray | None
    excess: float
    num_rows_off: int
    num_draws_refused: int
    warnings: tuple[str, ...]
    skipped: str = ""

    def record(self, level: float = 0.95) -> dict:
        """Return what fit.json keeps of this fit."""
        slices = [dataclasses.asdict(s) for s in self.slices]
        for each in slices:
            each.update({k: list(v) for k, v in each.items() if isinstance(v, tuple)})
        rest = {
            "method": self.method,
            "slices": slices,
            "rows_off": self.num_rows_off,
            "warnings": list(self.warnings),
        }
        if self.skipped:
            return {"skipped": self.skipped, **rest}
        ci = resamples.interval(self.draws, level)
        return {
            "a": float(self.line[1]),
            "b": float(self.line[3]),
            "coefficient": float(np.exp(self.line[0])),
            "coefficient_tokens": float(np.exp(self.line[2])),
            "ci": {"a": ci[1].tolist(), "b": ci[3].tolist()},
            "se": {
                "a": float(self.draws[:, 1].std(ddof=1)),
                "b": float(self.draws[:, 3].std(ddof=1)),
            },
            "noise": self.noise.tolist(),
            "excess": self.excess,
            "draws": len(self.draws),
            "draws_refused": self.num_draws_refused,
            **rest,
        }


@dataclasses.dataclass(frozen=True)
class Bias:
    """What a method answers on noise-free points of a law, less the law's optimum.

    `params` and `tokens` are [S] differences in ln N* and ln D* at `budgets` [S], NaN
    where the method or the law has no minimum; `line` [4] is the error of the
    coefficients of a least-squares line through the others.
    """

    budgets: np.ndarray
    params: np.ndarray
    tokens: np.ndarray
    line: np.ndarray | None


def fit(
    columns: dict,
    loss,
    *,
    budget=None,
    cluster=None,
    method: str = "parabola",
    bootstrap: str = "noise",
    num_bootstraps: int = 1000,
    seed: int = 0,
    noise: float | None = None,
    weighted: bool = False,
    keep: tuple[str, ...] = (),
    tolerance: float = TOLERANCE,
) -> Isoflop:
    """Fit each slice's optimum, the lines through them, and their draws.

    `columns` holds `params`, `tokens` and, unless it is 6 N D, `flops`, each [n];
    `loss` is [n] in nats per token. `budget` [n] names each row's slice (NaN: none);
    without it the slices are found from the FLOPs (`assign`). `method` is `parabola`
    or `cubic` (loss over ln N by least squares), or `akima` (the lowest point of an
    Akima spline through ln loss, as in arXiv 2406.19146).

    Draws: `noise` adds normal noise to the losses and fits again, with a standard
    deviation given in nats or taken from the slices' residuals; `bayesian` weights the
    rows, or the clusters [n], exponentially (not for `akima`, which has no weights).
    Scatter of the optima beyond the noise is added to both kinds. `weighted` weights a
    slice by the inverse variance of its optimum. `keep` names flags of
    `valleys.UNUSABLE` despite which a slice is used, if its curve has a lowest point
    at all. Raises UserError for unknown names and values that have no logarithm.
    """
    if method not in METHODS:
        raise errors.unknown("approach 2's method", method, METHODS)
    if bootstrap not in BOOTSTRAPS:
        raise errors.unknown("approach 2's bootstrap", bootstrap, BOOTSTRAPS)
    if method == "akima" and bootstrap == "bayesian":
        raise errors.UserError(
            "approach 2's bootstrap must be noise for the method akima; got bayesian. "
            "A spline goes through every point whatever its weight: use noise, or "
            "the method parabola"
        )
    for flag in keep:
        if flag not in valleys.UNUSABLE:
            raise errors.unknown("a flag to keep", flag, valleys.UNUSABLE)
    params, tokens, flops, loss = _columns(columns, loss)
    index, budgets = assign(flops, budget=budget, tolerance=tolerance)
    axes = [np.log(params), np.log(tokens)]
    slices, rows = [], []
    for number, centre in enumerate(budgets):
        mine = np.flatnonzero(index == number)
        slices.append(
            valleys.cut(centre, [x[mine] for x in axes], loss[mine], method, keep)
        )
        rows.append(mine)
    num_off = int((index < 0).sum())
    warnings = _grouping_warnings(budget, budgets, index) + valleys.warnings(slices)
    kept = [k for k, each in enumerate(slices) if each.used]
    common = {"method": method, "slices": tuple(slices), "num_rows_off": num_off}
    if len(kept) < 2:
        why = f"{len(kept)} of {len(slices)} budgets have a usable optimum, 2 needed"
        return Isoflop(
            line=None, draws=None, optima=None, weights=None, noise=None, excess=0.0,
            num_draws_refused=0, warnings=tuple(warnings), skipped=why, **common,
        )  # fmt: skip
    log_c = np.log([slices[k].budget for k in kept])
    best = np.log(
        [[slices[k].params_optimum, slices[k].tokens_optimum] for k in kept]
    )  # [S, 2]
    used = [([x[rows[k]] for x in axes], loss[rows[k]]) for k in kept]
    sds = (
        valleys.noise(used, method)
        if noise is None
        else np.full(len(used), float(noise))
    )
    reach = valleys.FAR if "not_bracketed" in keep else 1.0
    if bootstrap == "noise":
        rng = np.random.default_rng(seed)
        optima = valleys.noisy_optima(used, method, sds, num_bootstraps, rng, reach)
    else:
        kind = "bayesian" if cluster is None else "bayesian_cluster"
        names = np.arange(len(loss)).astype(str) if cluster is None else cluster
        drawn = resamples.weights(kind, np.asarray(names), num_bootstraps, seed)
        optima = valleys.weighted_optima(
            used, method, [drawn[:, rows[k]] for k in kept], best, reach
        )
    excess = np.array(
        [lines.excess(log_c, best[:, i], optima[:, :, i]) for i in (0, 1)]
    )
    weights = np.ones(best.shape)
    if weighted:
        weights = lines.precision(lines.variance(optima) + excess**2)
    # The same slice has too much N* where it has too little D*: one draw for both.
    rng = np.random.default_rng((seed, 1))
    more = lines.scatter(optima.shape[:2], max(len(kept) - 2, 1), rng)
    optima = optima + more[:, :, None] * excess * [1, -1]
    draws, num_refused = lines.of_draws(log_c, optima, weights)
    line = lines.pair(log_c, best, weights)
    warnings += lines.warnings(line, log_c, len(kept), excess[0], optima, num_refused)
    if len(draws) < 2:
        common["skipped"] = NO_DRAWS
    return Isoflop(
        line=line, draws=draws, optima=optima, weights=weights, noise=sds,
        excess=float(excess[0]), num_draws_refused=num_refused,
        warnings=tuple(warnings), **common,
    )  # fmt: skip


def assign(flops, *, budget=None, tolerance: float = TOLERANCE):
    """Return each row's slice [n] (-1: none) and the slices' budgets [S], rising.

    A row belongs to a budget when its FLOPs are within `tolerance` of it. Planned
    budgets that were counted otherwise than `flops` are replaced by the median FLOPs
    of their rows. Without `budget`, the window of that width that holds most rows is
    taken first, then the next, until none holds enough for a fit.
    """
    flops = np.asarray(flops, float)
    index = np.full(len(flops), -1)
    if budget is not None:
        budget = np.asarray(budget, float)
        centres, groups = [], []
        for planned in np.unique(budget[np.isfinite(budget)]):
            mine = np.flatnonzero(budget == planned)
            middle = np.median(flops[mine])
            centre = planned if _near(middle, planned, tolerance) else middle
            mine = mine[_near(flops[mine], centre, tolerance)]
            if len(mine):
                centres.append(centre)
                groups.append(mine)
    else:
        centres, groups = _windows(flops, tolerance)
    order = np.argsort(centres)
    for number, k in enumerate(order):
        index[groups[k]] = number
    return index, np.array(centres, float)[order]


def bias(
    law,
    theta,
    params,
    flops,
    *,
    tokens=None,
    budget=None,
    method: str = "parabola",
    tolerance: float = TOLERANCE,
    extra: dict | None = None,
) -> Bias:
    """Return what approach 2 gets wrong on a law by its window alone.

    The rows' own `params` and `flops` [n] (and `tokens`, C/6N unless given) are the
    grid; their losses are the law's, `law.loss(theta, columns)`, without noise. The
    true optimum is found numerically at each budget, FLOPs per parameter and token
    being interpolated over ln N from the rows. `extra` holds further columns [n] of
    the law. Source: arXiv 2603.22339.
    """
    params, flops = np.asarray(params, float), np.asarray(flops, float)
    tokens = flops / (6 * params) if tokens is None else np.asarray(tokens, float)
    columns = {"params": params, "tokens": tokens, **(extra or {})}
    loss = np.asarray(law.loss(np.asarray(theta, float), columns), float)
    index, budgets = assign(flops, budget=budget, tolerance=tolerance)
    wrong = np.full((len(budgets), 2), np.nan)
    for k, centre in enumerate(budgets):
        mine = index == k
        axes = [np.log(params[mine]), np.log(tokens[mine])]
        one = valleys.cut(centre, axes, loss[mine], method)
        if one.params_optimum is None or one.tokens_optimum is None:
            continue
        if method == "akima" and "not_bracketed" in one.flags:
            continue
        rows = {name: column[mine] for name, column in columns.items()}
        truth = _law_optimum(law, theta, centre, rows, flops[mine])
        if truth is not None:
            wrong[k] = np.log([one.params_optimum, one.tokens_optimum]) - truth
    good = np.isfinite(wrong).all(1)
    line = None
    if good.sum() >= 2:
        line = lines.pair(np.log(budgets[good]), wrong[good], np.ones((good.sum(), 2)))
    return Bias(budgets=budgets, params=wrong[:, 0], tokens=wrong[:, 1], line=line)


def corrected(found: Isoflop, wrong: Bias) -> Isoflop:
    """Return the fit with each slice's optimum less its bias, lines and draws anew.

    Slices of which the bias is not known are left out. Raises ValueError when the
    bias is of other budgets than the fit.
    """
    if found.skipped:
        return found
    if not np.array_equal(wrong.budgets, [s.budget for s in found.slices]):
        raise ValueError("the bias must be of the fit's own slices; got other budgets")
    shift = np.stack([wrong.params, wrong.tokens], 1)
    known = np.isfinite(shift).all(1)
    slices, kept, used = [], [], [k for k, s in enumerate(found.slices) if s.used]
    for k, one in enumerate(found.slices):
        if one.used and known[k]:
            kept.append(k)
            one = dataclasses.replace(  # noqa: PLW2901
                one,
                params_optimum=float(one.params_optimum / np.exp(shift[k, 0])),
                tokens_optimum=float(one.tokens_optimum / np.exp(shift[k, 1])),
            )
        elif one.used:
            flags = (*one.flags, "bias_unknown")
            one = dataclasses.replace(one, flags=flags, used=False)  # noqa: PLW2901
        slices.append(one)
    if len(kept) < 2:
        why = f"the bias is known of {len(kept)} used slices, 2 needed"
        return dataclasses.replace(found, slices=tuple(slices), skipped=why)
    at = [used.index(k) for k in kept]
    log_c = np.log([slices[k].budget for k in kept])
    best = np.log([[slices[k].params_optimum, slices[k].tokens_optimum] for k in kept])
    weights, optima = found.weights[at], found.optima[:, at] - shift[kept]
    draws, num_refused = lines.of_draws(log_c, optima, weights)
    return dataclasses.replace(
        found, slices=tuple(slices), line=lines.pair(log_c, best, weights),
        draws=draws, optima=optima, weights=weights, noise=found.noise[at],
        num_draws_refused=num_refused,
        skipped="" if len(draws) > 1 else NO_DRAWS,
    )  # fmt: skip


def _columns(columns: dict, loss) -> list[np.ndarray]:
    """Return params, tokens, flops and loss as float64, all positive and finite."""
    params, tokens = (np.asarray(columns[k], float) for k in ("params", "tokens"))
    flops = columns.get("flops")
    flops = 6 * params * tokens if flops is None else np.asarray(flops, float)
    found = {"params": params, "tokens": tokens, "flops": flops}
    found["loss"] = np.asarray(loss, float)
    for name, column in found.items():
        bad = ~(np.isfinite(column) & (column > 0))
        if bad.any():
            raise errors.UserError(
                f"{name} must be positive and finite in each row; got "
                f"{column[bad][0]:g} in row {np.flatnonzero(bad)[0]}. Exclude the row"
            )
    return list(found.values())


def _near(flops, budget: float, tolerance: float):
    """Say which FLOPs are within a tolerance of a budget, its edge included."""
    return np.abs(flops / budget - 1) <= tolerance + 1e-9


def _windows(flops: np.ndarray, tolerance: float) -> tuple[list, list]:
    """Return centres and rows of the fullest windows with enough rows for a fit."""
    free = np.argsort(flops, kind="stable")
    ratio = (1 + tolerance) / (1 - tolerance) * (1 + 1e-9)
    centres, groups = [], []
    while len(free) >= valleys.MIN_SIZES:
        c = flops[free]
        ends = np.searchsorted(c, c * ratio, side="right")
        count = ends - np.arange(len(c))
        start = np.lexsort((c[ends - 1] / c, -count))[0]  # the narrowest of the fullest
        if count[start] < valleys.MIN_SIZES:
            break
        centre = np.median(c[start : ends[start]])
        inside = _near(c, centre, tolerance)
        if inside.sum() >= valleys.MIN_SIZES:
            centres.append(centre)
            groups.append(free[inside])
        free = free[~inside]
    return centres, groups


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


def _grouping_warnings(budget, budgets, index) -> list[str]:
    """Return sentences on how rows were sorted into budgets."""
    found, off = [], int((index < 0).sum())
    if off:
        found.append(f"{off} of {len(index)} rows stand at no budget and are left out.")
    if budget is None:
        found.append(
            f"The budgets were found from the FLOPs: {len(budgets)} windows with "
            f"{len(index) - off} of {len(index)} rows."
        )
        return found
    planned = np.unique(np.asarray(budget, float)[np.isfinite(budget)])
    moved = sum(c not in planned for c in budgets)
    if moved:
        found.append(
            f"{moved} of {len(budgets)} planned budgets are not the FLOPs of their "
            "rows under this count: the rows' median FLOPs are used instead."
        )
    return found
