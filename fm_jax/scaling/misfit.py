"""The misfit of points to a law: its value, gradient and curvature, for many lanes.

A lane is one fit among many that descend together: a start, or a resample. Shapes: R
lanes, n points, P coordinates. Weights and targets are `[R, n]`, or `[1, n]` where all
lanes share them. Coordinates are those in which a fit descends; theta is what people
read. The misfit is the sum of w Huber(r) over residuals r, target less model.
"""

from collections.abc import Mapping

import numpy as np

from fm_jax.scaling.laws import Law

LARGEST_LOG = 300.0  # of a positive parameter, and of its inverse
LARGEST_EXPONENT = 20.0
STEP = 3e-5  # of differences: their errors, cut and rounded, stay below 1e-6


def measured(residuals: np.ndarray, weights: np.ndarray, delta: float) -> np.ndarray:
    """Return the misfit `[R]`: r^2/2 up to delta, a line beyond; |r| for delta 0."""
    size = np.abs(residuals)
    if delta > 0:
        inside = np.minimum(size, delta)
        size -= 0.5 * inside
        size *= inside
    return np.einsum("rn,rn->r", weights, size)


def _pulls(residuals, weights, delta, exact):
    """Return each point's misfit slope and curvature `[R, n]` by its residual.

    The curvature is the second derivative if `exact`, else that of the parabola that
    touches the misfit at the residual and lies above it everywhere (reweighted least
    squares), which a step can rely on from afar.
    """
    size = np.abs(residuals)
    slopes = np.clip(residuals, -delta, delta)
    slopes *= weights
    if exact:
        return slopes, weights * (size <= delta)
    np.maximum(size, 1e-300, out=size)
    return slopes, weights * np.minimum(1.0, delta / size)


class PowerMisfit:
    """That of E + A/N^alpha + B/D^beta, with tied and held parameters, in closed form.

    The coordinates are E, the logarithms of A/N^alpha and B/D^beta at the centre of the
    points, alpha and beta: `full = matrix @ coordinates + offset` are all five.
    """

    # Which term (A's, B's, E's) and power of (1, ln N, ln D) a derivative by each of
    # the five has, and its sign.
    TERM = np.array([2, 0, 1, 0, 1])
    POWER = np.array([0, 0, 0, 1, 2])
    SIGN = np.array([1.0, 1.0, 1.0, -1.0, -1.0])
    # Rows of products: of terms (AA, BB, EE, AB, AE, BE), then their columns: of powers
    # (1, u, v, uu, vv, uv).
    TERMS = np.array([[0, 3, 4], [3, 1, 5], [4, 5, 2]])
    POWERS = np.array([[0, 1, 2], [1, 3, 5], [2, 5, 4]])

    def __init__(self, law: Law, columns: Mapping[str, np.ndarray], space: str):
        u, v = np.log(columns["params"]), np.log(columns["tokens"])
        self._law, self._log = law, space == "log"
        self._centres = np.array([u.mean(), v.mean()])
        self._u, self._v = u - u.mean(), v - v.mean()
        u, v = self._u, self._v
        self._powers = np.stack([np.ones_like(u), u, v, u * u, v * v, u * v], axis=1)
        self._matrix = np.zeros((5, len(law.names)))
        self._offset = np.zeros(5)
        for i, name in enumerate(law.places):
            if name in law.names:
                self._matrix[i, law.names.index(name)] = 1.0
            else:
                held = law.held[name]
                self._offset[i] = np.log(held) if i in (1, 2) else held
        for i, centre in zip((1, 2), self._centres, strict=True):
            if law.places[i] in law.held:  # then its term at the centre moves with it
                self._matrix[i] -= centre * self._matrix[i + 2]
                self._offset[i] -= centre * self._offset[i + 2]
        self._plain = np.array_equal(self._matrix, np.eye(5))
        of = dict(zip(law.places, ("E", "A", "B", "alpha", "beta"), strict=True))
        most = {"E": np.inf, "A": LARGEST_LOG, "B": LARGEST_LOG}
        self.upper = np.array([most.get(of[n], LARGEST_EXPONENT) for n in law.names])
        self.lower = np.where([of[n] == "E" for n in law.names], 0.0, -self.upper)

    def coordinates(self, theta: np.ndarray) -> np.ndarray:
        """Return the coordinates `[R, P]` of theta `[R, P]`."""
        values = self._law.values(theta)
        E, A, B, alpha, beta = (values[name] for name in self._law.places)
        first = np.log(A) - alpha * self._centres[0]
        second = np.log(B) - beta * self._centres[1]
        return self._fitted(E, first, second, alpha, beta)

    def theta(self, x: np.ndarray) -> np.ndarray:
        """Return theta `[R, P]` at the coordinates `[R, P]`."""
        E, first, second, alpha, beta = self._full(x).T
        A = np.exp(first + alpha * self._centres[0])
        B = np.exp(second + beta * self._centres[1])
        return self._fitted(E, A, B, alpha, beta)

    def value(self, x, weights, targets, delta: float) -> np.ndarray:
        """Return the misfit `[R]` at the coordinates `[R, P]`."""
        model = self._model(x)[2]
        if self._log:
            np.log(model, out=model)
        return measured(np.subtract(targets, model, out=model), weights, delta)

    def expand(self, x, weights, targets, delta: float, *, exact: bool):
        """Return the misfit `[R]`, its gradient `[R, P]` and curvature `[R, P, P]`."""
        first, second, model = self._model(x)
        if self._log:
            residuals = targets - np.log(model)
            third = np.reciprocal(model, out=model)
            first *= third
            second *= third
        else:
            residuals, third = targets - model, np.ones_like(model)
        slopes, bends = _pulls(residuals, weights, delta, exact)
        value = measured(residuals, weights, delta)
        if exact and self._log:
            bends += slopes
        terms = first, second, third
        rows = np.empty((9, *model.shape))
        for i in range(3):
            np.multiply(slopes, terms[i], out=rows[i])
            np.multiply(bends, terms[i], out=rows[3 + i])
        np.multiply(rows[3], second, out=rows[6])
        np.multiply(rows[3], third, out=rows[7])
        np.multiply(rows[4], third, out=rows[8])
        for i in range(3):
            rows[3 + i] *= terms[i]
        if exact:
            rows[3:5] -= rows[:2]
        sums = (rows.reshape(-1, rows.shape[-1]) @ self._powers).reshape(9, -1, 6)
        gradient = -self.SIGN[:, None] * sums[self.TERM, :, self.POWER]
        products = self.TERMS[self.TERM[:, None], self.TERM]
        powers = self.POWERS[self.POWER[:, None], self.POWER]
        curvature = sums[3 + products, :, powers]
        curvature *= (self.SIGN[:, None] * self.SIGN)[..., None]
        gradient, curvature = gradient.T, curvature.transpose(2, 0, 1)
        if self._plain:
            return value, gradient, np.ascontiguousarray(curvature)
        return (
            value,
            gradient @ self._matrix,
            self._matrix.T @ curvature @ self._matrix,
        )

    def _full(self, x):
        return x if self._plain else x @ self._matrix.T + self._offset

    def _fitted(self, *five):
        found = dict(zip(self._law.places, five, strict=True))
        return np.stack([found[name] for name in self._law.names], axis=-1)

    def _model(self, x):
        """Return A's and B's term and the loss, each `[R, n]`."""
        E, first, second, alpha, beta = self._full(x).T[:, :, None]
        first, second = first - alpha * self._u, second - beta * self._v
        np.exp(first, out=first)
        np.exp(second, out=second)
        model = first + second
        model += E
        return first, second, model


class NumericMisfit:
    """That of any law, by differences of its losses.

    The coordinates are the logarithms of the parameters of scale log, and the others.
    """

    def __init__(self, law: Law, columns: Mapping[str, np.ndarray], space: str):
        self._law, self._columns, self._log = law, columns, space == "log"
        scales = np.array([law.scale(name) for name in law.names])
        self._logs = scales == "log"
        self.upper = np.where(self._logs, LARGEST_LOG, np.inf)
        self.lower = np.where(scales == "linear", 0.0, -self.upper)

    def coordinates(self, theta: np.ndarray) -> np.ndarray:
        """Return the coordinates `[R, P]` of theta `[R, P]`."""
        return np.where(self._logs, np.log(np.where(self._logs, theta, 1.0)), theta)

    def theta(self, x: np.ndarray) -> np.ndarray:
        """Return theta `[R, P]` at the coordinates `[R, P]`."""
        return np.where(self._logs, np.exp(np.where(self._logs, x, 0.0)), x)

    def value(self, x, weights, targets, delta: float) -> np.ndarray:
        """Return the misfit `[R]` at the coordinates `[R, P]`."""
        return measured(targets - self._model(x), weights, delta)

    def expand(self, x, weights, targets, delta: float, *, exact: bool):
        """Return the misfit `[R]`, its gradient `[R, P]` and curvature `[R, P, P]`."""
        sizes = STEP * np.where(self._logs, 1.0, np.maximum(np.abs(x), 0.1))
        steps = sizes[:, None] * np.eye(x.shape[1])  # [R, P, P]
        here = self._model(x)
        ahead = [self._model(x + steps[:, i]) for i in range(x.shape[1])]
        behind = [self._model(x - steps[:, i]) for i in range(x.shape[1])]
        slopes, bends = _pulls(targets - here, weights, delta, exact)
        spans = sizes.T[:, :, None]
        jacobian = (np.stack(ahead) - np.stack(behind)) / (2 * spans)  # [P, R, n]
        gradient = -np.einsum("rn,prn->rp", slopes, jacobian)
        curvature = np.einsum("prn,qrn->rpq", bends * jacobian, jacobian)
        if exact:
            for i in range(x.shape[1]):
                for j in range(i + 1):
                    if i == j:
                        bend = ahead[i] + behind[i] - 2 * here
                    else:
                        both = self._model(x + steps[:, i] + steps[:, j])
                        bend = both - ahead[i] - ahead[j] + here
                    bend = np.einsum("rn,rn->r", slopes, bend)
                    curvature[:, i, j] -= bend / (sizes[:, i] * sizes[:, j])
                    curvature[:, j, i] = curvature[:, i, j]
        return measured(targets - here, weights, delta), gradient, curvature

    def _model(self, x):
        loss = self._law.loss(self.theta(x), self._columns)
        return np.log(loss) if self._log else loss


def of(law: Law, columns: Mapping[str, np.ndarray], space: str):
    """Return the misfit of a law to points at columns `[n]`, in log or linear space."""
    kind = NumericMisfit if law.places is None else PowerMisfit
    return kind(law, columns, space)
