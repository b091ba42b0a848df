"""The valley of a slice: a curve through losses over a logarithm, its lowest point."""

import dataclasses
import itertools

import numpy as np

METHODS = ("parabola", "cubic", "akima")
MIN_COEFFICIENTS = {"parabola": 3, "cubic": 4, "akima": 3}
GRID_PER_INTERVAL = 25  # of Akima's argmin, as arXiv 2406.19146 has it
PRIOR_FREEDOM = 4
MIN_SIZES = 5  # different sizes of a slice that is used
FAR = 10.0  # half-widths of the window beyond which a lowest point means nothing
# Over +-8x the third-order shift of ln N* is .043 for each .1 of beta - alpha: more
# than the noise of a good slice. A third of W off the middle changes it by half.
WIDE = 64.0
OFF_CENTRE = 1 / 3
UNUSABLE = ("few_sizes", "not_bracketed", "not_convex")


@dataclasses.dataclass(frozen=True)
class Slice:
    """The runs of one budget; an optimum is None where the curve has none."""

    budget: float
    points: int
    params_range: tuple[float, float]
    tokens_range: tuple[float, float]
    params_optimum: float | None
    tokens_optimum: float | None
    loss_optimum: float | None
    flags: tuple[str, ...]
    used: bool


def cut(budget: float, axes: list, loss, method: str) -> Slice:
    """Return the slice of a budget: its optima over ln N and ln D (`axes`), its flags.

    `few_sizes`: fewer than MIN_SIZES different ones; `not_convex`: the curve has no
    lowest point; `not_bracketed`: it has it reach the sizes, or the lowest loss is
    at an edge; `off_centre`, `wide`: where the bias of a parabola is large (bias.py).
    Slices with a flag in UNUSABLE are not `used`.
    """
    flags, optima, lowest = [], [], None
    for x in axes:
        sizes = len(np.unique(x))
        if sizes < MIN_SIZES:
            flags.append("few_sizes")
        if sizes < MIN_COEFFICIENTS[method]:
            optima.append(None)
            continue
        at, value, away = minima(x, loss[None], method)
        best_row = x[np.argmin(loss)]
        if not np.isfinite(at[0]):
            flags.append("not_convex")
            optima.append(None)
            continue
        if away[0] >= 1 or best_row in (x.min(), x.max()):
            flags.append("not_bracketed")
        elif abs(at[0] - (x.min() + x.max()) / 2) > OFF_CENTRE * np.ptp(x) / 2:
            flags.append("off_centre")
        if np.exp(np.ptp(x)) > WIDE * (1 + 1e-9):
            flags.append("wide")
        near = away[0] < FAR
        optima.append(float(np.exp(at[0])) if near else None)
        if x is axes[0] and near:
            lowest = float(value[0])
    flags = tuple(dict.fromkeys(flags))
    used = None not in optima and not set(flags) & set(UNUSABLE)
    ranges = [(float(np.exp(x.min())), float(np.exp(x.max()))) for x in axes]
    return Slice(
        budget=float(budget), points=len(loss), params_range=ranges[0],
        tokens_range=ranges[1], params_optimum=optima[0], tokens_optimum=optima[1],
        loss_optimum=lowest, flags=flags, used=used,
    )  # fmt: skip


def warnings(slices: tuple[Slice, ...]) -> list[str]:
    """Return sentences on slices left out, and on those kept with a flag."""
    found = []
    for used, what in ((False, "left out"), (True, "kept, but flagged")):
        named = [s for s in slices if s.used == used and s.flags]
        if named:
            listed = "; ".join(f"{s.budget:.3g}: {', '.join(s.flags)}" for s in named)
            found.append(f"{len(named)} of {len(slices)} slices {what} ({listed}).")
    offsets = [
        2 * np.log(s.params_optimum / np.sqrt(np.prod(s.params_range)))
        / np.log(s.params_range[1] / s.params_range[0])
        for s in slices
        if s.used
    ]  # fmt: skip
    if offsets and np.ptp(offsets) > 2 * OFF_CENTRE:
        found.append(
            "The windows of sizes drift against the optimum from budget to budget "
            f"(by {np.ptp(offsets):.2f} half-widths), which biases the exponent of a "
            "parabola."
        )
    return found


def minima(x: np.ndarray, losses: np.ndarray, method: str):
    """Return where [R] curves over x [n] through losses [R, n] have their lowest point,
    how low it is, and how far from the middle of x in half-widths: 1 is the edge.

    All three are NaN for a curve without a lowest point.
    """
    if method == "akima":
        return _akima(x, losses)
    middle, half = (x.min() + x.max()) / 2, np.ptp(x) / 2
    z = (x - middle) / half
    powers = z[:, None] ** np.arange(MIN_COEFFICIENTS[method])
    coefs = losses @ np.linalg.pinv(powers).T
    slope, second = coefs[:, 1], coefs[:, 2]
    third = coefs[:, 3] if method == "cubic" else np.zeros(len(coefs))
    # c1 + 2 c2 z + 3 c3 z^2 = 0 at the root where the curve bends up.
    with np.errstate(divide="ignore", invalid="ignore"):
        at = -slope / (second + np.sqrt(second**2 - 3 * slope * third))
    at = np.where(np.isfinite(at), at, np.nan)
    value = sum(coefs[:, p] * at**p for p in range(coefs.shape[1]))
    return middle + half * at, value, np.abs(at)


def noisy_optima(used: list, method: str, noise: list) -> np.ndarray:
    """Return ln N* and ln D* [R, S, 2] of slices with noise [R, n] added to each.

    `used` holds each slice's axes and losses; NaN where a lowest point is not inside.
    """
    found = np.empty((len(noise[0]), len(used), 2))
    for k, (axes, loss) in enumerate(used):
        for i, x in enumerate(axes):
            at, _, away = minima(x, loss + noise[k], method)
            found[:, k, i] = np.where(away < 1, at, np.nan)
    return np.where(np.isfinite(found).all(-1, keepdims=True), found, np.nan)


def noise(used: list, method: str, names: list | None) -> tuple[np.ndarray, float]:
    """Return each slice's residual standard deviation [S] in nats, and a correlation.

    It is that of the noise of rows in different slices which share a name, `names`
    being those of each slice's rows, by the method of moments: the products of such
    residuals over their expectation under a correlation of 1.
    """
    num = 4 if method == "akima" else MIN_COEFFICIENTS[method]
    rests, bases = [], []
    for (x, _), loss in used:
        z = (2 * x - x.min() - x.max()) / np.ptp(x)
        basis, _ = np.linalg.qr(z[:, None] ** np.arange(num))
        bases.append(basis)
        rests.append(loss - basis @ (basis.T @ loss))
    squares = np.array([rest @ rest for rest in rests])
    freedom = np.array([len(rest) - num for rest in rests])
    sds = moderated_sds(squares, freedom)
    if names is None:
        return sds, 0.0
    plain = np.maximum(np.sqrt(squares / freedom), 1e-300)
    makers = [np.eye(len(basis)) - basis @ basis.T for basis in bases]
    seen = possible = 0.0
    for s, t in itertools.combinations(range(len(used)), 2):
        same = (names[s][:, None] == names[t]).astype(float)
        seen += rests[s] / plain[s] @ same @ rests[t] / plain[t]
        possible += np.trace(makers[s] @ same @ makers[t] @ same.T)
    known = possible > 1e-6  # not where each slice has a name of its own
    return sds, float(np.clip(seen / possible, 0, 1)) if known else 0.0


def moderated_sds(squares, freedom) -> np.ndarray:
    """Return standard deviations from sums of squares and degrees of freedom, each [S].

    One alone has few degrees of freedom, so each variance is drawn towards the median
    of all as if that were PRIOR_FREEDOM residuals more; one that is unlike the others
    keeps most of its own.
    """
    # A chi-squared variable's median is below its mean by about this factor.
    typical = np.median(squares / freedom / (1 - 2 / (9 * freedom)) ** 3)
    return np.sqrt((squares + PRIOR_FREEDOM * typical) / (freedom + PRIOR_FREEDOM))


def _akima(x: np.ndarray, losses: np.ndarray):
    """Return `minima` of Akima splines through ln loss; equal sizes are averaged."""
    from scipy import interpolate

    sizes, which, counts = np.unique(x, return_inverse=True, return_counts=True)
    mean = np.zeros((len(sizes), len(x)))
    mean[which, np.arange(len(x))] = 1 / counts[which]
    heights = np.log(np.maximum(losses, 1e-300)) @ mean.T  # [R, sizes]
    grid = np.linspace(sizes[0], sizes[-1], (len(sizes) - 1) * GRID_PER_INTERVAL)
    curves = interpolate.Akima1DInterpolator(sizes, heights.T)(grid)  # [G, R]
    lowest = curves.argmin(0)
    value = np.exp(np.take_along_axis(curves, lowest[None], 0)[0])
    away = np.abs(lowest / (len(grid) - 1) * 2 - 1)  # exactly 1 at either edge
    return grid[lowest], value, away
