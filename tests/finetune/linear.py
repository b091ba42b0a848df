"""Two-layer linear networks to fine-tune, as in Kumar et al. 2022 (arXiv 2202.10054).

A network is v^T B x with features B [K, D], K of them, and a head v [K]; the truth is
one, w = B_true^T v_true, without noise. Inputs in distribution lie in a subspace of M
dims, K < M < D; those out of distribution go everywhere. NumPy and float64.
"""

import dataclasses

import numpy as np

D, K, M, NUM_EXAMPLES = 24, 4, 18, 60
RATE = 0.05  # small beside the curvatures here, which are below 10: as gradient flow
NUM_STEPS, STILL = 200_000, 1e-13  # and the slope at which nothing moves any more


@dataclasses.dataclass(frozen=True)
class Task:
    """What is to be learnt from what: examples x [N, D], y [N] = x @ w, and w.

    `seen` [M, D] are orthonormal directions, of the inputs in distribution.
    """

    x: np.ndarray
    y: np.ndarray
    w: np.ndarray
    seen: np.ndarray

    def errors(self, w: np.ndarray) -> tuple[float, float]:
        """Return the mean squared errors of x @ w, in and out of distribution.

        Of inputs whose second moment is one, in the subspace and everywhere.
        """
        off = w - self.w
        return float(np.sum((self.seen @ off) ** 2)), float(np.sum(off**2))


@dataclasses.dataclass(frozen=True)
class Tuned:
    """Where gradient descent ends, and the least error out of distribution on the way.

    The first weights count.
    """

    head: np.ndarray
    features: np.ndarray
    least_error: float

    @property
    def w(self) -> np.ndarray:
        return self.features.T @ self.head


def directions(rng: np.random.Generator, count: int) -> np.ndarray:
    """Return orthonormal directions drawn alike, [count, D]."""
    return np.linalg.qr(rng.standard_normal((D, count)))[0].T


def make(rng: np.random.Generator) -> tuple[Task, np.ndarray]:
    """Return a task and the features [K, D] that it is made of; ||w|| = 1."""
    features, seen = directions(rng, K), directions(rng, M)
    head = rng.standard_normal(K)
    w = features.T @ (head / np.linalg.norm(head))
    x = rng.standard_normal((NUM_EXAMPLES, M)) @ seen
    return Task(x, x @ w, w, seen), features


def turned(rng: np.random.Generator, features: np.ndarray, sine: float) -> np.ndarray:
    """Return features whose every principal angle to the given ones has this sine."""
    away = rng.standard_normal(features.shape)
    away -= away @ features.T @ features
    away = np.linalg.qr(away.T)[0].T
    return np.sqrt(1 - sine**2) * features + sine * away


def probed(task: Task, features: np.ndarray) -> np.ndarray:
    """Return the head of least squares on features: linear probing's limit."""
    return np.linalg.lstsq(task.x @ features.T, task.y, rcond=None)[0]


def tuned(task: Task, head: np.ndarray, features: np.ndarray) -> Tuned:
    """Return what descent on half the mean squared error makes of both layers."""
    moment = task.x.T @ task.x / len(task.x)
    least = np.inf
    for _ in range(NUM_STEPS):
        w = features.T @ head
        least = min(least, task.errors(w)[1])
        slope = moment @ (w - task.w)
        if np.max(np.abs(slope)) < STILL:
            return Tuned(head, features, least)
        d_head, d_features = features @ slope, np.outer(head, slope)
        head, features = head - RATE * d_head, features - RATE * d_features
    raise AssertionError("descent has not come to rest")
