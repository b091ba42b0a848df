"""What the figures of a fit share: style, axes, ticks, keys, and numbers as text."""

import contextlib
import math
import textwrap
from collections.abc import Callable, Iterable, Iterator

import numpy as np

INK = "#222222"
STYLE = {
    "font.family": ["DejaVu Sans"],  # comes with matplotlib: the same everywhere
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8e8e8",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.borderaxespad": 0,
    "savefig.dpi": 110,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
}


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """Draw in our style alone, whatever the user has set."""
    import matplotlib

    plain = dict(matplotlib.rcParamsDefault)
    plain.pop("backend")  # not ours to choose; a Figure made by hand is drawn by Agg
    with matplotlib.rc_context(plain | STYLE):
        yield


def figure(width: float, height: float, **margins):
    """Return an empty figure of so many inches; its margins are fractions of it."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height))
    made.subplots_adjust(**margins)
    return made


def log_axis(axis, values, show: Callable[[float], str], *, pad=1.15, most=7) -> None:
    """Give an axis a log scale about `values`, with ticks that `show` writes."""
    values = values[np.isfinite(values) & (values > 0)]
    low, high = values.min() / pad, values.max() * pad
    name, at = axis.axis_name, ticks(low, high, most=most)
    # Limits first: without them the scale looks through everything drawn for some.
    axis.axes.set(**{f"{name}lim": (low, high), f"{name}scale": "log"})
    axis.minorticks_off()
    axis.set_ticks(at, labels=[show(tick) for tick in at])


def ticks(low: float, high: float, *, most: int) -> np.ndarray:
    """Return as many round numbers from `low` to `high` as `most` allows."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = [np.arange(10, 100, step) / 10 for step in (1, 2, 5)]
    steps += [(1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3)]
    choices = [(each, 1) for each in steps] + [((1,), every) for every in range(1, 9)]
    for each, every in choices:
        powers = 10.0 ** np.arange(first, last + 1, every)
        found = np.unique(np.outer(powers, each))
        found = found[(found >= low) & (found <= high)]
        if len(found) <= most:
            break
    return found if len(found) > 1 else np.geomspace(low, high, 3)


def few_ticks(axis) -> None:
    """Give a linear axis a few round ticks, none at its very end."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10], prune="upper"))


def amount(value: float) -> str:
    """Return a number of parameters or tokens as 70M or 1.5B."""
    if value >= 1e15:
        return power(value)
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= unit * (1 - 1e-9):
            return f"{value / unit:.3g}{letter}"
    return f"{value:.3g}"


def power(value: float) -> str:
    """Return a number as 3·10²¹, in Unicode alone: mathtext takes far longer."""
    factor, exponent = f"{value:.1e}".split("e")
    raised = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    factor = factor.removesuffix(".0")
    return f"10{raised}" if factor == "1" else f"{factor}·10{raised}"


def short(value: float) -> str:
    """Return a number in four digits, or as an amount where that is shorter."""
    return f"{value:.4g}" if value < 1e4 else amount(value)


def tints(budgets: np.ndarray) -> list:
    """Return a colour for each budget, dark for the least."""
    from matplotlib import colormaps

    low, high = np.log([budgets.min(), budgets.max()])
    shares = [
        (math.log(budget) - low) / (high - low) if high > low else 0.4
        for budget in budgets
    ]
    # The yellow end is lost on white.
    return [colormaps["viridis"](0.78 * share) for share in shares]


def shades(losses: np.ndarray) -> dict:
    """Return the norm and the colours of losses, the dark ones for the highest."""
    from matplotlib import colormaps, colors

    low, high = losses.min(), losses.max()
    table = colormaps["viridis_r"](np.linspace(0.2, 1, 128))
    norm = colors.LogNorm(low, max(high, low * 1.01))
    return {"norm": norm, "cmap": colors.ListedColormap(table)}


def bar(figure, shown, place: tuple, label: str, **style) -> None:
    """Say in a bar at `place` what the colours of a scatter mean."""
    made = figure.colorbar(shown, cax=figure.add_axes(place), **style)
    at = ticks(shown.norm.vmin, shown.norm.vmax, most=8)
    made.minorticks_off()
    made.set_ticks(at, labels=[short(tick) for tick in at])
    made.set_label(label)
    made.outline.set_visible(False)


def key(label: str, **style):
    """Return a line or a marker of a legend."""
    from matplotlib.lines import Line2D

    return Line2D([], [], label=label, **style)


def patch(label: str, color: str):
    """Return a filled area of a legend."""
    from matplotlib.patches import Patch

    return Patch(color=color, label=label, lw=0)


def legend(figure, keys: list, left: float) -> None:
    """Put the keys in one line above the panels."""
    style = {"ncols": len(keys), "columnspacing": 1.6, "handletextpad": 0.5}
    figure.legend(handles=keys, loc="upper left", bbox_to_anchor=(left, 0.99), **style)


def label(panel, across, up, said: Iterable[str]) -> None:
    """Write labels beside points, on the side that has room, none upon another."""
    low, high = panel.get_xlim()
    gap = 0.05 * np.ptp(panel.get_ylim())
    free = math.inf
    for height, at, text in sorted(zip(up, across, said, strict=True), reverse=True):
        free = min(height, free - gap)
        left = at > math.sqrt(low * high)
        style = {"ha": "right" if left else "left", "va": "center", "fontsize": 8.5}
        offset = {"textcoords": "offset points", "xytext": (-7 if left else 7, 0)}
        panel.annotate(text, (at, free), **offset, **style)


def beside(panel, title: str, said: Iterable[tuple]) -> None:
    """Write (height, name, remark, colour) right of a panel, none upon another."""
    low, high = np.log(panel.get_ylim())
    place = {"transform": panel.transAxes, "va": "center"}
    panel.text(1.02, 1.0, title, weight="bold", **place)
    free = 1.0
    for height, name, remark, color in sorted(said, key=lambda one: -one[0]):
        free = min((math.log(height) - low) / (high - low), free - 0.045)
        panel.text(1.02, free, name, color=color, **place)
        if remark:
            lines = textwrap.fill(remark, 24)
            panel.text(1.135, free, lines, color="#555555", fontsize=8.5, **place)
