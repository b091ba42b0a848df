"""The fit as a loop over SciPy does it, timed beside ours in the same process.

    python -m fm_jax.scaling.naive [TABLE] [CONDITION...]

One core, rounds in turn; without a table, 240 runs drawn from a published law. The loop
is what notebooks have: one `scipy.optimize` call a start or resample, the gradient by
differences. Of its starts and resamples SAMPLE are run and the rest is reckoned.
"""

import itertools
import os
import sys
import time

import numpy as np

from fm_jax.scaling import laws, problem, resamples
from fm_jax.tables import table

SAMPLE, NUM_DRAWS, ROUNDS = 100, 4000, 3
NUM_RUNS, NOISE = 240, 5e-3
# Hoffmann et al. (arXiv 2203.15556), appendix D.2: a, b, e, alpha, beta.
GRID = (np.arange(0, 30, 5), np.arange(0, 30, 5), np.arange(-1, 1.5, 0.5),
        np.arange(0, 2.5, 0.5), np.arange(0, 2.5, 0.5))  # fmt: skip


def objective(x: np.ndarray, u: np.ndarray, v: np.ndarray, y: np.ndarray) -> float:
    """Return the summed Huber(1e-3) of ln loss at x = (ln A, ln B, ln E, alpha, beta).

    u, v, y [n]: ln params, ln tokens, ln loss.
    """
    a, b, e, alpha, beta = x
    guess = np.logaddexp(np.logaddexp(a - alpha * u, b - beta * v), e)
    size = np.abs(y - guess)
    return float(np.where(size <= 1e-3, size**2 / 2, 1e-3 * (size - 5e-4)).sum())


def compare(asked: problem.Problem, rng: np.random.Generator) -> dict[str, float]:
    """Return seconds of ours and of the loop, and how much better ours ends.

    `above` is the most, `below` the least, by which the loop's objective exceeds ours.
    """
    from scipy import optimize

    logs = [np.log(asked.columns[name]) for name in ("params", "tokens")]
    logs.append(np.log(asked.loss))
    weights = resamples.weights("pairs", asked.clusters, NUM_DRAWS, seed=0)
    began = time.perf_counter()
    fitted = asked.fit()
    point = time.perf_counter() - began
    began = time.perf_counter()
    _, ours, _ = asked.refit(fitted.theta, weights)
    draws = time.perf_counter() - began

    start = laws.PUBLISHED["hoffmann"].values
    start = [np.log(start[n]) for n in ("A", "B", "E")] + [
        start["alpha"],
        start["beta"],
    ]
    chosen = rng.choice(NUM_DRAWS, SAMPLE, replace=False)
    ends = []
    began = time.perf_counter()
    for row in weights[chosen]:
        again = np.repeat(np.arange(len(asked)), row.astype(int))
        resampled = tuple(x[again] for x in logs)
        ends.append(optimize.minimize(objective, start, resampled, method="BFGS").fun)
    loop_draws = (time.perf_counter() - began) * NUM_DRAWS / SAMPLE
    grid = list(itertools.product(*GRID))
    began = time.perf_counter()
    for index in rng.choice(len(grid), SAMPLE, replace=False):
        optimize.minimize(objective, grid[index], tuple(logs), method="L-BFGS-B")
    loop_point = (time.perf_counter() - began) * len(grid) / SAMPLE
    gaps = np.array(ends) / ours[chosen] - 1
    return {
        "point": point,
        "draws": draws,
        "loop_point": loop_point,
        "loop_draws": loop_draws,
        "ratio": (loop_point + loop_draws) / (point + draws),
        "above": float(gaps.max()),
        "below": float(gaps.min()),
    }


def main(argv: list[str]) -> None:
    """Print the rounds."""
    if argv:
        points = table.read(argv[0], exclude=tuple(argv[1:]))
    else:
        points = _drawn()
    asked = problem.of(points, laws.LAWS["chinchilla"], delta=1e-3, space="log")
    print(f"{len(asked)} runs, point fit by all starts and {NUM_DRAWS:,} resamples")
    rng = np.random.default_rng(0)
    for _ in range(ROUNDS):
        found = compare(asked, rng)
        print(
            f"ours {found['point']:.3f} + {found['draws']:.3f} s; the loop "
            f"{found['loop_point']:.0f} + {found['loop_draws']:.0f} s: "
            f"{found['ratio']:.0f} times; the loop ends {found['below']:.0e} to "
            f"{found['above']:.0e} above ours"
        )


def _drawn() -> table.Points:
    rng = np.random.default_rng(0)
    law = laws.PUBLISHED["epoch"]
    flops = 10 ** rng.uniform(18.5, 22, NUM_RUNS)
    params = np.sqrt(flops / 120) * np.exp(rng.uniform(-1.5, 1.5, NUM_RUNS))
    columns = {"params": params, "tokens": flops / 6 / params}
    loss = laws.LAWS[law.law].loss(law.theta, columns)
    names = np.arange(NUM_RUNS).astype(str)
    return table.Points(
        **columns,
        loss=loss * np.exp(NOISE * rng.standard_normal(NUM_RUNS)),
        flops=flops,
        cluster=names,
        is_final=np.ones(NUM_RUNS, bool),
        run=names,
        budget=np.full(NUM_RUNS, np.nan),
        extra={},
        record={},
    )


if __name__ == "__main__":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    main(sys.argv[1:])
