"""The procedure of Porian et al. (arXiv 2406.19146) for N* over C, as published."""

import numpy as np

from fm_jax.scaling import lines, resamples, valleys

SD_FLOOR = 0.33  # of the mean spacing of sizes


def fit(
    params,
    flops,
    *,
    loss,
    sigma: float,
    num_draws: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict:
    """Fit ln N* = k + a ln C as Porian et al. do (arXiv 2406.19146).

    Per budget the argmin of an Akima spline in log-log; budgets with it at an edge are
    dropped; `num_draws` refits with normal noise `sigma` (nats); budgets with under
    half of these inside are dropped; the standard deviation of ln N* has a floor of a
    third of the sizes' spacing and grows with the share refused; the medians are
    regressed with weights 1/sd^2, and the interval is that of the draws' regressions.
    `a_deterministic` is the line of least squares through the noise-free argmins.
    """
    params, flops, loss = (np.asarray(x, float) for x in (params, flops, loss))
    rng = np.random.default_rng(seed)
    budgets, plain, valid, sds, dropped = [], [], [], [], []
    for centre in np.unique(flops):
        x, y = np.log(params[flops == centre]), loss[flops == centre]
        if len(np.unique(x)) < valleys.MIN_COEFFICIENTS["akima"]:
            dropped.append(float(centre))
            continue
        point, _, away = valleys.minima(x, y[None], "akima")
        noisy = y + sigma * rng.standard_normal((num_draws, len(y)))
        drawn, _, edge = valleys.minima(x, noisy, "akima")
        fine = edge < 1
        if away[0] >= 1 or fine.sum() < num_draws // 2:
            dropped.append(float(centre))
            continue
        cells = (len(np.unique(x)) - 1) * valleys.GRID_PER_INTERVAL - 1
        floor = SD_FLOOR * valleys.GRID_PER_INTERVAL * np.ptp(x) / cells
        budgets.append(centre)
        plain.append(point[0])
        valid.append(drawn[fine])
        sds.append(max(drawn[fine].std(), floor) * num_draws / fine.sum())
    log_c, weights = np.log(budgets), 1 / np.square(sds)
    medians = np.array([np.median(v) for v in valid])
    coefficient, exponent = lines.line(log_c, medians, weights)
    shortest = min(map(len, valid))
    _, each = lines.line(log_c, np.stack([v[:shortest] for v in valid], 1), weights)
    return {
        "a": float(exponent),
        "coefficient": float(np.exp(coefficient)),
        "ci": {"a": resamples.interval(each, level).tolist()},
        "a_deterministic": float(
            lines.line(log_c, np.array(plain), np.ones(len(plain)))[1]
        ),
        "budgets": [float(c) for c in budgets],
        "params_optimum": np.exp(medians).tolist(),
        "sd": [float(s) for s in sds],
        "dropped": dropped,
    }
