"""The isoFLOP fit (approach 2): each budget's best size, and a power law through them.

Rows of one budget C make a slice. A curve through its losses over ln N, and another
over ln D, has its lowest point at the best size and the best number of tokens; then
ln N* = k + a ln C, and the same of D* (Hoffmann et al., arXiv 2203.15556, approach 2).
How far a curve is off the true optimum, bias.py tells.
"""

import dataclasses

import numpy as np

from fm_jax.scaling import lines, resamples, valleys

METHODS = valleys.METHODS
NO_DRAWS = "under the noise no two budgets keep a minimum inside"
TOLERANCE = 0.10  # of a row's FLOPs about its budget


@dataclasses.dataclass(frozen=True)
class Isoflop:
    """The fit: ln N* = line[0] + line[1] ln C and ln D* = line[2] + line[3] ln C.

    `index` [n] is each row's slice, -1 where it has none. `draws` is [R, 4] like
    `line`; `optima` [R, S, 2] the ln N* and ln D* of the used slices in each, NaN where
    a draw's curve has no minimum inside the window; `noise` [S] the standard deviation
    of a loss in each, in nats; `correlation` that of the noise of rows that share a
    cluster; `excess` the standard deviation of ln N* about the line beyond the noise.
    `skipped` says why there is no line.
    """

    method: str
    slices: tuple[valleys.Slice, ...]
    index: np.ndarray
    warnings: tuple[str, ...]
    line: np.ndarray | None = None
    draws: np.ndarray | None = None
    optima: np.ndarray | None = None
    noise: np.ndarray | None = None
    correlation: float = 0.0
    excess: float = 0.0
    num_draws_refused: int = 0
    skipped: str = ""

    def record(self) -> dict:
        """Return what fit.json keeps of this fit."""
        rest = {
            "method": self.method,
            "slices": [dataclasses.asdict(s) for s in self.slices],
            "rows_off": int((self.index < 0).sum()),
            "warnings": list(self.warnings),
        }
        if self.skipped:
            return {"skipped": self.skipped, **rest}
        ci = resamples.interval(self.draws)
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
            "bootstrap": "cluster noise" if self.correlation else "noise",
            "correlation": self.correlation,
            "draws": len(self.draws),
            "draws_refused": self.num_draws_refused,
            **rest,
        }


def fit(
    columns: dict,
    loss,
    *,
    budget=None,
    cluster=None,
    method: str = "parabola",
    num_bootstraps: int = 1000,
    seed: int = 0,
) -> Isoflop:
    """Fit each slice's optimum, the lines through them, and their draws.

    `columns` holds `params`, `tokens` and `flops`, each [n] and above 0; `loss` is [n]
    in nats per token. `budget` [n] names each row's slice (NaN: none); without it the
    slices are found from the FLOPs (`assign`). `method` is `parabola` or `cubic` (loss
    over ln N by least squares), or `akima` (the lowest point of an Akima spline through
    ln loss, as in arXiv 2406.19146).

    Draws add normal noise to the losses, of the size of the slices' residuals, and fit
    again. Rows of one `cluster` [n] share as much of it as their residuals do from
    slice to slice. Scatter of the optima about their line beyond that is added.
    """
    logs = [np.log(np.asarray(columns[name], float)) for name in ("params", "tokens")]
    loss = np.asarray(loss, float)
    index, budgets = assign(columns["flops"], budget=budget)
    rows = [np.flatnonzero(index == number) for number in range(len(budgets))]
    runs = [([x[mine] for x in logs], loss[mine]) for mine in rows]
    slices = tuple(
        valleys.cut(centre, *run, method)
        for centre, run in zip(budgets, runs, strict=True)
    )
    warnings = _grouping_warnings(budget, budgets, index) + valleys.warnings(slices)
    found = Isoflop(method, slices, index, tuple(warnings))
    kept = [k for k, each in enumerate(slices) if each.used]
    if len(kept) < 2:
        why = f"{len(kept)} of {len(slices)} budgets have a usable optimum, 2 needed"
        return dataclasses.replace(found, skipped=why)
    rows, runs = [rows[k] for k in kept], [runs[k] for k in kept]
    log_c, best = optima(slices)
    names = np.arange(len(loss)) if cluster is None else np.asarray(cluster)
    labels, member = np.unique(names, return_inverse=True)
    names = [member[mine] for mine in rows]
    sds, correlation = valleys.noise(
        runs, method, names if len(labels) < len(loss) else None
    )
    rng = np.random.default_rng(seed)
    freedom = min(map(len, rows)) - valleys.MIN_COEFFICIENTS[method]
    shared = lines.scatter((num_bootstraps, len(labels)), freedom, rng)
    noise = [
        sd * (np.sqrt(correlation) * shared[:, mine] + np.sqrt(1 - correlation)
              * rng.standard_normal((num_bootstraps, len(mine))))
        for sd, mine in zip(sds, names, strict=True)
    ]  # fmt: skip
    drawn = valleys.noisy_optima(runs, method, noise)
    excess = np.array([lines.excess(log_c, best[:, i], drawn[..., i]) for i in (0, 1)])
    # The same slice has too much N* where it has too little D*: one draw for both.
    rng = np.random.default_rng((seed, 1))
    more = lines.scatter(drawn.shape[:2], max(len(kept) - 2, 1), rng)
    drawn = drawn + more[:, :, None] * excess * [1, -1]
    draws, num_refused = lines.of_draws(log_c, drawn)
    line = lines.pair(log_c, best)
    warnings += lines.warnings(line, log_c, len(kept), excess[0], drawn, num_refused)
    return dataclasses.replace(
        found, warnings=tuple(warnings), line=line, draws=draws, optima=drawn,
        noise=sds, correlation=correlation, excess=float(excess[0]),
        num_draws_refused=num_refused, skipped="" if len(draws) > 1 else NO_DRAWS,
    )  # fmt: skip


def optima(slices) -> tuple[np.ndarray, np.ndarray]:
    """Return ln C [S] of the used slices, and their ln N* and ln D* [S, 2]."""
    used = [one for one in slices if one.used]
    best = [[one.params_optimum, one.tokens_optimum] for one in used]
    return np.log([one.budget for one in used]), np.log(best)


def assign(flops, *, budget=None) -> tuple[np.ndarray, np.ndarray]:
    """Return each row's slice [n] (-1: none) and the slices' budgets [S], rising.

    A row belongs to a budget when its FLOPs are within TOLERANCE of it. Planned
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
            centre = planned if _near(middle, planned) else middle
            mine = mine[_near(flops[mine], centre)]
            if len(mine):
                centres.append(centre)
                groups.append(mine)
    else:
        centres, groups = _windows(flops)
    order = np.argsort(centres)
    for number, k in enumerate(order):
        index[groups[k]] = number
    return index, np.array(centres, float)[order]


def _near(flops, budget: float):
    """Say which FLOPs are within TOLERANCE of a budget, its edge included."""
    return np.abs(flops / budget - 1) <= TOLERANCE + 1e-9


def _windows(flops: np.ndarray) -> tuple[list, list]:
    """Return centres and rows of the fullest windows with enough rows for a fit."""
    free = np.argsort(flops, kind="stable")
    ratio = (1 + TOLERANCE) / (1 - TOLERANCE) * (1 + 1e-9)
    centres, groups = [], []
    while len(free) >= valleys.MIN_SIZES:
        c = flops[free]
        ends = np.searchsorted(c, c * ratio, side="right")
        count = ends - np.arange(len(c))
        start = np.lexsort((c[ends - 1] / c, -count))[0]  # the narrowest of the fullest
        if count[start] < valleys.MIN_SIZES:
            break
        centre = np.median(c[start : ends[start]])
        inside = _near(c, centre)
        if inside.sum() >= valleys.MIN_SIZES:
            centres.append(centre)
            groups.append(free[inside])
        free = free[~inside]
    return centres, groups


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
