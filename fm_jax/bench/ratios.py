"""What a race says: ratios of times that were taken side by side."""

import statistics
from collections.abc import Sequence


def paired(theirs: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """Return how many times as fast as theirs ours is: `median`, quartiles, `rounds`.

    The ratio is each round's own, because what slows a machine slows a round's both.
    """
    ratios = [other / mine for other, mine in zip(theirs, ours, strict=True)]
    low, median, high = quartiles(ratios)
    return {"median": median, "low": low, "high": high, "rounds": len(ratios)}


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the lower quartile, the median and the upper one; of one value, itself."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high
