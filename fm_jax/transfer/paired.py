"""Means and paired differences over a few seeds, with t intervals.

Of n numbers of mean m and sample standard deviation s the interval is
m +- t * s / sqrt(n), t the quantile of Student's t with n - 1 degrees of freedom
(Student, Biometrika 6, 1908). With five seeds nothing can be resampled: this takes the
numbers to be about normal, which five cannot show.
"""

import dataclasses
import math
import statistics
from collections.abc import Hashable, Mapping, Sequence

LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over `count` seeds and half the width of its interval, None of one seed.

    Both are None where there is no seed.
    """

    mean: float | None
    half_width: float | None
    count: int

    @property
    def excludes_zero(self) -> bool:
        """Return whether 0 is outside the interval; without an interval it is not."""
        return self.half_width is not None and abs(self.mean) > self.half_width


def estimate(values: Sequence[float], *, level: float = LEVEL) -> Estimate:
    """Return the mean of independent values and its interval of this confidence."""
    from scipy import stats

    count = len(values)
    if count < 2:
        return Estimate(values[0] if count else None, None, count)
    spread = statistics.stdev(values) / math.sqrt(count)
    quantile = float(stats.t.ppf((1 + level) / 2, count - 1))
    return Estimate(statistics.fmean(values), quantile * spread, count)


def difference(
    values: Mapping[Hashable, float],
    against: Mapping[Hashable, float],
    *,
    level: float = LEVEL,
) -> Estimate:
    """Return the mean of values - against over the keys that both have.

    The keys are seeds: what a seed does to both, its draw of the data and their order,
    falls out of the difference.
    """
    shared = [key for key in values if key in against]
    return estimate([values[key] - against[key] for key in shared], level=level)
