"""What of a row of metrics is a number to draw."""

from typing import Any


def scalars(row: dict[str, Any]) -> dict[str, float]:
    """Return the metrics of a row, without its step and what is no number."""
    return {
        name: value
        for name, value in row.items()
        if name != "step" and isinstance(value, int | float)
    }
