"""Power laws through optima: straight lines in logarithms, of one or many draws."""

import numpy as np


def line(x, y, weights):
    """Return intercept and slope [...] of weighted least squares of y [..., S] on x.

    Entries of weight 0 are left out, NaN or not.
    """
    weights = np.broadcast_to(weights, np.shape(y))
    y = np.where(weights > 0, y, 0.0)
    share = weights / weights.sum(-1, keepdims=True)
    x_mean = (share * x).sum(-1, keepdims=True)
    slope = (share * (x - x_mean) * y).sum(-1) / (share * (x - x_mean) ** 2).sum(-1)
    return (share * y).sum(-1) - slope * x_mean[..., 0], slope


def pair(log_c, best, weights=1.0) -> np.ndarray:
    """Return [..., 4]: the coefficients of ln N*, then of ln D*.

    `best` is [..., S, 2], and `weights` if they differ.
    """
    weights = np.broadcast_to(weights, best.shape)
    found = [line(log_c, best[..., i], weights[..., i]) for i in (0, 1)]
    return np.stack([*found[0], *found[1]], -1)


def of_draws(log_c, optima) -> tuple[np.ndarray, int]:
    """Return the draws' lines [R, 4] and how many draws had too few slices for one."""
    fine = np.isfinite(optima).all(-1)
    kept = optima[fine.sum(1) >= 2]
    return pair(log_c, kept, np.isfinite(kept).astype(float)), len(optima) - len(kept)


def excess(log_c, best, optima) -> float:
    """Return the scatter of optima [S] about their line beyond that of draws [R, S].

    The method of moments of a random-effects regression: the residual sum of squares
    less its expectation under the draws' variances, over its degrees of freedom.
    """
    if len(log_c) < 3:
        return 0.0
    start, slope = line(log_c, best, np.ones(len(best)))
    rest = ((best - start - slope * log_c) ** 2).sum()
    away = (log_c - log_c.mean()) ** 2
    leverage = 1 / len(log_c) + away / away.sum()
    explained = ((1 - leverage) * variance(optima)).sum()
    return float(np.sqrt(max(0.0, (rest - explained) / (len(log_c) - 2))))


def scatter(shape, freedom: int, rng) -> np.ndarray:
    """Return draws [R, S] of a scatter of about 1 that `freedom` residuals measured.

    Each draw has a size of its own, as uncertain as such a measurement, so that sums
    have Student's distribution.
    """
    size = np.sqrt(freedom / rng.chisquare(freedom, (shape[0], 1)))
    return size * rng.standard_normal(shape)


def variance(optima) -> np.ndarray:
    """Return the variance of optima [R, ...] over draws, infinite with fewer than 2."""
    num = np.isfinite(optima).sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = np.nansum(optima, 0) / num
        spread = np.nansum((optima - mean) ** 2, 0) / (num - 1)
    return np.where(num > 1, spread, np.inf)


def precision(spread) -> np.ndarray:
    """Return 1 / variance, with a floor far below the largest where it is zero."""
    largest = np.max(spread[np.isfinite(spread)], initial=0.0)
    return 1 / np.maximum(spread, 1e-12 * largest + 1e-300)


def warnings(pair_, log_c, num, excess, optima, num_refused) -> list[str]:
    """Return sentences on the lines and their draws."""
    found = []
    if num < 3:
        found.append("The line goes through 2 slices: its fit is not tested.")
    if np.ptp(log_c) < np.log(10):
        found.append(
            f"The budgets of the line span {np.ptp(log_c) / np.log(10):.2f} decades."
        )
    if abs(pair_[1] + pair_[3] - 1) > 0.03:
        found.append(
            f"The exponents of N* and D* add to {pair_[1] + pair_[3]:.3f}, not to 1: "
            "FLOPs are not in proportion to N D, or a slice is off."
        )
    if excess > 0.05:
        found.append(
            f"The optima scatter about their line by {excess:.2f} in ln N* beyond the "
            "noise; the intervals include it."
        )
    lost = float(np.mean(~np.isfinite(optima[:, :, 0])))
    if lost > 0.05 or num_refused:
        found.append(
            f"{lost:.1%} of the resampled slices had no minimum inside and "
            f"{num_refused} draws no line; the intervals are of the rest."
        )
    return found
