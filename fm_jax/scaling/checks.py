"""How far a fit is to be trusted: held-out runs, other choices, and plain warnings."""

import dataclasses
import math

import numpy as np

from fm_jax.scaling import resamples, solver
from fm_jax.scaling.problem import Problem

CUTS = (0.5, 0.6, 0.7, 0.8, 0.9)  # fractions of the runs, by compute, that are kept
SAME_BUDGET = 1.02
NUM_DRAWS = 200
NUM_OUTLIERS = 5
FEW_DECADES = 3.0
HIGH_CORRELATION = 0.99
LARGE_RESIDUAL = 0.02  # of ln loss: seeds move a loss by a tenth of this
STRUCTURE_P = 1e-3


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
        if len(train) < train.min_runs + 2:
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
    noise = np.std(train.residuals(theta), ddof=1)
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
    residuals = np.abs(problem.residuals(theta))
    order = np.argsort(residuals)
    if len(problem) >= problem.min_runs + 4 * NUM_OUTLIERS:
        kept = np.sort(order[:-NUM_OUTLIERS])
        what = f"without the {NUM_OUTLIERS} largest residuals"
        tried.append((what, problem.take(kept)))
    for what, kept in (
        ("without the smallest third by compute", problem.flops > _third(problem, 1)),
        ("without the largest third by compute", problem.flops <= _third(problem, 2)),
    ):
        if kept.sum() >= problem.min_runs + 2:
            tried.append((what, problem.take(kept)))
    rows = [row(problem, theta, "as asked")]
    return rows + [row(p, p.fit().theta, what) for what, p in tried]


def _with(problem: Problem, delta: float, space: str) -> Problem:
    return dataclasses.replace(problem, delta=delta, space=space)


def _third(problem: Problem, count: int) -> float:
    return float(np.quantile(problem.flops, count / 3))


def row(problem: Problem, theta: np.ndarray, what: str) -> dict:
    """Return a row of the sensitivity table."""
    made = {"what": what, "runs": len(problem)}
    made |= dict(zip(problem.law.names, map(float, theta), strict=True))
    exponents = problem.law.exponents(theta)
    return made if exponents is None else made | {"a": float(exponents[0])}


def replicate_sd(problem: Problem) -> float | None:
    """Return the sd of ln loss between runs of the same place; None without any.

    Pooled over places: what another seed does to a run, whatever the law.
    """
    places = np.stack(list(problem.columns.values()), 1)
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
    found = []
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
    pair, value = correlation(problem.law.names, draws)
    if abs(value) > HIGH_CORRELATION:
        found.append(
            f"{pair[0]} and {pair[1]} are correlated {value:+.4f} in the draws: "
            "neither is known without the other"
        )
    return found + _misfits(problem, fitted.theta, tested)


def _bounds(problem: Problem, fitted: solver.Fitted, draws: np.ndarray) -> list[str]:
    theta, names = fitted.theta, problem.law.names
    found = [
        f"{name} is at its bound ({theta[names.index(name)]:.2g}): these runs do not "
        "see it"
        for name in fitted.at_bound
    ]
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
    spread = float(np.std(residuals, ddof=1))
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
    if cuts and cuts[-1]["mare"] > 3 * inside:
        found.append(
            f"held-out error at the last cut is {cuts[-1]['mare']:.2%}, "
            f"{cuts[-1]['mare'] / inside:.1f} times that of the fit: it gets worse "
            "beyond the data"
        )
    return found


def structure(problem: Problem, theta: np.ndarray) -> tuple[float, float]:
    """Return the p-value of an F test for a quadratic in the residuals, and its R^2."""
    residuals = problem.residuals(theta)
    u = _standard(np.log(problem.columns["params"]))
    v = _standard(np.log(problem.columns["tokens"]))
    features = np.stack([np.ones_like(u), u, v, u * u, v * v, u * v], 1)
    _, _, rank, _ = np.linalg.lstsq(features, residuals, rcond=None)
    freedom = len(residuals) - len(problem.law.names) - rank
    if freedom < 4:
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


def correlation(
    names: tuple[str, ...], draws: np.ndarray
) -> tuple[tuple[str, str], float]:
    """Return the pair of parameters that move together most in the draws.

    Factors are taken by their logarithms, as A is a factor of a power.
    """
    logs = np.where(
        np.isin(names, ("alpha", "beta", "eta")), draws, np.log(np.abs(draws) + 1e-300)
    )
    finite = logs[np.all(np.isfinite(logs), axis=1)]
    if len(finite) < 3 or len(names) < 2:
        return (names[0], names[0]), 0.0
    with np.errstate(invalid="ignore", divide="ignore"):
        table = np.nan_to_num(np.corrcoef(finite.T))
    np.fill_diagonal(table, 0.0)
    i, j = np.unravel_index(np.argmax(np.abs(table)), table.shape)
    return (names[i], names[j]), float(table[i, j])


def interval(draws: np.ndarray) -> list[float]:
    """Return the 95 % interval of draws [R], those that are not numbers left out."""
    finite = draws[np.isfinite(draws)]
    if not len(finite):
        return [math.nan, math.nan]
    return [float(x) for x in resamples.interval(finite)]
