"""Noise-free isoFLOP slices of laws of known optimum, and published tables of runs."""

import csv
import json
import pathlib

import numpy as np
import pytest

from fm_jax.scaling import laws

DATA = pathlib.Path(__file__).parents[3] / "shared" / "data" / "scaling"
CHINCHILLA = (1.69, 406.4, 410.7, 0.34, 0.28)
SURFACES = {
    "symmetric": (1.69, 400, 400, 0.31, 0.31),
    "chinchilla": CHINCHILLA,
    "asym": (1.69, 406.4, 410.7, 0.465, 0.155),
}
LAW = laws.find("chinchilla")


def optimum(theta, flops):
    """Return N* and D* in closed form."""
    _, a, b, alpha, beta = theta
    ratio = (alpha * a / (beta * b)) ** (1 / (alpha + beta))
    params = ratio * (flops / 6) ** (beta / (alpha + beta))
    return params, flops / (6 * params)


def true_line(theta):
    """Return the coefficients of ln N* and ln D* in closed form."""
    alpha, beta = theta[3:]
    at_one = np.log(optimum(theta, 1.0))
    share = np.array([beta, alpha]) / (alpha + beta)
    return np.array([at_one[0], share[0], at_one[1], share[1]])


def surface(theta=CHINCHILLA, *, width=4.0, points=7, budgets=5, drift=0.0, off=0.0):
    """Return noise-free columns and losses: windows of +-width about each optimum.

    `off` moves the windows by e-folds, `drift` by as many per e-fold of C.
    """
    flops = np.repeat(np.geomspace(1e17, 1e21, budgets), points)
    moved = np.exp(off + drift * np.log(flops / 1e19))
    window = np.tile(np.geomspace(1 / width, width, points), budgets)
    params = optimum(theta, flops)[0] * window * moved
    tokens = flops / (6 * params)
    columns = {"params": params, "tokens": tokens, "flops": flops}
    return columns, LAW.loss(np.array(theta), columns)


def load(name):
    """Return a published table's columns, or skip the test where it is not."""
    if not (DATA / name).is_file():
        pytest.skip("the published tables in shared/data/scaling are not there")
    with open(DATA / name) as file:
        rows = list(csv.DictReader(file))
    return {
        column: np.array(
            [row[column] for row in rows], str if column == "group" else float
        )
        for column in ("params", "tokens", "flops", "loss", "group")
    }


def expected(name):
    """Return a published number with its tolerance."""
    wanted = json.loads((DATA / "expected.json").read_text())[name]
    return pytest.approx(wanted["expected"], rel=wanted["rtol"], abs=wanted["atol"])
