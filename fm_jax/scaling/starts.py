"""Where fits begin: values of a law's parameters to descend from."""

from collections.abc import Mapping, Sequence

import numpy as np

EXPONENTS = np.linspace(0.05, 2.0, 40)
NUM_BEST = 8  # of the grid of exponents, beside its local optima
SPREAD = 13  # and every so many exponents, however bad: optima that the grid misses
NUM_RANDOM = 4096
RATIOS = np.geomspace(0.2, 5.0, 9)  # of alpha_N to alpha_D
SMALL_EXPONENTS = np.geomspace(0.02, 1.0, 12)  # alpha_D
FLOORS = np.array([0.0, 0.25, 0.5, 0.7, 0.85, 0.95])  # E over the least loss
REPETITIONS = ((15.0, 5.0), (5.0, 15.0), (50.0, 50.0), (2.0, 2.0))  # R_D, R_N


def power(
    places: Sequence[str],
    held: Mapping[str, float],
    columns: Mapping[str, np.ndarray],
    loss: np.ndarray,
) -> dict[str, np.ndarray]:
    """Return starts `[S]` of E + A/N^alpha + B/D^beta by the names in its `places`.

    For given exponents the law is linear in E, A and B, so that the best of these in
    relative least squares solve three linear equations (variable projection). Of a grid
    of exponents, the local optima, the best few and some spread over it are kept.
    """
    grids = [
        np.array([held[name]]) if name in held else EXPONENTS for name in places[3:]
    ]
    logs = [np.log(columns[name]) for name in ("params", "tokens")]
    centres = [log.mean() for log in logs]
    terms = [
        np.exp(-grid[:, None] * (log - centre))
        for grid, log, centre in zip(grids, logs, centres, strict=True)
    ]
    exponents = np.stack(np.meshgrid(*grids, indexing="ij"), axis=-1)
    known = np.full((*exponents.shape[:2], 3), np.nan)
    for i, name in enumerate(places[:3]):
        if name in held:
            at_centre = exponents[..., i - 1] * centres[i - 1] if i else 0.0
            known[..., i] = held[name] * np.exp(-at_centre)
    found, misfit = _project(_products(*terms, loss), known, loss.min())
    if places[3] == places[4]:
        misfit = np.where(exponents[..., 0] == exponents[..., 1], misfit, np.inf)
    chosen = _chosen(misfit)
    exponents, found = exponents[chosen], found[chosen]
    found[:, 1:] *= np.exp(exponents * centres)
    return dict(zip(places, np.concatenate([found, exponents], axis=1).T, strict=True))


def kaplan(
    columns: Mapping[str, np.ndarray], loss: np.ndarray, floors: np.ndarray
) -> dict[str, np.ndarray]:
    """Return starts `[S]` of E + ((N_c/N)^(alpha_N/alpha_D) + D_c/D)^alpha_D, E floors.

    For given E and exponents, (L - E)^(1/alpha_D) is linear in N_c^(alpha_N/alpha_D)
    and in D_c.
    """
    floor, power, ratio = (
        x.ravel() for x in np.meshgrid(floors, SMALL_EXPONENTS, RATIOS, indexing="ij")
    )
    u, v = np.log(columns["params"]), np.log(columns["tokens"])
    centre = u.mean()
    above = np.maximum(loss - floor[:, None], 1e-3 * loss)
    # Each equation over its right side, so that all count alike in relative terms.
    over = -np.log(above) / power[:, None]
    first = np.exp(over - ratio[:, None] * (u - centre))
    second = np.exp(over - v)
    parts = np.stack([first, second], axis=-1)
    scale = np.linalg.norm(parts, axis=1, keepdims=True)
    parts = parts / scale
    normal = np.einsum("sni,snj->sij", parts, parts) + 1e-9 * np.eye(2)
    found = np.linalg.solve(normal, parts.sum(axis=1)[..., None])[..., 0]
    found = np.maximum(found, 1e-3) / scale[:, 0]
    N_c = np.exp(centre + np.log(found[:, 0]) / ratio)
    return {"E": floor, "N_c": N_c, "D_c": found[:, 1],
            "alpha_N": power * ratio, "alpha_D": power}  # fmt: skip


def data_constrained(
    held: Mapping[str, float], columns: Mapping[str, np.ndarray], loss: np.ndarray
) -> dict[str, np.ndarray]:
    """Return starts `[S]`: those without repetition, each with some R_D and R_N."""
    found = power(("E", "A", "B", "alpha", "beta"), held, columns, loss)
    each = len(found["E"])
    ratios = np.repeat(REPETITIONS, each, axis=0)
    found = {name: np.tile(value, len(REPETITIONS)) for name, value in found.items()}
    return found | {"R_D": ratios[:, 0], "R_N": ratios[:, 1]}


def random(scales: Mapping[str, str], loss: np.ndarray) -> dict[str, np.ndarray]:
    """Return draws `[S]` for each name by its scale, the same ones every time."""
    rng = np.random.default_rng(0)
    draw = {
        "log": lambda: np.exp(rng.uniform(np.log(1e-2), np.log(1e4), NUM_RANDOM)),
        "linear": lambda: rng.uniform(0, loss.min(), NUM_RANDOM),
        "signed": lambda: rng.standard_normal(NUM_RANDOM),
    }
    return {name: draw[scale]() for name, scale in scales.items()}


def _products(first: np.ndarray, second: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Return the sums `[G, H, 4, 4]` of products of 1, two terms and -loss, by loss^-2.

    The terms are `[G, n]` and `[H, n]`, one row for each exponent.
    """
    rows = np.concatenate([np.ones((1, len(loss))), first, second, -loss[None]])
    sums = (rows * loss**-2.0) @ rows.T
    g, h = np.meshgrid(np.arange(len(first)), np.arange(len(second)), indexing="ij")
    index = np.stack([0 * g, 1 + g, 1 + len(first) + h, 0 * g - 1], axis=-1)
    return sums[index[..., :, None], index[..., None, :]]


def _project(
    products: np.ndarray, known: np.ndarray, least_loss: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the best E, A, B `[G, H, 3]` and their misfit `[G, H]`; NaN is not known.

    E is at least 0; A and B are more than 0, as their logarithms are fitted.
    """
    found = _solve(products, known)
    without = np.concatenate([np.zeros_like(known[..., :1]), known[..., 1:]], axis=-1)
    found = np.where(found[..., :1] < 0, _solve(products, without), found)
    found[..., 1:] = np.where(
        np.isnan(known[..., 1:]), np.maximum(found[..., 1:], 1e-3 * least_loss),
        known[..., 1:],
    )  # fmt: skip
    full = np.concatenate([found, np.ones_like(found[..., :1])], axis=-1)
    return found, np.einsum("ghi,ghij,ghj->gh", full, products, full)


def _solve(products: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Return the coefficients `[G, H, 3]` of least squares, those known kept."""
    free = np.isnan(known[0, 0])
    found = np.where(free, 0.0, known)
    if not free.any():
        return found
    right = -products[..., :3, 3] - np.einsum(
        "ghij,ghj->ghi", products[..., :3, :3], found
    )
    left = products[..., :3, :3][..., free, :][..., free]
    ridge = 1e-12 * np.trace(left, axis1=-2, axis2=-1)[..., None, None]
    left = left + ridge * np.eye(int(free.sum()))
    found[..., free] = np.linalg.solve(left, right[..., free, None])[..., 0]
    return found


def _chosen(misfit: np.ndarray) -> np.ndarray:
    """Return which of a grid `[G, H]` of misfits to start from."""
    around = np.pad(misfit, 1, constant_values=np.inf)
    rows, columns = misfit.shape
    neighbours = [
        around[i : i + rows, j : j + columns] for i in range(3) for j in range(3)
    ]
    chosen = misfit <= np.min(neighbours, axis=0)
    chosen.ravel()[np.argsort(misfit, axis=None)[:NUM_BEST]] = True
    chosen[::SPREAD, ::SPREAD] = True
    return chosen & np.isfinite(misfit)
