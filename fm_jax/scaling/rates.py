"""Laws of the learning rate and the batch size: their best values over N and D.

A cell is the runs of one N and D that differ in learning rate, batch size or both. A
quadratic of the loss in (ln lr, ln B) has its lowest point at the cell's best values;
then ln lr* = c + p ln N + q ln D through the cells, and the same of B* (the form of
arXiv 2503.04715). What smooths the cells is part of such a law: compare laws only with
this in mind.
"""

import dataclasses

import numpy as np

from fm_jax import errors
from fm_jax.scaling import lines, resamples, valleys

THINGS = ("learning_rate", "batch_tokens")
TERMS = ("params", "tokens")
SAME_TOKENS = 1.05  # rows of a cell: their tokens differ by rounding to steps
MIN_VALUES = 3  # of a rate or a batch size, for a quadratic in it
MIN_SPREAD = 0.1  # e-folds that ln N must move at a given ln D, or there is no law


@dataclasses.dataclass(frozen=True)
class Cell:
    """The runs of one size and length; a best value is None where there is none."""

    params: float
    tokens: float
    points: int
    best: dict[str, float | None]  # by THINGS
    curvature: dict[str, float]  # of the loss along ln of each, others at their best
    flags: tuple[str, ...]
    used: bool


@dataclasses.dataclass(frozen=True)
class Law:
    """ln y = line[0] + line[1] ln N + line[2] ln D; `draws` is [R, 3] like `line`."""

    num_cells: int
    line: np.ndarray | None = None
    draws: np.ndarray | None = None
    excess: float = 0.0  # scatter of ln y about the law beyond the noise
    skipped: str = ""

    def record(self) -> dict:
        """Return what fit.json keeps of this law."""
        if self.skipped:
            return {"skipped": self.skipped, "cells": self.num_cells}
        ci = resamples.interval(self.draws)
        names = ("coefficient", *TERMS)
        values = [float(np.exp(self.line[0])), *map(float, self.line[1:])]
        bounds = [np.exp(ci[0]).tolist(), *ci[1:].tolist()]
        return {
            **dict(zip(names, values, strict=True)),
            "ci": dict(zip(names, bounds, strict=True)),
            "cells": self.num_cells,
            "excess": self.excess,
            "draws": len(self.draws),
        }


@dataclasses.dataclass(frozen=True)
class Rates:
    """The laws by name (THINGS), the cells they rest on, and what to beware of."""

    laws: dict[str, Law]
    cells: tuple[Cell, ...]
    warnings: tuple[str, ...]

    def record(self) -> dict:
        """Return what fit.json keeps, with `skipped` where there is no law at all."""
        found = {name: law.record() for name, law in self.laws.items()}
        found["cells"] = [dataclasses.asdict(cell) for cell in self.cells]
        found["warnings"] = list(self.warnings)
        reasons = [law.skipped for law in self.laws.values()]
        if all(reasons):
            found["skipped"] = "; ".join(dict.fromkeys(reasons))
        return found


def fit(columns: dict, loss, *, num_bootstraps: int = 1000, seed: int = 0) -> Rates:
    """Fit each cell's best values and the laws of the learning rate and batch size.

    `columns` holds `params`, `tokens`, `learning_rate` and, where it was varied,
    `batch_tokens`, each [n]; `loss` is [n] in nats per token. A value that takes fewer
    than MIN_VALUES values in a cell is held at its commonest. A cell is flagged, and
    left out, when it has `few_points`, is `not_convex` or has its lowest point
    `at_edge`, outside the values tried.

    Draws refit the cells with normal noise of their residuals' size, and add the
    scatter about the law beyond that. A cell weighs by the inverse variance of its
    optimum: sharp valleys count most. A law that the cells cannot tell is `skipped`.
    Raises UserError for a learning rate or batch size that has no logarithm.
    """
    columns = {k: np.asarray(columns[k], float)
               for k in (*TERMS, *THINGS) if k in columns}  # fmt: skip
    things = [name for name in THINGS if name in columns]
    loss = np.asarray(loss, float)
    for name in things:
        column = columns[name]
        bad = ~(np.isfinite(column) & (column > 0))
        if bad.any():
            raise errors.UserError(
                f"{name} must be positive and finite in each row; got "
                f"{column[bad][0]:g} in row {np.flatnonzero(bad)[0]}. Exclude the row"
            )
    cells, fits = [], []
    for mine in _groups(columns["params"], columns["tokens"]):
        cell, bowl = _cell({k: c[mine] for k, c in columns.items()}, loss[mine])
        cells.append(cell)
        fits.append(bowl)
    kept = [k for k, cell in enumerate(cells) if cell.used]
    optima = _drawn([fits[k] for k in kept], num_bootstraps, seed) if kept else {}
    laws = {}
    for number, name in enumerate(things):
        mine = [i for i, k in enumerate(kept) if cells[k].best[name] is not None]
        where = [cells[kept[i]] for i in mine]
        drawn = np.stack([optima[i][name] for i in mine], 1) if mine else None
        rng = np.random.default_rng((seed, number + 1))
        laws[name] = _law(name, where, drawn, rng)
    return Rates(laws=laws, cells=tuple(cells), warnings=tuple(_warnings(cells, laws)))


@dataclasses.dataclass(frozen=True)
class _Bowl:
    """A quadratic through a cell's losses: `solve` [P, n] gives its coefficients."""

    names: tuple[str, ...]
    middle: np.ndarray  # [k], of ln values
    half: np.ndarray  # [k]
    solve: np.ndarray
    loss: np.ndarray  # [n]
    square: float  # sum of squared residuals
    freedom: int

    def lowest(self, losses):
        """Return best ln values [R, k] and curvatures [R, k] for losses [R, n].

        NaN where a bowl has no lowest point.
        """
        k = len(self.names)
        coefs = losses @ self.solve.T
        slope = coefs[:, 1 : 1 + k]
        bend = np.empty((len(losses), k, k))
        for (i, j), c in zip(_pairs(k), coefs[:, 1 + k :].T, strict=True):
            bend[:, i, j] = bend[:, j, i] = 2 * c if i == j else c
        convex = (np.linalg.eigvalsh(bend) > 0).all(-1)
        bend[~convex] = np.eye(k)
        inverse = np.linalg.inv(bend)
        z = -(inverse @ slope[:, :, None])[:, :, 0]
        curvature = 1 / np.diagonal(inverse, axis1=1, axis2=2) / self.half**2
        z[~convex], curvature[~convex] = np.nan, np.nan
        return self.middle + self.half * z, curvature

    def inside(self, best):
        """Return which best values [R, k] are within the values tried."""
        return (np.abs(best - self.middle) <= self.half * (1 + 1e-9)).all(-1)


def _groups(params, tokens) -> list[np.ndarray]:
    """Return the rows of each cell: one size, tokens the same but for rounding."""
    found: list[list[int]] = []
    for row in np.lexsort((tokens, params)):
        first = found[-1][0] if found else None
        if first is None or not (
            params[row] == params[first] and tokens[row] <= tokens[first] * SAME_TOKENS
        ):
            found.append([])
        found[-1].append(int(row))
    return [np.array(rows) for rows in found]


def _cell(columns: dict, loss) -> tuple[Cell, _Bowl | None]:
    """Return a cell with its best values, and the bowl they come from."""
    things = [name for name in THINGS if name in columns]
    keep = np.ones(len(loss), bool)
    free = []
    for name in things:
        values, counts = np.unique(columns[name][keep], return_counts=True)
        if len(values) >= MIN_VALUES:
            free.append(name)
        elif len(values) > 1:
            keep &= columns[name] == values[counts.argmax()]
    k = len(free)
    num = 1 + k + k * (k + 1) // 2
    flags, best, curvature = [], dict.fromkeys(things), {}
    bowl = None
    y = loss[keep]
    x = np.stack([np.log(columns[n][keep]) for n in free], 1) if k else None
    if k and len(y) > num and (np.ptp(x, axis=0) > 0).all():
        middle, half = (x.max(0) + x.min(0)) / 2, np.ptp(x, axis=0) / 2
        z = (x - middle) / half
        cross = [z[:, i] * z[:, j] for i, j in _pairs(k)]
        design = np.stack([np.ones(len(z)), *z.T, *cross], 1)
        if np.linalg.matrix_rank(design, tol=1e-6) == num:
            solve = np.linalg.pinv(design)
            square = float(((y - design @ (solve @ y)) ** 2).sum())
            bowl = _Bowl(tuple(free), middle, half, solve, y, square, len(y) - num)
    if bowl is None:
        flags.append("few_points")
    else:
        at, bend = bowl.lowest(y[None])
        if not np.isfinite(at).all():
            flags.append("not_convex")
        else:
            best |= dict(zip(free, map(float, np.exp(at[0])), strict=True))
            curvature = dict(zip(free, map(float, bend[0]), strict=True))
            if not bowl.inside(at)[0]:
                flags.append("at_edge")
    cell = Cell(
        params=float(columns["params"][0]), tokens=float(np.median(columns["tokens"])),
        points=int(keep.sum()), best=best, curvature=curvature, flags=tuple(flags),
        used=not flags,
    )  # fmt: skip
    return cell, bowl


def _pairs(k: int) -> list[tuple[int, int]]:
    """Return the products of k things that a quadratic has."""
    return [(i, j) for i in range(k) for j in range(i, k)]


def _drawn(bowls: list[_Bowl], num: int, seed: int) -> list[dict]:
    """Return each bowl's best ln values [R] by name with noise added, NaN outside."""
    sds = valleys.moderated_sds(
        np.array([b.square for b in bowls]), np.array([b.freedom for b in bowls])
    )
    rng, found = np.random.default_rng(seed), []
    for bowl, sd in zip(bowls, sds, strict=True):
        noisy = bowl.loss + sd * rng.standard_normal((num, len(bowl.loss)))
        best, _ = bowl.lowest(noisy)
        best[~bowl.inside(best)] = np.nan
        found.append(dict(zip(bowl.names, best.T, strict=True)))
    return found


def _law(name: str, cells: list[Cell], drawn, rng) -> Law:
    """Return the law of one thing through the cells, or why there is none."""
    num, num_cells = 1 + len(TERMS), len(cells)
    if num_cells <= num:
        why = (f"{num} coefficients of {name} need more than {num} cells with a best "
               f"value inside, got {num_cells}")  # fmt: skip
        return Law(num_cells, skipped=why)
    logs = np.log([[getattr(cell, term) for term in TERMS] for cell in cells])
    centre = logs.mean(0)
    spread = np.linalg.svd(logs - centre, compute_uv=False)[-1] / np.sqrt(num_cells)
    if spread < MIN_SPREAD:
        why = (f"the cells do not tell {' from '.join(TERMS)} for {name}: they move "
               "together, or not at all")  # fmt: skip
        return Law(num_cells, skipped=why)
    design = np.column_stack([np.ones(num_cells), logs - centre])
    best = np.log([c.best[name] for c in cells])
    variance = lines.variance(drawn)
    hat = design @ np.linalg.pinv(design)
    rest = ((best - hat @ best) ** 2).sum()
    explained = ((1 - np.diag(hat)) * variance).sum()
    excess = np.sqrt(max(0.0, (rest - explained) / (num_cells - num)))
    weights = lines.precision(variance + excess**2)
    drawn = drawn + excess * lines.scatter(drawn.shape, num_cells - num, rng)
    fine = np.isfinite(drawn).sum(1) > num
    live = np.where(np.isfinite(drawn[fine]), weights, 0.0)
    line = _solve(design, best[None], weights[None])[0]
    draws = _solve(design, np.where(live > 0, drawn[fine], 0.0), live)
    for found in (line, draws):
        found[..., 0] -= found[..., 1:] @ centre
    if len(draws) < 2:
        why = f"under the noise no {num + 1} cells keep a best {name} inside"
        return Law(num_cells, skipped=why)
    return Law(num_cells, line, draws, float(excess))


def _solve(design, y, weights) -> np.ndarray:
    """Return weighted least squares [R, P] of y [R, n] on a design [n, P]."""
    root = np.sqrt(weights / weights.max(-1, keepdims=True))
    return (np.linalg.pinv(root[:, :, None] * design) @ (root * y)[:, :, None])[:, :, 0]


def _warnings(cells: list[Cell], laws: dict[str, Law]) -> list[str]:
    """Return sentences on cells left out and laws not found."""
    found = []
    out = [cell for cell in cells if not cell.used]
    if out:
        listed = "; ".join(
            f"N {c.params:.3g}, D {c.tokens:.3g}: {', '.join(c.flags)}" for c in out
        )
        found.append(f"{len(out)} of {len(cells)} cells left out ({listed}).")
    found += [
        f"No law of {name}: {law.skipped}." for name, law in laws.items() if law.skipped
    ]
    found += [
        f"The cells scatter about the law of {name} by {law.excess:.2f} in its "
        "logarithm beyond the noise; the intervals include it."
        for name, law in laws.items()
        if law.excess > 0.1
    ]
    return found
