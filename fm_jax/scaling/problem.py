"""What is fitted, and how: the runs, the law, and the measure of a misfit."""

import dataclasses
import math

import numpy as np

from fm_jax.errors import UserError, unknown
from fm_jax.scaling import resamples, solver
from fm_jax.scaling.laws import Law
from fm_jax.tables.table import Points

# What each column must vary for, where the law has them free.
NEEDS = {
    "params": ("A", "alpha", "N_c", "alpha_N"),
    "tokens": ("B", "beta", "D_c", "alpha_D"),
}
FEW_RUNS = 30  # below this, a resample of whole rows may leave a law unidentified


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """Losses [n] of runs, the law's columns [n] for them, and the objective.

    The objective is the sum, times `weights` [n], of Huber(`delta`) over residuals of
    ln loss, or of loss where `space` is linear; delta 0 is least absolute deviation,
    inf least squares.
    """

    law: Law
    columns: dict[str, np.ndarray]
    loss: np.ndarray
    flops: np.ndarray
    clusters: np.ndarray
    weights: np.ndarray
    delta: float
    space: str

    def __len__(self) -> int:
        return len(self.loss)

    @property
    def num_clusters(self) -> int:
        """How many groups of runs are resampled together."""
        return len(np.unique(self.clusters))

    @property
    def min_runs(self) -> int:
        """The runs without which there is nothing to fit."""
        return len(self.law.names) + 1

    def unvaried(self) -> dict[str, list[str]]:
        """Return the columns that are one number, with what cannot be fitted so."""
        found = {}
        for column, needed in NEEDS.items():
            free = [name for name in needed if name in self.law.names]
            if column in self.columns and np.ptp(self.columns[column]) == 0 and free:
                found[column] = free
        return found

    def can_be_fitted(self) -> bool:
        """Return whether there are runs enough, and different ones."""
        return len(self) >= self.min_runs and not self.unvaried()

    def take(self, kept: np.ndarray) -> "Problem":
        """Return the problem of the runs that a mask or indices keep."""
        return dataclasses.replace(
            self,
            columns={name: column[kept] for name, column in self.columns.items()},
            loss=self.loss[kept],
            flops=self.flops[kept],
            clusters=self.clusters[kept],
            weights=self.weights[kept],
        )

    def fit(self) -> solver.Fitted:
        """Return the best parameters from many starts, with their certificate."""
        return solver.fit(
            self.columns,
            self.loss,
            self.law,
            delta=self.delta,
            space=self.space,
            weights=self.weights,
        )

    def draws(
        self, start: np.ndarray, *, kind: str, num: int, seed: int
    ) -> tuple[np.ndarray, int]:
        """Return [num, P] parameters of resampled runs, and how many did not converge.

        Those that did not are among the draws, where their search ended.
        """
        weights = resamples.weights(kind, self.clusters, num, seed)
        found, _, converged = self.refit(start, weights)
        return found, int(num - np.sum(converged))

    def refit(
        self, start: np.ndarray, weights: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return parameters [R, P], objectives [R], converged [R] of resamples."""
        return solver.refit(
            self.columns,
            self.loss,
            self.law,
            start,
            weights=weights * self.weights,
            delta=self.delta,
            space=self.space,
        )

    def predicted(self, theta: np.ndarray) -> np.ndarray:
        """Return the law's losses of the runs; theta [..., P] gives [..., n]."""
        return self.law.loss(theta, self.columns)

    def residuals(self, theta: np.ndarray) -> np.ndarray:
        """Return ln(loss / predicted) of each run."""
        return np.log(self.loss) - np.log(self.predicted(theta))

    def noise(self, theta: np.ndarray) -> float:
        """Return the sd of ln loss about the law: n - P degrees of freedom."""
        squares = float(np.sum(self.residuals(theta) ** 2))
        return math.sqrt(squares / (len(self) - len(self.law.names)))


def of(
    points: Points, law: Law, *, delta: float, space: str, weight: str = ""
) -> Problem:
    """Return the problem of fitting `law` to a table's runs.

    weight: the column of the runs' weights; "": all alike. Raises UserError when the
    table lacks what the law reads, or has too few runs.
    """
    columns = {}
    for name in law.columns:
        if name in ("params", "tokens"):
            columns[name] = getattr(points, name)
        elif name in points.extra and np.all(np.isfinite(points.extra[name])):
            columns[name] = points.extra[name]
        else:
            raise UserError(
                f"--law={law.name} must have {name} for each run; got "
                f"{'gaps in it' if name in points.extra else 'no such column'}. Name "
                f"the column with --map={name}=COLUMN, or choose another law."
            )
    made = Problem(
        law=law,
        columns=columns,
        loss=points.loss,
        flops=points.flops,
        clusters=points.cluster,
        weights=_weights(points, weight),
        delta=delta,
        space=space,
    )
    if len(made) < made.min_runs:
        raise UserError(
            f"--law={law.name} must have more runs than its {len(law.names)} "
            f"parameters; got {len(made)}. Add runs, or fix a parameter."
        )
    for column, free in made.unvaried().items():
        raise UserError(
            f"--law={law.name} must have runs of different {column}; got "
            f"{columns[column][0]:g} in each. Add others, or hold "
            f"{' and '.join(free)} with --fix."
        )
    return made


def _weights(points: Points, name: str) -> np.ndarray:
    if not name:
        return np.ones(len(points))
    if name not in points.extra:
        raise unknown("--weight", name, points.extra)
    weights = points.extra[name]
    wrong = ~(np.isfinite(weights) & (weights > 0))
    if wrong.any():
        raise UserError(
            f"--weight={name} must be > 0 in each row; got {weights[wrong][0]:g}. "
            "Exclude the row, or weight by another column."
        )
    return weights


def choose_resampling(problem: Problem) -> str:
    """Return how to resample runs where the user does not say.

    Clusters where some runs share a trunk or a group; weights from a Dirichlet (Rubin,
    1981) below FEW_RUNS, where whole rows left out would leave resamples without a fit.
    """
    num_clusters = problem.num_clusters
    if num_clusters in (1, len(problem)):
        return "bayesian" if len(problem) < FEW_RUNS else "pairs"
    return "bayesian_cluster" if num_clusters < FEW_RUNS else "cluster"


def objective_name(delta: float, space: str, weight: str = "") -> str:
    """Return the words for an objective."""
    of_what = "ln loss" if space == "log" else "loss"
    weighted = f", weighted by {weight}" if weight else ""
    if delta == 0:
        return f"least absolute deviation of {of_what}{weighted}"
    if math.isinf(delta):
        return f"least squares of {of_what}{weighted}"
    return f"Huber({delta:g}) of {of_what}, summed{weighted}"
