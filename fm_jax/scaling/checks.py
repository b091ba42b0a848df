"""How far a fit is to be trusted: held-out runs, other choices, and plain warnings."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from fm_jax.scaling import resamples, solver
from fm_jax.scaling.problem import Problem

CUTS = (0.5, 0.6, 0.7, 0.8, 0.9)  # fractions of the runs, by compute, that are kept
SAME_BUDGET = 1.02
NUM_DRAWS = 200
NUM_OUTLIERS = 5
FEW_DECADES = 3.0
HIGH_CORRELATION = 0.99
SMALL_ERROR = 0.002  # relative, of a held-out loss: nothing to warn of
FEW_CLUSTERS = 4
LARGE_RESIDUAL = 0.02  # of ln loss: seeds move a loss by a tenth of this
STRUCTURE_P = 1e-3
CENTRED = (("A", "alpha", "params"), ("B", "beta", "tokens"))


def held_out(
    problem: Problem, theta: np.ndarray, draws: np.ndarray, *, kind: str, seed: int
) -> list[dict]:
    """Return fits to the runs below rolling cuts of compute, tested on those above.

    Each has the mean and the worst absolute relative error of the held-out losses
    (`mare`, `worst`), the exponent `a` with its interval, and `coverage`: the share of
    held-out runs inside the 95 % interval of parameters and noise together. The last
    entry keeps every run and tests none: theta and draws are those of the whole fit.
    """
    order = np.sort(problem.flops)
    cuts = [order[max(0, round(share * len(order)) - 1)] for share in CUTS]
    # Runs of one budget stay together: they miss it by part of a step.
    cuts = {float(order[order <= cut * SAME_BUDGET][-1]) for cut in cuts}
    found = []
    for cut in sorted(cuts - {float(order[-1])}):
        kept = problem.flops <= cut
        train, test = problem.take(kept), problem.take(~kept)
        by_cluster = kind.endswith("cluster") and train.num_clusters < 2
        if len(train) < train.min_runs + 2 or by_cluster or not train.can_be_fitted():
            continue
        best = train.fit().theta
        drawn, _ = train.draws(best, kind=kind, num=NUM_DRAWS, seed=seed)
        found.append(_cut(train, test, best, drawn, cut, seed))
    return [*found, _cut(problem, None, theta, draws, float(order[-1]), seed)]


def _cut(train, test, theta, draws, cut, seed) -> dict:
    made = {"cut": cut, "train": len(train), "test": len(test) if test else 0}
    exponents = train.law.exponents(np.vstack([theta, draws]))
    if exponents is not None:
        a = exponents[0]
        made |= {"a": float(a[0]), "ci": {"a": interval(a[1:])}}
    if test is None:
        return made
    errors = np.abs(np.expm1(-test.residuals(theta)))
    noise = train.noise(theta)
    rng = np.random.default_rng(seed)
    losses = test.predicted(draws)
    losses = losses * np.exp(noise * rng.standard_normal(losses.shape))
    low, high = resamples.interval(losses).T
    return made | {
        "mare": float(np.mean(errors)),
        "worst": float(np.max(errors)),
        "coverage": float(np.mean((low <= test.loss) & (test.loss <= high))),
    }


def sensitivity(problem: Problem, theta: np.ndarray) -> list[dict]:
    """Return the parameters under other objectives, and without some of the runs.

    Each row has `what`, `runs` and the law's parameters; the exponents too where the
    law has them.
    """
    chosen = problem.delta, problem.space
    others = [
        ("as asked", problem),
        ("Huber(1e-3) of ln loss", _with(problem, 1e-3, "log")),
        ("least absolute deviation", _with(problem, 0.0, "log")),
        ("least squares of ln loss", _with(problem, math.inf, "log")),
        ("least squares of loss", _with(problem, math.inf, "linear")),
    ]
    tried = [(w, p) for w, p in others[1:] if (p.delta, p.space) != chosen]
    order = np.argsort(np.abs(problem.residuals(theta)))
    parts = []
    if len(problem) >= problem.min_runs + 4 * NUM_OUTLIERS:
        what = f"without the {NUM_OUTLIERS} largest residuals"
        parts.append((what, np.sort(order[:-NUM_OUTLIERS])))
    low, high = (float(np.quantile(problem.flops, third)) for third in (1 / 3, 2 / 3))
    parts += [
        ("without the smallest third by compute", problem.flops * SAME_BUDGET > low),
        ("without the largest third by compute", problem.flops <= high * SAME_BUDGET),
    ]
    for what, kept in parts:
        part = problem.take(kept)
        if len(part) >= part.min_runs + 2 and part.can_be_fitted():
            tried.append((what, part))
    rows = [row(problem, theta, "as asked")]
    return rows + [row(p, p.fit().theta, what) for what, p in tried]


def _with(problem: Problem, delta: float, space: str) -> Problem:
    return dataclasses.replace(problem, delta=delta, space=space)


def row(problem: Problem, theta: np.ndarray, what: str) -> dict:
    """Return a row of the sensitivity table."""
    made = {"what": what, "runs": len(problem)}
    made |= dict(zip(problem.law.names, map(float, theta), strict=True))
    exponents = problem.law.exponents(theta)
    return made if exponents is None else made | {"a": float(exponents[0])}


def replicate_sd(problem: Problem, settings: Sequence[np.ndarray] = ()) -> float | None:
    """Return the sd of ln loss between runs alike in all but their seed, or None.

    Pooled over places; `settings` are the other columns that tell runs apart, as the
    learning rate.
    """
    places = np.stack([*problem.columns.values(), *settings], 1)
    _, group = np.unique(places, axis=0, return_inverse=True)
    counts = np.bincount(group)
    freedom = int(np.sum(counts - 1))
    if not freedom:
        return None
    y = np.log(problem.loss)
    means = np.bincount(group, y) / counts
    return float(np.sqrt(np.sum((y - means[group]) ** 2) / freedom))


def warnings(
    problem: Problem,
    fitted: solver.Fitted,
    draws: np.ndarray,
    tested: list[dict],
) -> list[str]:
    """Return what a reader must know before believing the numbers, a sentence each."""
    found = _few(problem)
    decades = float(np.log10(problem.flops.max() / problem.flops.min()))
    if decades < FEW_DECADES:
        found.append(
            f"the runs span {decades:.1f} decades of compute; exponents from fewer "
            f"than {FEW_DECADES:.0f} move with every run that is added"
        )
    if not fitted.converged:
        found.append(
            "the search did not converge: its gradient is "
            f"{fitted.gradient_norm:.1g} where it ended"
        )
    elif fitted.num_agreeing < 2 <= fitted.num_starts:
        found.append(
            f"only 1 of {fitted.num_starts} starts reached this optimum; it may not be "
            "the best"
        )
    if not fitted.unique:
        found.append(
            "other parameters fit these runs as well: what is printed is one of many"
        )
    found += _bounds(problem, fitted, draws)
    pair, value = correlation(problem, draws)
    if abs(value) > HIGH_CORRELATION:
        found.append(
            f"{pair[0]} and {pair[1]} are correlated {value:+.4f} in the draws: "
            "neither is known without the other"
        )
    return found + _misfits(problem, fitted.theta, tested)


def _few(problem: Problem) -> list[str]:
    """Return what too few runs or clusters do to intervals, as simulation has it."""
    found, count = [], 2 * len(problem.law.names)
    if len(problem) < count:
        found.append(
            f"{len(problem)} runs for {len(problem.law.names)} parameters: 95 % "
            f"intervals hold less often than they say below {count}"
        )
    if 1 < problem.num_clusters < FEW_CLUSTERS:
        found.append(
            f"the runs are of {problem.num_clusters} clusters: intervals from fewer "
            f"than {FEW_CLUSTERS} are too narrow"
        )
    return found


def _bounds(problem: Problem, fitted: solver.Fitted, draws: np.ndarray) -> list[str]:
    theta, names = fitted.theta, problem.law.names
    found = []
    for name in fitted.at_bound:
        value = theta[names.index(name)]
        found.append(
            f"{name} is at its bound, 0: these runs do not see it"
            if value == 0
            else f"{name} has no effect on these runs' losses (its fit ended at "
            f"{value:.2g}): it is not known, whatever its interval"
        )
    if "E" in names and "E" not in fitted.at_bound:
        index, least = names.index("E"), float(problem.loss.min())
        low = float(resamples.interval(draws[:, index])[0])
        if low < 0.05 * least:
            found.append(
                f"E may be anything from {low:.2g} up: these runs hardly see the floor "
                "of the loss"
            )
    for name in ("alpha", "beta"):
        if name in names and theta[names.index(name)] > 1.5:
            found.append(
                f"{name} is {theta[names.index(name)]:.2f}, beyond what sweeps have "
                "found: few runs are limited by that side alone"
            )
    return found


def _misfits(problem: Problem, theta: np.ndarray, tested: list[dict]) -> list[str]:
    found = []
    residuals = problem.residuals(theta)
    spread = problem.noise(theta)
    if spread > LARGE_RESIDUAL:
        found.append(
            f"the law does not hold: losses lie {spread:.1%} from it (standard "
            "deviation of ln loss). Runs that were not tuned alike look like this"
        )
    p_value, share = structure(problem, theta)
    if p_value < STRUCTURE_P:
        found.append(
            f"the residuals have a shape: a quadratic in ln params and ln tokens "
            f"explains {share:.0%} of them (p {p_value:.1g}). The law bends another way"
        )
    cuts = [row for row in tested if "mare" in row]
    inside = float(np.mean(np.abs(np.expm1(-residuals))))
    if cuts and cuts[-1]["mare"] > max(3 * inside, SMALL_ERROR):
        found.append(
            f"held-out error at the last cut is {cuts[-1]['mare']:.2%}, "
            f"{cuts[-1]['mare'] / inside:.1f} times that of the fit: it gets worse "
            "beyond the data"
        )
    return found


def structure(problem: Problem, theta: np.ndarray) -> tuple[float, float]:
    """Return the p-value of an F test for a quadratic in the residuals, and its R^2."""
    if not {"params", "tokens"} <= problem.columns.keys():
        return 1.0, 0.0
    residuals = problem.residuals(theta)
    u = _standard(np.log(problem.columns["params"]))
    v = _standard(np.log(problem.columns["tokens"]))
    features = np.stack([np.ones_like(u), u, v, u * u, v * v, u * v], 1)
    _, _, rank, _ = np.linalg.lstsq(features, residuals, rcond=None)
    freedom = len(residuals) - len(problem.law.names) - rank
    if freedom < 4 or rank < 2:
        return 1.0, 0.0
    smooth = features @ np.linalg.lstsq(features, residuals, rcond=None)[0]
    explained = float(np.sum((smooth - residuals.mean()) ** 2))
    left = float(np.sum((residuals - smooth) ** 2))
    if left == 0:
        return 1.0, 0.0
    from scipy import special

    ratio = explained / (rank - 1) / (left / freedom)
    p_value = float(special.fdtrc(rank - 1, freedom, ratio))
    return p_value, explained / (explained + left)


def _standard(x: np.ndarray) -> np.ndarray:
    return (x - x.mean()) / (x.std() or 1.0)


def correlation(problem: Problem, draws: np.ndarray) -> tuple[tuple[str, str], float]:
    """Return the pair of parameters that move together most in the draws.

    A factor of a power is taken at the middle of the runs, ln(A / N^alpha), so that
    the units of params and tokens do not matter.
    """
    names = problem.law.names
    columns = {name: np.asarray(draws[:, i], float) for i, name in enumerate(names)}
    for factor, exponent, column in CENTRED:
        if factor in columns:
            middle = np.log(problem.columns[column]).mean()
            power = columns.get(exponent, problem.law.held.get(exponent, 0.0))
            with np.errstate(divide="ignore"):
                columns[factor] = np.log(columns[factor]) - power * middle
    values = np.stack([columns[name] for name in names], 1)
    finite = values[np.all(np.isfinite(values), axis=1)]
    if len(finite) < 3 or len(names) < 2:
        return (names[0], names[0]), 0.0
    with np.errstate(invalid="ignore", divide="ignore"):
        table = np.nan_to_num(np.corrcoef(finite.T))
    i, j = np.unravel_index(np.argmax(np.abs(np.triu(table, 1))), table.shape)
    return (names[i], names[j]), float(table[i, j])


def interval(draws: np.ndarray) -> list[float]:
    """Return the 95 % interval of draws [R], those that are not numbers left out."""
    finite = draws[np.isfinite(draws)]
    if not len(finite):
        return [math.nan, math.nan]
    return [float(x) for x in resamples.interval(finite)]
