"""Noisy runs of a known law, as tables, for the tests of what reads them."""

import csv
import pathlib

import numpy as np

# Hoffmann et al. (arXiv 2203.15556), approach 3, as printed.
TRUTH = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}


def loss(params, tokens) -> np.ndarray:
    """Return the law's loss in nats per token."""
    t = TRUTH
    return t["E"] + t["A"] / params ** t["alpha"] + t["B"] / tokens ** t["beta"]


def isoflop(
    *, budgets=(1e18, 1e19, 1e20, 1e21), sizes=9, noise=2e-3, seed=0
) -> dict[str, np.ndarray]:
    """Return columns of runs on isoFLOP slices about the law's optimum."""
    rng = np.random.default_rng(seed)
    t = TRUTH
    total = t["alpha"] + t["beta"]
    g = (t["alpha"] * t["A"] / t["beta"] / t["B"]) ** (1 / total)
    budget = np.repeat(budgets, sizes)
    best = g * (budget / 6) ** (t["beta"] / total)
    params = best * np.tile(np.geomspace(1 / 6, 6, sizes), len(budgets))
    tokens = budget / 6 / params
    noisy = loss(params, tokens) * np.exp(noise * rng.standard_normal(len(params)))
    return {"params": params, "tokens": tokens, "loss": noisy}


def write(path: pathlib.Path, columns: dict[str, np.ndarray]) -> pathlib.Path:
    """Write columns as a .csv and return its path."""
    with open(path, "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return path
