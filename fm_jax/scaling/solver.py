"""Fits of a law to points: the best of many starts, and many resamples at once."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from fm_jax import errors
from fm_jax.errors import UserError
from fm_jax.scaling import descent, misfit
from fm_jax.scaling.laws import Law, fixed

SPACES = ("log", "linear")
MAX_STARTS = 32
TOLERANCE = 1e-13  # of the misfit, that a Newton step would still take off
ON_THE_WAY = 1e-6  # the same, at a delta that is only passed through
WIDE = (0.1, 0.01)  # deltas passed through on the way to a smaller one
# Least absolute deviations are the limit of small deltas: the last moves the parameters
# by a part in 1e9 or so.
TO_ABSOLUTE = tuple(10.0**-k for k in range(3, 11))
FLAT = 1e-6  # the slope of a certified optimum; the share of a parameter without effect
SAME = 1e-6  # relative, of misfits of starts that agree
SAME_THETA = 1e-3  # relative, of parameters of starts that agree


@dataclasses.dataclass(frozen=True)
class Fitted:
    """The best parameters found, and why to believe that they are.

    `gradient_norm` is the largest slope of the misfit along a coordinate, over the root
    of twice the misfit times its curvature: for least squares, the cosine between the
    residuals and a column of the Jacobian. `at_bound` names the parameters without
    effect on any point's loss, such as an E that went to zero. `unique` says whether
    the agreeing starts agree on the parameters too.
    """

    theta: np.ndarray  # [P] in the order of law.names
    objective: float  # sum of w Huber(r), or of w |r| for delta 0
    gradient_norm: float
    num_starts: int
    num_agreeing: int
    converged: bool
    unique: bool
    at_bound: tuple[str, ...]


def fit(
    columns: Mapping[str, np.ndarray],
    loss: np.ndarray,
    law: Law,
    *,
    delta: float = 1e-3,
    space: str = "log",
    weights: np.ndarray | None = None,
) -> Fitted:
    """Return the parameters with the least misfit to n points, from all the starts.

    The misfit is the sum (not the mean: arXiv:2404.10102 tells what that does) of
    Huber(delta) over residuals of ln loss, or of loss in linear space. A delta of inf
    is least squares, of 0 least absolute deviations. Weights are `[n]`.

    Raises UserError for points that no law can be fitted to.
    """
    loss = _checked(columns, loss, law, delta, space)
    model = misfit.of(law, columns, space)
    rows = np.ones((1, len(loss))) if weights is None else _row(weights, len(loss))
    targets = np.log(loss)[None] if space == "log" else loss[None]
    deltas = _deltas(delta)
    x = _within(model, law.starts(columns, loss))
    if len(x) > MAX_STARTS:
        x = x[np.argsort(_values(model, x, rows, targets, deltas[0]))[:MAX_STARTS]]
    for each in deltas:
        enough = TOLERANCE if each == deltas[-1] else ON_THE_WAY
        x, _, _ = descent.descend(model, x, rows, targets, each, enough)
    found = _judged(model, x, rows, targets, law, columns, delta)
    if not found.converged:  # in a valley that may end where a parameter is zero
        for i, name in enumerate(law.names):
            if law.scale(name) == "linear" and len(law.names) > 1:
                held = fixed(law, **{name: 0})
                end = fit(
                    columns, loss, held, delta=delta, space=space, weights=weights
                )
                x = np.append(
                    x, _within(model, np.insert(end.theta, i, 0)[None]), axis=0
                )
        found = _judged(model, x, rows, targets, law, columns, delta)
    return found


def refit(
    columns: Mapping[str, np.ndarray],
    loss: np.ndarray,
    law: Law,
    start: np.ndarray,
    *,
    weights: np.ndarray | None = None,
    losses: np.ndarray | None = None,
    delta: float = 1e-3,
    space: str = "log",
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return parameters `[R, P]`, misfits `[R]` and whether each converged `[R]`.

    Each of R fits has its own weights `[R, n]` (of resamples), its own losses `[R, n]`
    (of simulations), or both, and descends from `start`, `[P]` or `[R, P]`.
    """
    loss = _checked(columns, loss, law, delta, space)
    given = [array for array in (weights, losses) if array is not None]
    num = len(given[0]) if given else 1
    for name, array in (("weights", weights), ("losses", losses)):
        if array is not None and array.shape != (num, len(loss)):
            raise ValueError(
                f"{name} must be [R, n]; got {array.shape} for R = {num}, "
                f"n = {len(loss)}"
            )
    model = misfit.of(law, columns, space)
    weights = np.ones((1, len(loss))) if weights is None else weights
    targets = loss[None] if losses is None else losses
    if space == "log":
        if not (targets > 0).all():
            raise ValueError(
                f"losses must be above 0 to be fitted in log space; got "
                f"{targets.min()}. Fit in linear space."
            )
        targets = np.log(targets)
    x = _within(model, np.broadcast_to(start, (num, len(law.names))))
    deltas = TO_ABSOLUTE if delta == 0 else (delta,)
    for each in deltas:
        enough = TOLERANCE if each == deltas[-1] else ON_THE_WAY
        x, values, reached = descent.descend(model, x, weights, targets, each, enough)
    left = np.flatnonzero(~reached)
    if len(left):  # those whose last steps were lost in rounding have arrived too
        slopes = _slopes(
            model,
            x[left],
            descent.rows(weights, left),
            descent.rows(targets, left),
            each,
        )
        reached[left] = (slopes < FLAT).all(axis=1)
    if delta == 0:
        values = _values(model, x, weights, targets, delta)
    return model.theta(x), values, reached


def _judged(model, x, weights, targets, law, columns, delta) -> Fitted:
    """Return the best of the ends `[S, P]` of descents, with what vouches for it."""
    values = _values(model, x, weights, targets, delta)
    best = int(np.argmin(values))
    if not np.isfinite(values[best]):
        raise UserError(
            f"{law.name} must have a finite misfit from some start; got none from "
            f"{len(x)} starts. Begin elsewhere (START of a law's file)."
        )
    theta = model.theta(x)
    rounding = weights.sum() * (descent.ROUNDING if delta == 0 else descent.ROUNDING**2)
    agreeing = values <= values[best] * (1 + SAME) + rounding
    matters = _effects(law, theta[best], columns) > FLAT
    apart = np.abs(theta[agreeing] - theta[best]) > SAME_THETA * np.abs(theta[best])
    last = _deltas(delta)[-1]
    slopes = _slopes(model, x[best : best + 1], weights, targets, last)[0]
    slope = float(np.max(slopes[matters], initial=0.0))
    return Fitted(
        theta=theta[best],
        objective=float(values[best]),
        gradient_norm=slope,
        num_starts=len(x),
        num_agreeing=int(agreeing.sum()),
        converged=slope < FLAT,
        unique=not (apart & matters).any(),
        at_bound=tuple(np.array(law.names)[~matters].tolist()),
    )


def _within(model, theta) -> np.ndarray:
    """Return the coordinates `[R, P]` of theta, within their bounds."""
    with np.errstate(divide="ignore"):
        return np.clip(model.coordinates(theta), model.lower, model.upper)


def _checked(columns, loss, law, delta, space) -> np.ndarray:
    """Return the losses after checks of everything that a fit reads."""
    if space not in SPACES:
        raise errors.unknown("space", space, SPACES)
    if not delta >= 0:
        raise UserError(
            f"delta must be 0 or more; got {delta}. 0 is least absolute deviations, "
            "inf least squares."
        )
    loss = np.asarray(loss, np.float64)
    if len(loss) < len(law.names):
        raise UserError(
            f"a fit of {law.name} must have at least {len(law.names)} points, one for "
            f"each parameter; got {len(loss)}. Add runs, or hold parameters."
        )
    for name, values in (("loss", loss), *((c, columns.get(c)) for c in law.columns)):
        if values is None:
            raise UserError(
                f"a fit of {law.name} must have the column {name}; got "
                f"{', '.join(columns)}. Add it, or choose another law."
            )
        wrong = ~(np.isfinite(values) & (np.asarray(values) > 0))
        if wrong.any():
            at = int(np.flatnonzero(wrong)[0])
            raise UserError(
                f"{name} must be finite and above 0 at every point; got "
                f"{values[at]} at point {at}. Exclude it."
            )
    return loss


def _row(weights: np.ndarray, num: int) -> np.ndarray:
    """Return weights `[1, n]`."""
    weights = np.asarray(weights, np.float64)
    if weights.shape != (num,) or not (weights >= 0).all() or not weights.any():
        raise ValueError(
            f"weights must be {num} numbers of 0 or more, not all 0; got an array of "
            f"shape {weights.shape}"
        )
    return weights[None]


def _deltas(delta: float) -> tuple[float, ...]:
    """Return the deltas that a fit from afar passes through."""
    if delta == 0:
        return (*WIDE, *TO_ABSOLUTE)
    return (*(wide for wide in WIDE if wide > delta), delta)


def _values(model, x, weights, targets, delta) -> np.ndarray:
    """Return the misfits `[R]`, infinite where the law has no finite value."""
    found = np.empty(len(x))
    with np.errstate(all="ignore"):
        pool = descent.pool(targets)
        for first in range(0, len(x), pool):
            part = slice(first, first + pool)
            found[part] = model.value(
                x[part], descent.rows(weights, part), descent.rows(targets, part), delta
            )
    return np.where(np.isfinite(found), found, np.inf)


def _effects(law, theta, columns) -> np.ndarray:
    """Return how far a relative change of each parameter moves any ln loss, `[P]`."""
    step = 1e-4
    changed = theta * (1 + step * np.concatenate([np.eye(len(theta)), [0 * theta]]))
    with np.errstate(all="ignore"):
        logs = np.log(law.loss(changed, columns))
    return np.abs(logs[:-1] - logs[-1]).max(axis=1) / step


def _slopes(model, x, weights, targets, delta) -> np.ndarray:
    """Return the slopes `[R, P]` that certify an optimum (see Fitted), 0 at a bound."""
    with np.errstate(all="ignore"):
        value, slopes, bends = model.expand(x, weights, targets, delta, exact=False)
        diagonal = np.diagonal(bends, axis1=1, axis2=2)
        found = np.abs(slopes) / np.sqrt(2 * value[:, None] * diagonal)
    outward = ((x <= model.lower) & (slopes > 0)) | ((x >= model.upper) & (slopes < 0))
    # Where all residuals are rounding, nothing is left to descend.
    exact = value <= descent.ROUNDING**2 * weights.sum(axis=1)
    return np.where(outward | exact[:, None], 0.0, found)
