"""What a design tells about a law before it is run: linear-Gaussian information.

Near theta, ln loss is linear in theta and its noise is a Gaussian of known sd, so the
runs' places alone give the covariance that a fit to them would have. A quantity that
the runs do not determine has an infinite variance, never a small one.
"""

import math
from collections.abc import Callable, Mapping

import numpy as np

from fm_jax.errors import UserError
from fm_jax.scaling import frontier, resamples

LEAST_DRAWS = 100  # of an ensemble, for a covariance to mean something
_STEP = 1e-3  # of the differences, relative to each parameter
_RANK = 1e-8  # singular values below this share of the largest tell nothing
_SHARE = 1e-5  # of a gradient along such directions that is still rounding


def jacobian(law, theta: np.ndarray, columns: Mapping) -> np.ndarray:
    """Return d ln loss / d theta [n, P] at columns of n runs, by fourth-order steps."""
    columns = {name: np.asarray(value, float) for name, value in columns.items()}
    return _slopes(lambda t: np.log(law.loss(t, columns)), theta)


def optimum_sd(
    law,
    theta: np.ndarray,
    columns: Mapping,
    noise,
    flops: float,
    *,
    target: Mapping | None = None,
) -> dict[str, float]:
    """Return the sd that a fit to these runs has of the optimum at `flops`.

    `params` and `tokens`: of ln N* and ln D*; `loss`: of the loss there, nats a token;
    `a`: of d ln N* / d ln C there. `target` holds what else the law reads, for that
    optimum. inf where the runs, or theta itself, determine none.
    """
    columns = {name: np.asarray(value, float) for name, value in columns.items()}
    told = _Information(jacobian(law, theta, columns), noise, theta)
    slopes = _slopes(lambda t: _optimum(law, t, flops, target), theta)
    names = ("params", "tokens", "loss", "a")
    if not np.isfinite(slopes).all():
        return dict.fromkeys(names, math.inf)
    variances = np.diag(told.covariance(slopes))
    return dict(zip(names, np.sqrt(variances).tolist(), strict=True))


def inflation(noise: float, delta: float) -> float:
    """Return by how much a Huber fit's sd exceeds that of least squares.

    For Gaussian noise of sd `noise` and a threshold `delta` (Huber, 1964): sqrt(E
    psi^2) / (E psi' sd), from 1 at inf to sqrt(pi / 2) at 0, least absolute deviations.
    """
    if noise <= 0 or math.isinf(delta):
        return 1.0
    k = delta / noise
    if k < 1e-6:
        return math.sqrt(math.pi / 2)
    within = math.erf(k / math.sqrt(2))
    density = math.exp(-k * k / 2) / math.sqrt(2 * math.pi)
    squared = within - 2 * k * density + k * k * (1 - within)
    return math.sqrt(squared) / within


def run_noise(fit: Mapping, noise: float | None = None) -> float:
    """Return the sd of ln loss that a run is worth to a fit made as `fit` was.

    Its residual_sd where `noise` is not given, by the inflation of its objective. In
    linear space that has its threshold in nats: there a loss in the middle of the runs'
    stands for all. Raises UserError for a fit without residuals.
    """
    if noise is None:
        noise = fit["approach3"]["residual_sd"]
        if not noise:
            raise UserError(
                f"residual_sd of the fit must be > 0; got {noise}. Give the sd of a "
                "run's ln loss as --noise."
            )
    delta, is_linear = fit["options"]["delta"], fit["options"]["space"] == "linear"
    unit = math.sqrt(math.prod(fit["range"]["loss"])) if is_linear else 1.0
    return noise * inflation(noise * unit, math.inf if delta is None else delta)


class Ensemble:
    """Draws of a fit, with what each of them says of the optimum at the target."""

    def __init__(self, draws, law, target_flops: float, columns):
        draws = np.asarray(draws, float)
        params, _ = frontier.optimum(law, draws, target_flops, columns=columns)
        has = np.isfinite(params)
        if has.sum() < LEAST_DRAWS:
            raise UserError(
                f"suggest must have {LEAST_DRAWS} draws with an optimum at the "
                f"target; got {has.sum()} of {len(has)}. Fit with more bootstraps, or "
                "with runs that bracket the optimum."
            )
        self.warnings = []
        if not has.all():
            self.warnings.append(
                f"{(~has).sum()} of {len(has)} draws have no optimum at the target and "
                "are left out: the sd before is too small."
            )
        self._law, self._columns = law, columns or {}
        self._draws, self._asked = draws[has], np.log(params[has])
        self.sd = float(self._asked.std(ddof=1))
        self.median = float(np.exp(np.median(self._asked)))

    def centre(self, flops: float) -> float:
        """Return the median of the draws' N* at a compute."""
        params, _ = frontier.optimum(
            self._law, self._draws, flops, columns=self._columns
        )
        return float(np.nanmedian(params))

    def joint(self, params: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Return the covariance [n + 1, n + 1] of ln losses there and, last, ln N*."""
        at = {"params": params, "tokens": tokens}
        at |= {name: np.full(len(params), v) for name, v in self._columns.items()}
        shown = np.log(self._law.loss(self._draws, at))
        return np.cov(np.column_stack([shown, self._asked]), rowvar=False)

    def sd_after(self, params: np.ndarray, tokens: np.ndarray, noise: float) -> float:
        """Return the sd of what is asked once runs are done at these places."""
        joint = self.joint(params, tokens)
        shown = joint[:-1, :-1] + noise**2 * np.eye(len(params))
        told = joint[-1, :-1] @ np.linalg.solve(shown, joint[:-1, -1])
        return math.sqrt(max(joint[-1, -1] - told, 0.0))

    def interval(self, sd: float) -> list[float]:
        """Return the draws' 95 % interval of N*, drawn in to an sd."""
        ends = resamples.interval(self._asked) - math.log(self.median)
        return (self.median * np.exp(ends * sd / self.sd)).tolist()


class _Information:
    """Whitened slopes in well-scaled coordinates, and which directions they leave."""

    def __init__(self, slopes: np.ndarray, noise, theta: np.ndarray):
        noise = np.broadcast_to(np.asarray(noise, float), (len(slopes),))
        if not (noise > 0).all():
            raise ValueError(f"noise must be > 0; got {noise.min()}.")
        whitened = slopes / noise[:, None] * _scale(theta)
        norms = np.linalg.norm(whitened, axis=0)
        self._scale = _scale(theta) / np.where(norms > 0, norms, 1)
        upper = np.linalg.qr(slopes / noise[:, None] * self._scale, mode="r")
        _, values, self._directions = np.linalg.svd(upper, full_matrices=True)
        known = values > _RANK * values.max(initial=0)
        self._known = np.zeros(len(self._directions), bool)
        self._known[: len(values)] = known
        self._values = values[known]

    def covariance(self, gradients: np.ndarray) -> np.ndarray:
        """Return the covariance [K, K] of quantities with these gradients [K, P]."""
        along = gradients * self._scale @ self._directions.T
        lost = np.linalg.norm(along[:, ~self._known], axis=1)
        is_open = lost > _SHARE * np.linalg.norm(along, axis=1)
        weighted = along[:, self._known] / self._values
        found = weighted @ weighted.T
        found[is_open] = found[:, is_open] = np.inf
        return found


def _optimum(law, theta: np.ndarray, flops: float, target) -> np.ndarray:
    """Return ln N*, ln D*, loss and local exponent a [..., 4] of theta [..., P]."""
    near = flops * np.exp([-0.1, 0.0, 0.1])
    params, tokens = frontier.optimum(law, theta[..., None, :], near, columns=target)
    at = {"params": params[..., 1:2], "tokens": tokens[..., 1:2]}
    extra = {name: np.full(1, value) for name, value in (target or {}).items()}
    loss = law.loss(theta, at | extra)[..., 0]
    growth = np.log(params[..., 2] / params[..., 0]) / 0.2
    return np.stack(
        [np.log(params[..., 1]), np.log(tokens[..., 1]), loss, growth], axis=-1
    )


def _slopes(function: Callable, theta: np.ndarray) -> np.ndarray:
    """Return the slopes [n, P] of a function of theta [..., P] -> [..., n]."""
    theta = np.asarray(theta, float)
    steps = np.diag(_STEP * _scale(theta))
    shifted = theta + np.arange(-2, 3)[:, None, None] * steps  # [5, P, P]
    values = function(shifted)  # [5, P, n]
    weights = np.array([1, -8, 0, 8, -1]) / 12
    return np.tensordot(weights, values, 1).T / np.diag(steps)


def _scale(theta: np.ndarray) -> np.ndarray:
    """Return the size of each parameter; 1 of one that is zero."""
    size = np.abs(np.asarray(theta, float))
    return np.where(size > 0, size, 1.0)
