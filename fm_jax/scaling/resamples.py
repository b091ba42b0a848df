"""Resamples of runs, as weights, and the intervals of what is fitted to them."""

import numpy as np

from fm_jax import errors
from fm_jax.errors import UserError

KINDS = ("pairs", "cluster", "bayesian", "bayesian_cluster")


def weights(kind: str, clusters: np.ndarray, num: int, seed: int) -> np.ndarray:
    """Return how much each of n points counts in each resample, `[num, n]`.

    `clusters` `[n]` labels what belongs together. "pairs" draws points with
    replacement, "cluster" whole clusters; "bayesian" and "bayesian_cluster" give them
    Dirichlet weights (Rubin 1981, doi:10.1214/aos/1176345338), under which no point is
    ever absent. The weights of points, or of clusters, have a mean of one.

    Raises UserError for an unknown kind, or where there is nothing to resample.
    """
    if kind not in KINDS:
        raise errors.unknown("bootstrap", kind, KINDS)
    if num < 1:
        raise UserError(
            f"a bootstrap must have 1 resample or more; got {num}. Ask more."
        )
    clusters = np.asarray(clusters)
    labels, member = np.unique(clusters, return_inverse=True)
    by_cluster = kind in ("cluster", "bayesian_cluster")
    units = len(labels) if by_cluster else len(clusters)
    if units < 2:
        of = "clusters" if by_cluster else "runs"
        raise UserError(
            f"bootstrap {kind} must have 2 or more {of} to choose from; got {units}. "
            "Choose another bootstrap."
        )
    rng = np.random.default_rng(seed)
    if kind in ("pairs", "cluster"):
        counts = rng.multinomial(units, np.full(units, 1 / units), size=num)
        drawn = counts.astype(np.float64)
    else:
        drawn = rng.standard_exponential((num, units))
        drawn *= units / drawn.sum(axis=1, keepdims=True)
    return drawn[:, member] if by_cluster else drawn


def interval(draws: np.ndarray, level: float = 0.95) -> np.ndarray:
    """Return the percentile interval `[..., 2]` of draws `[R, ...]`.

    Raises ValueError for a draw that is not a number: which draws to leave out, and to
    say so, is for the caller.
    """
    if not 0 < level < 1:
        raise UserError(
            f"an interval's level must be between 0 and 1; got {level}. "
            "Ask, for example, for 0.95."
        )
    draws = np.asarray(draws, np.float64)
    if np.isnan(draws).any():
        raise ValueError(
            f"draws of an interval must be numbers; got {int(np.isnan(draws).sum())} "
            "that are not. Leave out the fits that failed."
        )
    tail = (1 - level) / 2
    return np.moveaxis(np.quantile(draws, [tail, 1 - tail], axis=0), 0, -1)
