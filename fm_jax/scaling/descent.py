"""Descents to the least misfit: damped Newton steps, of many lanes at once."""

import numpy as np

IN_CACHE = 60_000  # lanes times points that descend at once
MAX_STEPS = 500
FIRST_DAMPING, LEAST_DAMPING, MOST_DAMPING = 1e-4, 1e-12, 1e8
ROUNDING = 1e-15  # the residual of a point that is met exactly


def descend(model, x, weights, targets, delta: float, tolerance: float):
    """Return the coordinates `[R, P]`, misfits `[R]` and arrivals `[R]` of descents.

    `x` `[R, P]` is where they begin, in the coordinates of `model` (see misfit.py). A
    lane has arrived where a Newton step would take off no more than `tolerance` of its
    misfit. It tries that step, and where the step falls short of what it promised, one
    of reweighted least squares; each has its own damping. A lane that has arrived makes
    room for one that waits.
    """
    num = len(x)
    x, values, reached = x.copy(), np.full(num, np.inf), np.zeros(num, bool)
    lane = np.arange(min(pool(targets), num))
    waiting = len(lane)
    w, y, here = rows(weights, lane), rows(targets, lane), x[lane]
    damping, age = np.full((2, len(lane)), FIRST_DAMPING), np.zeros(len(lane), int)
    with np.errstate(all="ignore"):
        while len(lane):
            value, trial, trial_value, gain = _attempt(
                model, here, w, y, delta, damping[0], exact=True
            )
            enough = ROUNDING**2 * w.sum(axis=1) + tolerance * value
            arrived = (np.abs(gain) <= enough) & (damping[0] <= FIRST_DAMPING)
            good = trial_value < value - 0.1 * np.abs(gain)
            damping[0] = _damped(damping[0], good)
            short = np.flatnonzero(~good & ~arrived)
            if len(short):
                _, other, other_value, _ = _attempt(
                    model, here[short], rows(w, short), rows(y, short), delta,
                    damping[1, short], exact=False,
                )  # fmt: skip
                damping[1, short] = _damped(
                    damping[1, short], other_value < value[short]
                )
                better = other_value < trial_value[short]
                trial[short[better]] = other[better]
                trial_value[short[better]] = other_value[better]
            lower = trial_value < value
            here[lower] = trial[lower]
            age += 1
            stuck = (damping[0] > MOST_DAMPING) & (damping[1] > MOST_DAMPING)
            done = np.flatnonzero(arrived | stuck | (age >= MAX_STEPS))
            if not len(done):
                continue
            x[lane[done]] = here[done]
            values[lane[done]] = np.minimum(value, trial_value)[done]
            reached[lane[done]] = arrived[done]
            fresh = np.arange(waiting, min(waiting + len(done), num))
            waiting += len(fresh)
            slots, empty = done[: len(fresh)], done[len(fresh) :]
            lane[slots], here[slots], damping[:, slots] = fresh, x[fresh], FIRST_DAMPING
            age[slots] = 0
            for shared, all_rows in ((w, weights), (y, targets)):
                if len(all_rows) > 1:
                    shared[slots] = all_rows[fresh]
            if len(empty):
                left = np.delete(np.arange(len(lane)), empty)
                lane, here, age = lane[left], here[left], age[left]
                damping, w, y = damping[:, left], rows(w, left), rows(y, left)
    return x, values, reached


def pool(targets: np.ndarray) -> int:
    """Return how many lanes to hold at once."""
    return max(1, IN_CACHE // targets.shape[1])


def rows(array: np.ndarray, lanes: np.ndarray | slice) -> np.ndarray:
    """Return the rows of some lanes, or the one row that all lanes share."""
    return array if len(array) == 1 else array[lanes]


def _damped(damping, good):
    return np.maximum(np.where(good, damping * 0.1, damping * 8), LEAST_DAMPING)


def _attempt(model, x, weights, targets, delta, damping, *, exact):
    """Return the misfit, a step's end, the misfit there, and what the step promised."""
    value, slopes, bends = model.expand(x, weights, targets, delta, exact=exact)
    bound = ((x <= model.lower) & (slopes > 0)) | ((x >= model.upper) & (slopes < 0))
    if bound.any():  # these stay, and the others move as if they were constants
        slopes = np.where(bound, 0.0, slopes)
        bends = np.where(bound[:, :, None] | bound[:, None, :], 0.0, bends)
        bends[:, *np.diag_indices(x.shape[1])] += bound
    # In units in which every curvature is one, so that damping weighs all alike.
    unit = 1 / np.sqrt(np.abs(np.diagonal(bends, axis1=1, axis2=2)) + 1e-200)
    scaled = bends * unit[:, :, None] * unit[:, None, :]
    scaled[:, *np.diag_indices(x.shape[1])] += damping[:, None]
    try:
        step = np.linalg.solve(scaled, (slopes * unit)[..., None])[..., 0] * unit
    except np.linalg.LinAlgError:  # a lane is singular to the last bit
        scaled[:, *np.diag_indices(x.shape[1])] += 1e-9
        step = np.linalg.solve(scaled, (slopes * unit)[..., None])[..., 0] * unit
    gain = 0.5 * np.einsum("rp,rp->r", slopes, step)
    trial = np.clip(x - step, model.lower, model.upper)
    trial_value = model.value(trial, weights, targets, delta)
    return value, trial, np.where(np.isfinite(trial_value), trial_value, np.inf), gain
