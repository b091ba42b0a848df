"""Many things in few lines: cells in columns, and how many are in each state."""

from collections import Counter
from collections.abc import Iterable, Sequence


def columns(rows: Sequence[Sequence[str]], *, left: Sequence[int] = (0,)) -> list[str]:
    """Return rows of cells as lines, aligned right but for some columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if index in left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def summary(states: Iterable[str]) -> str:
    """Return how many runs there are, and how many are in each state."""
    counted = Counter(states)
    said = ", ".join(f"{count} {state}" for state, count in counted.items())
    total = counted.total()
    return f"{total} run{'' if total == 1 else 's'}: {said}"
