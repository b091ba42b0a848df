"""The linear probe: multinomial logistic regression on features, by L-BFGS.

Legend beside the usual dims: N examples, C classes. Features are fixed, so the problem
is convex: what training a head with a learning rate would only come near to.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from fm_jax.errors import UserError

STRONGEST, WEAKEST = 10.0, 1e-4  # the path's ends at first; then it may go on
BOUNDS = (1e-8, 1e5)  # but not beyond
FACTOR = 10**0.5  # between strengths
GRADIENT = 1e-6  # nats: the largest entry of a gradient at what counts as the optimum
MAX_STEPS = 2_000  # of L-BFGS at each strength
MEMORY = 30  # pairs of L-BFGS


class Point(NamedTuple):
    """A strength on the path and what its optimum does; losses in nats per example."""

    l2: float
    train_accuracy: float
    valid_accuracy: float
    valid_loss: float


@dataclasses.dataclass(frozen=True, eq=False)
class Probe:
    """A classifier: logits are `x @ kernel.T + bias`; kernel [C, D], bias [C] float32.

    l2: the strength that was chosen; path: all that were tried, strongest first.
    """

    kernel: np.ndarray
    bias: np.ndarray
    l2: float
    path: list[Point]


def fit(
    x: np.ndarray,
    y: np.ndarray,
    x_valid: np.ndarray,
    y_valid: np.ndarray,
    num_classes: int,
) -> Probe:
    """Return the probe of features x [N, D] and targets y [N] that fits others best.

    At each strength the mean loss plus `l2 / 2 * ||kernel||^2` is minimised over
    features brought to mean 0 and standard deviation 1, the bias free, in float64; that
    scaling is folded into the kernel and bias returned. Strengths are a geometric path
    from strong to weak, each begun at the last one's optimum; where an end is best, the
    path goes on beyond it as far as BOUNDS. Best is the least loss on x_valid, y_valid,
    held-out examples of the same distribution; of equal ones the strongest. Nothing is
    fitted again to both.

    A strength counts where no entry of its gradient is above GRADIENT after MAX_STEPS:
    weaker ones than the first that fails, harder yet, are not tried.
    Raises UserError on features that are not finite, ValueError where the shapes do not
    fit, targets are not classes, or the strongest does not converge.
    """
    _check(x, y, x_valid, y_valid, num_classes)
    basis = _Basis.of(x)
    train = (basis.applied(x), np.asarray(y, np.int64))
    valid = (basis.applied(x_valid), np.asarray(y_valid, np.int64))
    start = np.zeros((num_classes, train[0].shape[1] + 1))

    def solved(l2, begin):
        """Return a strength's Point and weights; None where they are no optimum."""
        weights, gradient = minimised(*train, l2, start if begin is None else begin)
        if gradient > GRADIENT:
            return None
        train_accuracy, _ = _quality(weights, *train)
        return Point(l2, train_accuracy, *_quality(weights, *valid)), weights

    found = _path(solved)
    point, weights = found[_best(found)]
    kernel, bias = basis.folded(weights)
    return Probe(kernel, bias, point.l2, [one for one, _ in found])


def minimised(
    x: np.ndarray, y: np.ndarray, l2: float, start: np.ndarray
) -> tuple[np.ndarray, float]:
    """Return the weights [C, D + 1] of least regularised loss, the bias last.

    x, y as they are, float64; also the largest entry of the gradient there, absolute.
    """
    from scipy import optimize

    # In units in which every entry's curvature is about 1.
    squares = np.append(np.mean(x**2, axis=0), 1.0) / 4
    squares[:-1] += l2
    unit = 1 / np.sqrt(squares)

    def loss(flat):
        value, slope = loss_and_gradient(flat.reshape(start.shape) * unit, x, y, l2)
        return value, (slope * unit).ravel()

    found = optimize.minimize(
        loss,
        (start / unit).ravel(),
        jac=True,
        method="L-BFGS-B",
        options={
            "maxiter": MAX_STEPS,
            "maxfun": 2 * MAX_STEPS,
            "maxcor": MEMORY,
            "gtol": GRADIENT / 2 * min(1.0, unit.min()),
            "ftol": 0.0,
        },
    )
    weights = found.x.reshape(start.shape) * unit
    _, slope = loss_and_gradient(weights, x, y, l2)
    return weights, float(np.max(np.abs(slope)))


def loss_and_gradient(
    weights: np.ndarray, x: np.ndarray, y: np.ndarray, l2: float
) -> tuple[float, np.ndarray]:
    """Return the mean loss in nats with its penalty, and its gradient [C, D + 1]."""
    kernel_CD = weights[:, :-1]
    log_probs_NC = _log_probs(weights, x)
    rows = np.arange(len(y))
    penalty = l2 / 2 * np.sum(kernel_CD**2)
    loss = penalty - np.mean(log_probs_NC[rows, y])
    error_NC = np.exp(log_probs_NC)
    error_NC[rows, y] -= 1
    error_NC /= len(y)
    d_kernel_CD = error_NC.T @ x + l2 * kernel_CD
    return loss, np.column_stack([d_kernel_CD, error_NC.sum(axis=0)])


@dataclasses.dataclass(frozen=True, eq=False)
class _Basis:
    """Means and deviations of features, [D], and their principal axes [D, R].

    Turned to the axes the penalty stays what it was, and the curvature is about
    diagonal: hidden states vary by orders of magnitude more along some axes than along
    others, over which L-BFGS by itself takes thousands of steps.
    """

    mean: np.ndarray
    std: np.ndarray
    axes: np.ndarray

    @classmethod
    def of(cls, x: np.ndarray) -> "_Basis":
        x = np.asarray(x, np.float64)
        mean, std = x.mean(axis=0), x.std(axis=0)
        # A feature that is constant but for float32's rounding says nothing: left as
        # it is, about 0, and not blown up.
        std = np.where(std <= 1e-6 * np.abs(mean), 1.0, std)
        x = (x - mean) / std
        variances, axes = np.linalg.eigh(x.T @ x / len(x))
        # Along the others there is nothing, where features are more than examples.
        is_real = variances > len(variances) * np.finfo(np.float64).eps * variances[-1]
        return cls(mean, std, axes[:, is_real])

    def applied(self, x: np.ndarray) -> np.ndarray:
        return ((np.asarray(x, np.float64) - self.mean) / self.std) @ self.axes

    def folded(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the kernel and bias that take features as they were."""
        kernel_CD = weights[:, :-1] @ self.axes.T / self.std
        bias_C = weights[:, -1] - kernel_CD @ self.mean
        return kernel_CD.astype(np.float32), bias_C.astype(np.float32)


def _path(solved: Callable) -> list[tuple[Point, np.ndarray]]:
    """Return points and weights, strongest first, until the best is not at an end."""
    found = []

    def add(l2, *, weaker=True):
        one = solved(l2, found[-1 if weaker else 0][1] if found else None)
        if one is not None:
            found.insert(len(found) if weaker else 0, one)
        return one is not None

    count = round(np.log(STRONGEST / WEAKEST) / np.log(FACTOR)) + 1
    may_weaken = all(add(STRONGEST / FACTOR**n) for n in range(count))
    if not found:
        raise ValueError(
            f"the probe must converge at l2={STRONGEST}; got a gradient above "
            f"{GRADIENT} after {MAX_STEPS} steps."
        )
    while _best(found) == 0 and (l2 := found[0][0].l2 * FACTOR) <= BOUNDS[1]:
        if not add(l2, weaker=False):
            break
    while _best(found) == len(found) - 1 and may_weaken:
        l2 = found[-1][0].l2 / FACTOR
        may_weaken = l2 >= BOUNDS[0] and add(l2)
    return found


def _log_probs(weights, x):
    logits_NC = x @ weights[:, :-1].T + weights[:, -1]
    logits_NC -= logits_NC.max(axis=1, keepdims=True)
    return logits_NC - np.log(np.exp(logits_NC).sum(axis=1, keepdims=True))


def _quality(weights, x, y) -> tuple[float, float]:
    """Return accuracy and mean loss in nats."""
    log_probs_NC = _log_probs(weights, x)
    accuracy = np.mean(log_probs_NC.argmax(axis=1) == y)
    return float(accuracy), float(-np.mean(log_probs_NC[np.arange(len(y)), y]))


def _best(found) -> int:
    """Return which has the least loss; min takes the first of equal ones."""
    return min(range(len(found)), key=lambda i: found[i][0].valid_loss)


def _check(x, y, x_valid, y_valid, num_classes) -> None:
    for name, features, targets in (("x", x, y), ("x_valid", x_valid, y_valid)):
        if np.ndim(features) != 2 or len(features) != len(targets) or not len(targets):
            raise ValueError(
                f"{name} must have a row for each of its targets, and one at least; "
                f"got {np.shape(features)} and {np.shape(targets)}."
            )
        if not np.all(np.isfinite(features)):
            raise UserError(
                "features must be finite to be probed; got NaN or infinity from the "
                "model. Set --config.model.dtype=float32."
            )
        if np.min(targets) < 0 or np.max(targets) >= num_classes:
            raise ValueError(
                f"targets must be from 0 to {num_classes - 1}; got {np.min(targets)} "
                f"to {np.max(targets)}."
            )
