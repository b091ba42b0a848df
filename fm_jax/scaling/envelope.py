"""The envelope fit (approach 1): the best run at each compute, read off loss curves.

Every curve is interpolated in the logarithm of its tokens; at many FLOPs C the run of
least loss gives N* and D*, and ln N* = k + a ln C goes through them (Hoffmann et al.,
arXiv 2203.15556, approach 1). A loss counts only where a run could have stopped: where
its schedule ended, or anywhere on a curve of constant rate. The envelope is a
staircase over the sizes that were trained, so it is no finer than these.
"""

import dataclasses

import numpy as np

from fm_jax import errors
from fm_jax.scaling import lines, resamples

NUM_FLOPS = 1500  # as arXiv 2203.15556 has it
MIN_SIZES = 3  # different sizes on an envelope that has a slope
FEW_SIZES = 10  # below it the staircase is named in a warning
# What of the range of ln C is fitted again, to show how far the exponent depends on it.
PARTS = {"lower two thirds": (0, 2 / 3), "upper two thirds": (1 / 3, 1),
         "middle third": (1 / 3, 2 / 3)}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Envelope:
    """The fit: ln N* = line[0] + line[1] ln C and ln D* = line[2] + line[3] ln C.

    `draws` is [R, 4] like `line`, of resampled clusters or, where all are one, of
    curves (`bootstrap`: `cluster` or `curve`). `flops`, `params`, `tokens`, `loss` [G]
    are the envelope itself, `num_sizes` the different sizes on it, `edge_fraction` the
    share of it where the smallest or the largest size at hand is best, so that a better
    one may be missing. `skipped` says why there is no line, else "".
    """

    num_curves: int
    warnings: tuple[str, ...]
    flops: np.ndarray | None = None
    params: np.ndarray | None = None
    tokens: np.ndarray | None = None
    loss: np.ndarray | None = None
    num_sizes: int = 0
    edge_fraction: float = 0.0
    line: np.ndarray | None = None
    draws: np.ndarray | None = None
    bootstrap: str = ""
    num_draws_refused: int = 0
    parts: tuple[dict, ...] = ()
    skipped: str = ""

    def record(self) -> dict:
        """Return what fit.json keeps of this fit."""
        rest = {"num_sizes": self.num_sizes, "num_curves": self.num_curves,
                "warnings": list(self.warnings)}  # fmt: skip
        if self.skipped:
            return {"skipped": self.skipped, **rest}
        ci = resamples.interval(self.draws)
        return {
            "a": float(self.line[1]),
            "b": float(self.line[3]),
            "coefficient": float(np.exp(self.line[0])),
            "coefficient_tokens": float(np.exp(self.line[2])),
            "ci": {"a": ci[1].tolist(), "b": ci[3].tolist()},
            "flops": [float(self.flops[0]), float(self.flops[-1])],
            "edge_fraction": self.edge_fraction,
            "parts": list(self.parts),
            "bootstrap": self.bootstrap,
            "draws": len(self.draws),
            "draws_refused": self.num_draws_refused,
            **rest,
        }


def fit(points, *, num_bootstraps: int = 1000, seed: int = 0) -> Envelope:
    """Fit the lines through the envelope of a table's curves, and their draws.

    `points` is a `table.Points`, read with its curves. Taken are the rows where a
    schedule ended and every row of a run that ended at its peak rate. A run's rows are
    a curve; rows of different runs are one if they share their cluster (a trunk) and
    their size. C at which one size is alone do not count. A draw is the same fit to
    resampled curves; one without an envelope of MIN_SIZES sizes is refused. Raises
    UserError for a curve whose size changes.
    """
    taken, warnings = _taken(points)
    curves, clusters = _curves(points, taken)
    found = Envelope(num_curves=len(curves), warnings=tuple(warnings))
    if max((len(x) for x, *_ in curves), default=0) < 2:
        why = "no curve has two points at which its run could have stopped"
        return dataclasses.replace(found, skipped=why)
    ends = min(c[0][0] for c in curves), max(c[0][-1] for c in curves)
    log_c = np.linspace(*ends, NUM_FLOPS)
    sizes = np.array([c[3] for c in curves])
    loss, tokens = _on_grid(curves, log_c)  # [curves, G]
    at, best, is_edge = _compared(loss, sizes)
    if not len(at):
        why = "at no FLOPs are there two sizes to compare"
        return dataclasses.replace(found, skipped=why)
    steps = log_c[at], sizes[best], tokens[best, at]
    flops, size, seen = np.exp(steps)
    found = dataclasses.replace(
        found, flops=flops, params=size, tokens=seen, loss=np.exp(loss[best, at]),
        num_sizes=len(np.unique(size)), edge_fraction=float(is_edge.mean()),
    )  # fmt: skip
    if found.num_sizes < MIN_SIZES:
        why = f"the envelope has {found.num_sizes} sizes, {MIN_SIZES} needed"
        return dataclasses.replace(found, skipped=why)
    kind = "cluster" if len(set(clusters)) > 1 else "curve"
    if kind == "curve":
        clusters = np.arange(len(curves))
        warnings.append("All curves are one cluster: each is resampled by itself.")
    present = resamples.weights("cluster", clusters, num_bootstraps, seed) > 0
    draws = _draws(log_c, loss, tokens, sizes, present)
    num_refused = num_bootstraps - len(draws)
    if len(draws) < max(2, num_bootstraps / 2):
        why = (f"too few curves to resample: {num_refused} of {num_bootstraps} draws "
               f"have no envelope of {MIN_SIZES} sizes")  # fmt: skip
        return dataclasses.replace(found, skipped=why)
    line, parts = _line(*steps), _parts(*steps)
    warnings += _line_warnings(found, line[1], parts)
    if num_refused > 0.05 * num_bootstraps:
        warnings.append(
            f"{num_refused / num_bootstraps:.1%} of the draws have no envelope of "
            f"{MIN_SIZES} sizes; the intervals are of the rest."
        )
    return dataclasses.replace(
        found, line=line, draws=draws, bootstrap=kind, num_draws_refused=num_refused,
        parts=parts, warnings=tuple(warnings),
    )  # fmt: skip


def _taken(points) -> tuple[np.ndarray, list[str]]:
    """Return which rows take part [n], and what to say of that."""
    final = np.asarray(points.is_final, bool)
    _, which = np.unique(points.run, return_inverse=True)
    ends = np.bincount(which, final)
    if (ends > 1).any():  # a schedule ends once: the table does not say where
        return np.ones(len(final), bool), [
            f"The table does not say where schedules ended: {int((ends > 1).sum())} "
            "runs have several rows, which count only if their rate was constant; "
            "under a decaying schedule the loss before its end is too high."
        ]
    taken = final.copy()
    rate, peak = (
        np.asarray(points.extra.get(name, np.full(len(final), np.nan)), float)
        for name in ("learning_rate_now", "learning_rate")
    )
    at_peak = np.isclose(rate, peak, rtol=1e-6, atol=0)
    constant = np.bincount(which, final & at_peak) > 0
    taken |= constant[which] & at_peak
    left = int((~taken).sum())
    said = f"{left} of {len(taken)} rows are from before the end of a schedule"
    return taken, [said + " and take no part in approach 1."] if left else []


def _curves(points, taken) -> tuple[list, list[str]]:
    """Return curves (ln C [m], ln loss [m], ln D [m], ln N) and the cluster of each.

    The curves rise in size.
    """
    runs, which, counts = np.unique(
        np.asarray(points.run)[taken], return_inverse=True, return_counts=True
    )
    cluster = np.asarray(points.cluster)[taken]
    params, flops, loss, tokens = (
        np.asarray(x, float)[taken]
        for x in (points.params, points.flops, points.loss, points.tokens)
    )
    keys: dict[tuple, list[int]] = {}
    for row in range(len(params)):
        alone = counts[which[row]] == 1
        key = (
            ("", cluster[row], params[row]) if alone else ("run", runs[which[row]], 0.0)
        )
        keys.setdefault(key, []).append(row)
    curves, clusters = [], []
    for (_, name, _), mine in sorted(keys.items(), key=lambda k: params[k[1][0]]):
        if np.ptp(params[mine]):
            raise errors.UserError(
                f"a curve's params must be one number; got {params[mine].min():g} to "
                f"{params[mine].max():g} in run {name}. Name the runs apart"
            )
        rows = np.array(mine)
        # At the same C the envelope has the better one, as everywhere.
        rows = rows[np.lexsort((loss[rows], flops[rows]))]
        rows = rows[np.diff(flops[rows], prepend=0) > 0]
        curve = np.log(flops[rows]), np.log(loss[rows]), np.log(tokens[rows])
        curves.append((*curve, float(np.log(params[mine[0]]))))
        clusters.append(str(cluster[mine[0]]))
    return curves, clusters


def _on_grid(curves: list, log_c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return ln loss and ln D [curves, G], infinite where a curve is not.

    A curve of one point stands at the grid point nearest to it alone.
    """
    loss = np.full((len(curves), len(log_c)), np.inf)
    tokens = np.full(loss.shape, np.nan)
    for k, (x, y, d, _) in enumerate(curves):
        if len(x) == 1:
            near = int(np.abs(log_c - x[0]).argmin())
            if abs(log_c[near] - x[0]) <= (log_c[1] - log_c[0]) / 2 + 1e-9:
                loss[k, near], tokens[k, near] = y[0], d[0]
            continue
        inside = (log_c >= x[0] - 1e-9) & (log_c <= x[-1] + 1e-9)
        loss[k, inside] = np.interp(log_c[inside], x, y)
        tokens[k, inside] = np.interp(log_c[inside], x, d)
    return loss, tokens


def _compared(loss, sizes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the C [K] at which two sizes compare, and the best curve [K] at each.

    Also whether its size is the smallest or the largest there, [K]. Curves must rise
    in size.
    """
    alive = np.isfinite(loss)
    low = sizes[alive.argmax(0)]
    high = sizes[len(sizes) - 1 - alive[::-1].argmax(0)]
    at = np.flatnonzero(alive.any(0) & (high > low))
    best = loss[:, at].argmin(0)
    return at, best, (sizes[best] == low[at]) | (sizes[best] == high[at])


def _line(log_c, log_params, log_tokens) -> np.ndarray:
    """Return [4]: the coefficients of ln N*, then of ln D*, on ln C."""
    return lines.pair(log_c, np.stack([log_params, log_tokens], -1))


def _draws(log_c, loss, tokens, sizes, present) -> np.ndarray:
    """Return lines [R', 4] of the curves present [R, curves], where they have one."""
    draws = [np.empty((0, 4))]
    for here in map(np.flatnonzero, present):
        at, best, _ = _compared(loss[here], sizes[here])
        best = here[best]
        if len(np.unique(sizes[best])) >= MIN_SIZES:
            draws.append(_line(log_c[at], sizes[best], tokens[best, at])[None])
    return np.concatenate(draws)


def _parts(log_c, log_params, log_tokens) -> tuple[dict, ...]:
    """Return the exponent and the number of sizes of parts of the range."""
    found = []
    for name, (start, end) in PARTS.items():
        low, high = (log_c[0] + share * np.ptp(log_c) for share in (start, end))
        mine = (log_c >= low) & (log_c <= high)
        if mine.sum() < 2:
            continue
        line = _line(log_c[mine], log_params[mine], log_tokens[mine])
        found.append({
            "part": name, "flops": [float(np.exp(low)), float(np.exp(high))],
            "a": float(line[1]), "num_sizes": len(np.unique(log_params[mine])),
        })  # fmt: skip
    return tuple(found)


def _line_warnings(found: Envelope, a: float, parts) -> list[str]:
    """Return sentences on how far the line can be trusted."""
    said = []
    if found.num_sizes < FEW_SIZES:
        said.append(f"The envelope has only {found.num_sizes} different sizes.")
    if found.edge_fraction > 0.5:
        said.append(
            f"On {found.edge_fraction:.0%} of the envelope the best run is the "
            "smallest or the largest there is: a better size may be missing."
        )
    exponents = [part["a"] for part in parts]
    if exponents and max(abs(x - a) for x in exponents) > 0.05:
        listed = ", ".join(f"{p['part']} {p['a']:.3f}" for p in parts)
        said.append(f"Approach 1's exponent depends on the range of C: {listed}.")
    return said
