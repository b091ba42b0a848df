"""The frontier of a law: which params and tokens reach the least loss at a compute.

Everything is at C = 6ND and holds for arrays of theta: a fit's point estimate or all of
its draws at once. Where a theta has no optimum, as when its loss falls for ever towards
one side, the answer is NaN: callers count those and say so.
"""

from collections.abc import Callable, Mapping

import numpy as np

Columns = Mapping[str, float]

NEAR = 0.005  # of the best loss: the flat range of params
_GRID = 96  # places that bracket a minimum before it is narrowed
_GOLDEN_STEPS = 40
_GOLDEN = (np.sqrt(5) - 1) / 2
_BISECTIONS = 60
_STENCIL = 0.02  # in ln, of the derivatives that polish a minimum
_ROUNDING = 1e-14
_MOST_TOKENS = np.log(1e40)


def optimum(
    law, theta: np.ndarray, flops, *, columns: Columns | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return (params, tokens) of least loss at `flops` = 6 * params * tokens.

    `theta` [..., P] and `flops` broadcast: theta [R, 1, P] with flops [M] gives [R, M].
    `columns` holds what else the law reads, one number each. In closed form for
    E + A/N^alpha + B/D^beta (Hoffmann et al., 2203.15556): G = (alpha A / (beta
    B))^(1/(alpha+beta)), N* = G (C/6)^(beta/(alpha+beta)); otherwise by search in ln N
    between one parameter and one token. NaN where no optimum lies between.
    """
    theta, flops = _checked(theta, flops)
    power = law.power(theta)
    if power is None:
        return search(law, theta, flops, columns=columns)
    _, a, b, alpha, beta = power
    with np.errstate(all="ignore"):
        ln_g = (np.log(alpha * a) - np.log(beta * b)) / (alpha + beta)
        ln_params = ln_g + beta / (alpha + beta) * np.log(flops / 6)
        has = (np.stack(np.broadcast_arrays(a, b, alpha, beta)) > 0).all(0)
        params = np.where(has, np.exp(ln_params), np.nan)
        return params, flops / 6 / params


def search(
    law, theta: np.ndarray, flops, *, columns: Columns | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return what `optimum` does, for any law, by search in ln N.

    The loss along C = 6ND must have one minimum; the lowest of a grid is narrowed.
    """
    theta, flops = _checked(theta, flops)
    ln_most = np.log(flops / 6)
    found = _minimum(
        _along(law, theta, flops, columns), np.zeros_like(ln_most), ln_most
    )
    return np.exp(found), np.exp(ln_most - found)


def flat_range(
    law, theta: np.ndarray, flops, *, columns: Columns | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return (least, most) params whose loss at `flops` is near the best one there.

    Near is within the fraction NEAR. A side on which the loss never leaves it ends at
    one parameter, or at one token.
    """
    theta, flops = _checked(theta, flops)
    best, _ = optimum(law, theta, flops, columns=columns)
    along = _along(law, theta, flops, columns)
    centre, ends = np.log(best), (np.zeros_like(best), np.log(flops / 6))
    limit = (1 + NEAR) * along(centre[..., None])[..., 0]
    sides = [
        np.exp(_crossing(lambda x: along(x[..., None])[..., 0] - limit, centre, end))
        for end in ends
    ]
    return sides[0], sides[1]


def tokens_of(
    law, theta: np.ndarray, params, *, columns: Columns | None = None
) -> np.ndarray:
    """Return the tokens that make `params` the optimum of their compute.

    There the loss is stationary along C = 6ND. NaN where no number of tokens does.
    """
    theta, params = _checked(theta, params)
    return np.exp(_stationary(law, theta, columns, params=np.log(params)))


def params_of(
    law, theta: np.ndarray, tokens, *, columns: Columns | None = None
) -> np.ndarray:
    """Return the params for which `tokens` are the optimum of their compute."""
    theta, tokens = _checked(theta, tokens)
    return np.exp(_stationary(law, theta, columns, tokens=np.log(tokens)))


def _checked(theta, *amounts) -> list[np.ndarray]:
    """Return float64 arrays whose leading dims have been broadcast together."""
    theta = np.asarray(theta, float)
    amounts = [np.asarray(amount, float) for amount in amounts]
    shape = np.broadcast_shapes(theta.shape[:-1], *(a.shape for a in amounts))
    theta = np.broadcast_to(theta, (*shape, theta.shape[-1]))
    return [theta, *(np.broadcast_to(amount, shape) for amount in amounts)]


def _loss(law, theta, at: dict, columns: Columns | None) -> np.ndarray:
    """Return the loss [..., n] at `at` [..., n]; inf where it is not a number."""
    shape = np.broadcast_shapes(*(value.shape for value in at.values()))
    extra = {name: np.full(shape, value) for name, value in (columns or {}).items()}
    with np.errstate(all="ignore"):
        found = law.loss(theta, {**at, **extra})
    return np.where(np.isnan(found), np.inf, found)


def _along(law, theta, flops, columns) -> Callable[[np.ndarray], np.ndarray]:
    """Return the loss as a function of ln params [..., n] at a compute [...]."""

    def loss(ln_params):
        params = np.exp(ln_params)
        at = {"params": params, "tokens": flops[..., None] / 6 / params}
        return _loss(law, theta, at, columns)

    return loss


def _minimum(function, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Return where `function` of [..., n] is least between bounds [...]; NaN at one."""
    grid = low[..., None] + (high - low)[..., None] * np.linspace(0, 1, _GRID)
    with np.errstate(all="ignore"):
        index = function(grid).argmin(-1)[..., None]
        left, right = (
            np.take_along_axis(grid, np.clip(index + step, 0, _GRID - 1), -1)[..., 0]
            for step in (-1, 1)
        )
        for _ in range(_GOLDEN_STEPS):
            span = _GOLDEN * (right - left)
            pair = np.stack([right - span, left + span], -1)
            lower, upper = np.moveaxis(function(pair), -1, 0)
            left = np.where(lower <= upper, left, pair[..., 0])
            right = np.where(lower <= upper, pair[..., 1], right)
        found = _polished(function, (left + right) / 2)
    inside = (index[..., 0] > 0) & (index[..., 0] < _GRID - 1)
    return np.where(inside, found, np.nan)


def _polished(function, found: np.ndarray) -> np.ndarray:
    """Return a minimum to more digits than values alone give it, by its slopes.

    Not where the value is then higher: a kink has no slopes that say more.
    """
    tried = found
    for _ in range(2):
        f = function(tried[..., None] + _STENCIL * np.arange(-2, 3))
        slope = (f @ np.array([1, -8, 0, 8, -1])) / (12 * _STENCIL)
        curve = (f @ np.array([-1, 16, -30, 16, -1])) / (12 * _STENCIL**2)
        step = -slope / curve
        tried = tried + np.where(np.abs(step) < _STENCIL, step, 0)
    before, after = np.moveaxis(function(np.stack([found, tried], -1)), -1, 0)
    is_lower = after <= before + _ROUNDING * np.abs(before)
    return np.where(is_lower, tried, found)


def _crossing(function, inner: np.ndarray, outer: np.ndarray) -> np.ndarray:
    """Return where `function` turns from <= 0 at `inner` to > 0; `outer` if nowhere."""
    with np.errstate(all="ignore"):
        reached = function(outer) > 0
        inside, outside = inner.astype(float), outer.astype(float)
        for _ in range(_BISECTIONS):
            middle = (inside + outside) / 2
            holds = function(middle) <= 0
            inside = np.where(holds, middle, inside)
            outside = np.where(holds, outside, middle)
    found = np.where(reached, (inside + outside) / 2, outer)
    return np.where(np.isnan(inner), np.nan, found)


def _stationary(law, theta, columns, *, params=None, tokens=None) -> np.ndarray:
    """Return ln of the amount left out, such that loss is stationary along C = 6ND."""
    given = tokens if params is None else params
    shifts = _STENCIL * np.array([-2, -1, 1, 2])

    def slope(x):
        ln_params, ln_tokens = (x, given) if params is None else (given, x)
        at = {
            "params": np.exp(ln_params[..., None] + shifts),
            "tokens": np.exp(ln_tokens[..., None] - shifts),
        }
        found = _loss(law, theta, at, columns) @ np.array([1, -8, 8, -1])
        # Of few params, more at the same compute gain; for few tokens they lose.
        return found if params is None else -found

    low, high = np.zeros_like(given), np.full_like(given, _MOST_TOKENS)
    found = _crossing(slope, low, high)
    with np.errstate(all="ignore"):
        exists = (slope(low) < 0) & (slope(high) > 0)
    return np.where(exists, found, np.nan)
