"""fm bench fit: laws as fm fit fits them, in turn with a loop over SciPy.

The loop is what notebooks have: one `scipy.optimize` call for each start and resample,
the gradient by differences. It would take minutes, so of its starts and resamples only
a sample is run and the rest is reckoned.
"""

import contextlib
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from fm_jax.bench import ratios
from fm_jax.scaling import laws, problem, resamples
from fm_jax.tables import table

NUM_RUNS, NOISE = 240, 5e-3
DELTA = 1e-3  # of the Huber loss, as in Hoffmann et al.
# Hoffmann et al. (arXiv 2203.15556), appendix D.2: a, b, e, alpha, beta.
GRID = (np.arange(0, 30, 5), np.arange(0, 30, 5), np.arange(-1, 1.5, 0.5),
        np.arange(0, 2.5, 0.5), np.arange(0, 2.5, 0.5))  # fmt: skip


def fit(
    runs: str = "",
    *,
    rounds: int,
    num_draws: int = 4000,
    sample: int = 100,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Return seconds of the point fit and of `num_draws` bootstraps, ours and a loop's.

    runs: a table that `fm fit` reads; "": made-up runs of a published law, with noise.
    sample: of the loop's starts and resamples, those that are run. All on one core.
    Of each ours is said how far the loop's worst and best end lie above it, relative.
    """
    points = table.read(runs) if runs else made_up()
    asked = problem.of(points, laws.LAWS["chinchilla"], delta=DELTA, space="log")
    weights = resamples.weights("pairs", asked.clusters, num_draws, seed=0)
    sample = min(sample, num_draws)
    rng = np.random.default_rng(0)
    fits: dict[str, list[float]] = {"point": [], "bootstrap": []}
    loops: dict[str, list[float]] = {"point": [], "bootstrap": []}
    gaps = []
    with _one_core():
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            point, draws, ends = ours(asked, weights)
            chosen = rng.choice(num_draws, sample, replace=False)
            loop_draws, loop_ends = bootstraps(asked, weights[chosen])
            grid = list(itertools.product(*GRID))
            starts = rng.choice(len(grid), min(sample, len(grid)), replace=False)
            loop_point = starts_of(asked, [grid[index] for index in starts])
            fits["point"].append(point)
            fits["bootstrap"].append(draws)
            loops["point"].append(loop_point * len(grid) / len(starts))
            loops["bootstrap"].append(loop_draws * num_draws / sample)
            gaps.append(loop_ends / ends[chosen] - 1)
    found = {"runs": len(asked), "resamples": num_draws}
    for side, times in (("fit", fits), ("loop", loops)):
        for name, seconds in times.items():
            found[f"{name}_{side}_seconds"] = statistics.median(seconds)
    both = [np.sum(list(times.values()), axis=0).tolist() for times in (loops, fits)]
    paired = ratios.paired(*both)
    return found | {
        "ratio": paired["median"],
        "ratio_low": paired["low"],
        "ratio_high": paired["high"],
        "loop_ends_above_most": float(np.max(gaps)),
        "loop_ends_above_least": float(np.min(gaps)),
    }


def ours(
    asked: problem.Problem, weights: np.ndarray
) -> tuple[float, float, np.ndarray]:
    """Return seconds of the point fit and of the resamples, and where these end."""
    began = time.perf_counter()
    fitted = asked.fit()
    point = time.perf_counter() - began
    _, ends, _ = asked.refit(fitted.theta, weights)
    return point, time.perf_counter() - began - point, ends


def bootstraps(asked: problem.Problem, weights: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the loop's seconds for resamples [R, n] from one start, and its ends."""
    from scipy import optimize

    logs, law = _logs(asked), laws.PUBLISHED["hoffmann"].values
    start = [*(np.log(law[n]) for n in ("A", "B", "E")), law["alpha"], law["beta"]]
    ends = []
    began = time.perf_counter()
    for row in weights:
        again = np.repeat(np.arange(len(asked)), row.astype(int))
        drawn = tuple(x[again] for x in logs)
        ends.append(optimize.minimize(objective, start, drawn, method="BFGS").fun)
    return time.perf_counter() - began, np.array(ends)


def starts_of(asked: problem.Problem, starts: list[tuple]) -> float:
    """Return the loop's seconds for the point fit from `starts`."""
    from scipy import optimize

    logs = _logs(asked)
    began = time.perf_counter()
    for start in starts:
        optimize.minimize(objective, start, logs, method="L-BFGS-B")
    return time.perf_counter() - began


def objective(x: np.ndarray, u: np.ndarray, v: np.ndarray, y: np.ndarray) -> float:
    """Return the summed Huber loss of ln loss at x = (ln A, ln B, ln E, alpha, beta).

    u, v, y [n]: ln params, ln tokens, ln loss.
    """
    a, b, e, alpha, beta = x
    guess = np.logaddexp(np.logaddexp(a - alpha * u, b - beta * v), e)
    size = np.abs(y - guess)
    huber = np.where(size <= DELTA, size**2 / 2, DELTA * (size - DELTA / 2))
    return float(huber.sum())


def made_up() -> table.Points:
    """Return runs drawn around a published law, with noise in ln loss."""
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


def _logs(asked: problem.Problem) -> tuple[np.ndarray, ...]:
    columns = asked.columns
    return tuple(np.log(x) for x in (columns["params"], columns["tokens"], asked.loss))


@contextlib.contextmanager
def _one_core() -> Iterator[None]:
    """Keep this process on one core within the block, where the system lets it."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
