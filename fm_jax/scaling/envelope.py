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
NUM_RANKED = 16  # a draw without the best 16 runs at some C has no envelope there
# What of the range of ln C is fitted again, to show how far the exponent depends on it.
PARTS = {"lower two thirds": (0, 2 / 3), "upper two thirds": (1 / 3, 1),
         "middle third": (1 / 3, 2 / 3)}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Envelope:
    """The fit: ln N* = line[0] + line[1] ln C and ln D* = line[2] + line[3] ln C.

    `draws` is [R, 4] like `line`. `flops`, `params`, `tokens`, `loss` [G] are the
    envelope itself; `edge_fraction` the share of it where the smallest or the largest
    size at hand is best, so that a better one may be missing. `skipped` says why there
    is no line, else "".
    """

    line: np.ndarray | None
    draws: np.ndarray | None
    flops: np.ndarray
    params: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray
    num_curves: int
    edge_fraction: float
    parts: tuple[dict, ...]
    warnings: tuple[str, ...]
    skipped: str = ""

    @property
    def num_sizes(self) -> int:
        """Count the different sizes on the envelope."""
        return len(np.unique(self.params))

    def record(self, level: float = 0.95) -> dict:
        """Return what fit.json keeps of this fit."""
        rest = {"num_sizes": self.num_sizes, "num_curves": self.num_curves,
                "warnings": list(self.warnings)}  # fmt: skip
        if self.skipped:
            return {"skipped": self.skipped, **rest}
        ci = resamples.interval(self.draws, level)
        return {
            "a": float(self.line[1]),
            "b": float(self.line[3]),
            "coefficient": float(np.exp(self.line[0])),
            "coefficient_tokens": float(np.exp(self.line[2])),
            "ci": {"a": ci[1].tolist(), "b": ci[3].tolist()},
            "flops": [float(self.flops[0]), float(self.flops[-1])],
            "edge_fraction": self.edge_fraction,
            "parts": list(self.parts),
            "draws": len(self.draws),
            **rest,
        }


def fit(
    points,
    *,
    flops: tuple[float, float] | None = None,
    num_flops: int = NUM_FLOPS,
    num_sizes: int = 2,
    whole_curves: bool = False,
    num_bootstraps: int = 1000,
    seed: int = 0,
) -> Envelope:
    """Fit the lines through the envelope of a table's curves, and their draws.

    `points` is a `table.Points`, read with its curves. Taken are the rows where a
    schedule ended and every row of a run that ended at its peak rate; `whole_curves`
    takes all. A run's rows are a curve; rows of different runs are one if they share
    their cluster (a trunk) and their size. `flops` bounds the range, which else is all
    there is; C at which fewer than `num_sizes` (1 or 2) can be compared do not count.
    Draws resample the clusters. Raises UserError for a range that is none and for a
    curve whose size changes.
    """
    if flops is not None and not 0 < flops[0] < flops[1]:
        raise errors.UserError(
            f"the range of FLOPs must rise from above 0; got {flops[0]:g} to "
            f"{flops[1]:g}. Give the smaller first"
        )
    taken, warnings = _taken(points, whole_curves)
    curves, clusters = _curves(points, taken)
    many = [x for x in curves if len(x[0]) > 1]
    if not many:
        return _skipped("no curve has two points at which its run could have stopped",
                        len(curves), warnings)  # fmt: skip
    low, high = (
        np.log(flops)
        if flops is not None
        else (min(c[0][0] for c in curves), max(c[0][-1] for c in curves))
    )
    log_c = np.linspace(low, high, num_flops)
    sizes = np.array([c[3] for c in curves])
    loss, tokens = _on_grid(curves, log_c)  # [curves, G]
    alive = np.isfinite(loss)
    smallest = np.where(alive, sizes[:, None], np.inf).min(0)
    largest = np.where(alive, sizes[:, None], -np.inf).max(0)
    rival = (largest > smallest) | ((num_sizes == 1) & alive.any(0))
    if not rival.any():
        return _skipped("at no FLOPs are there two sizes to compare", len(curves),
                        warnings)  # fmt: skip
    log_c, loss, tokens = log_c[rival], loss[:, rival], tokens[:, rival]
    smallest, largest = smallest[rival], largest[rival]
    best = loss.argmin(0)
    at = np.arange(len(log_c))
    found = Envelope(
        line=None, draws=None, flops=np.exp(log_c), params=np.exp(sizes[best]),
        tokens=np.exp(tokens[best, at]), loss=np.exp(loss[best, at]),
        num_curves=len(curves), parts=(), warnings=tuple(warnings),
        edge_fraction=float(np.mean((sizes[best] == smallest)
                                    | (sizes[best] == largest))),
    )  # fmt: skip
    if found.num_sizes < MIN_SIZES:
        why = f"the envelope has {found.num_sizes} sizes, {MIN_SIZES} needed"
        return dataclasses.replace(found, skipped=why)
    line = _line(log_c, sizes[best], tokens[best, at])
    if len(set(clusters)) < 2:
        clusters = [str(k) for k in range(len(curves))]
        warnings.append("All curves are one cluster: each is resampled by itself.")
    present = resamples.weights("cluster", np.array(clusters), num_bootstraps, seed) > 0
    draws = _draws(log_c, loss, tokens, sizes, present)
    if len(draws) < 2:
        return dataclasses.replace(found, skipped="too few curves to resample")
    parts = _parts(log_c, sizes[best], tokens[best, at])
    warnings += _line_warnings(found, line[1], parts)
    return dataclasses.replace(
        found, line=line, draws=draws, parts=parts, warnings=tuple(warnings)
    )


def _taken(points, whole_curves: bool) -> tuple[np.ndarray, list[str]]:
    """Return which rows take part [n], and what to say of that."""
    final = np.asarray(points.is_final, bool)
    every = np.ones(len(final), bool)
    _, which = np.unique(points.run, return_inverse=True)
    ends = np.bincount(which, final)
    if (ends > 1).any():  # a schedule ends once: the table does not say where
        return every, [
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
    if whole_curves and not taken.all():
        return every, [
            f"{int((~taken).sum())} of {len(taken)} rows are from before the end of "
            "a schedule that decays, where the loss is above that of a run which "
            "stops there."
        ]
    left = int((~taken).sum())
    said = f"{left} of {len(taken)} rows are from before the end of a schedule"
    return taken, [said + " and take no part in approach 1."] if left else []


def _curves(points, taken) -> tuple[list, list[str]]:
    """Return curves (ln C [m], ln loss [m], ln D [m], ln N) and the cluster of each."""
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
    for (_, name, _), mine in keys.items():
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


def _line(log_c, log_params, log_tokens, weights=1.0) -> np.ndarray:
    """Return [..., 4]: coefficients of ln N*, then of ln D*, on ln C."""
    best = np.stack([log_params, log_tokens], -1)
    return lines.pair(log_c, best, np.broadcast_to(weights, best.shape))


def _draws(log_c, loss, tokens, sizes, present) -> np.ndarray:
    """Return lines [R, 4] through the envelopes of the runs present [R, curves]."""
    ranked = np.argsort(loss, axis=0, kind="stable")[:NUM_RANKED]  # [K, G]
    at = np.arange(len(log_c))
    draws = []
    for chunk in np.array_split(present, max(1, len(present) // 100)):
        here = chunk[:, ranked] & np.isfinite(loss[ranked, at])  # [r, K, G]
        best = ranked[here.argmax(1), at]  # [r, G]
        weights = here.any(1).astype(float)
        fine = (weights > 0).sum(1) >= 2
        draws.append(
            _line(
                log_c, sizes[best][fine], tokens[best, at][fine], weights[fine, :, None]
            )
        )
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


def _skipped(why: str, num_curves: int, warnings: list[str]) -> Envelope:
    """Return an envelope that is none."""
    none = np.empty(0)
    return Envelope(
        line=None, draws=None, flops=none, params=none, tokens=none, loss=none,
        num_curves=num_curves, edge_fraction=0.0, parts=(), warnings=tuple(warnings),
        skipped=why,
    )  # fmt: skip


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
