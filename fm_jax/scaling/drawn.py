"""The rows of numbers that each figure of a fit draws."""

import math

import numpy as np

from fm_jax.scaling import axes, files, frontier, resamples, slices
from fm_jax.scaling import fit as fits

BEYOND = 100.0  # how far past the largest compute of the runs the frontier is drawn
MAX_RUNS = 2000  # rows of the table, and draws, that a figure shows at most
MAX_DRAWS = 1000
MAX_NUMERIC_DRAWS = 400  # where a law's optimum has no closed form
MAX_NAMED = 6  # outliers named in the residuals
EXACT = 1e-9  # a relative difference that is rounding
OUTLIER = 5.0  # robust standard deviations from the median residual

APPROACHES = {
    "approach3": "parametric (approach 3)",
    "approach2": "isoFLOP (approach 2)",
    "approach1": "envelope (approach 1)",
}


def tables(fit: fits.Fit) -> dict[str, list[dict]]:
    """Return the rows that each figure draws, by the figure's name.

    A name is absent where there is nothing to draw: `isoflop` without slices, `draws`
    without a bootstrap, `cut` without held-out runs. Rows of one table have the same
    keys; `series` says what a row is, and None stands where it has no such value.
    """
    made = {
        "isoflop": _isoflop(fit),
        "frontier": _frontier(fit),
        "residuals": _residuals(fit),
        "contours": _contours(fit),
        "draws": _draws(fit),
        "cut": _cut(fit.record),
    }
    return {name: _level(rows) for name, rows in made.items() if rows}


def series(rows: list[dict]) -> dict[str, dict[str, np.ndarray]]:
    """Return the columns of each series; those that it has nothing of are NaN."""
    found = {}
    for row in rows:
        found.setdefault(row["series"], []).append(row)
    return {
        series: {n: _array([row[n] for row in mine]) for n in mine[0] if n != "series"}
        for series, mine in found.items()
    }


def _array(values: list) -> np.ndarray:
    kinds = {type(value) for value in values}
    kind = bool if kinds == {bool} else object if str in kinds else float
    return np.array(values, dtype=kind)


def _isoflop(fit) -> list[dict]:
    points, record = fit.points, fit.record["approach2"]
    found = record.get("slices", [])
    if not found:
        return []
    planned = points.budget if np.isfinite(points.budget).any() else None
    of, _ = slices.assign(points.flops, budget=planned)
    budgets = np.array([*(one["budget"] for one in found), np.nan])  # the last at -1
    shown = _thinned(points)
    rows = _rows("run", budget=budgets[of[shown]], **_runs(points, "params", "loss"))
    for index, one in enumerate(found):
        rows += _rows(
            "minimum",
            budget=one["budget"],
            params=one["params_optimum"],
            loss=one["loss_optimum"],
            flags=", ".join(one["flags"]).replace("_", " "),
            used=one["used"],
        )
        mine = of == index
        sizes, losses = np.log(points.params[mine]), points.loss[mine]
        if len(np.unique(sizes)) < 3:
            continue
        at = np.linspace(sizes.min(), sizes.max(), 41)
        line = {"budget": one["budget"], "params": np.exp(at)}
        rows += _rows("slice", **line, loss=_curve(record["method"], sizes, losses, at))
        if not _others(fit.law):
            price = points.flops[mine] / (points.params[mine] * points.tokens[mine])
            order = np.argsort(sizes)
            price = np.interp(at, sizes[order], price[order])
            tokens = one["budget"] / (price * np.exp(at))
            rows += _rows("law", **line, loss=_loss(fit, np.exp(at), tokens))
    return rows


def _curve(method: str, sizes, losses, at) -> np.ndarray:
    """Return the curve that approach 2 put through the losses of a slice."""
    if method != "akima":
        degree = {"parabola": 2, "cubic": 3}[method]
        return np.polyval(np.polyfit(sizes - at[0], losses, degree), at - at[0])
    from scipy import interpolate

    nodes, which, counts = np.unique(sizes, return_inverse=True, return_counts=True)
    means = np.bincount(which, np.log(losses)) / counts
    return np.exp(interpolate.Akima1DInterpolator(nodes, means)(at))


def _frontier(fit) -> list[dict]:
    # Along C = 6ND; the lines of approaches 1 and 2 are in the FLOPs of the table.
    low, high = fit.record["range"]["flops_6nd"]
    flops = np.geomspace(low, high * BEYOND, 33)
    ratio, rows = fit.record["range"]["flops_ratio"], []
    for approach in APPROACHES:
        found = fit.record[approach]
        if "skipped" in found or (approach == "approach3" and _others(fit.law)):
            continue
        if approach == "approach3":
            best = frontier.optimum(fit.law, files.theta(found, fit.law), flops)
            line = _best(*best) | {"loss": _loss(fit, *best)}
        else:
            own = flops * ratio
            params = found["coefficient"] * own ** found["a"]
            line = _best(params, found["coefficient_tokens"] * own ** found["b"])
        rows += _rows(approach, flops=flops, **line, **_bands(fit, approach, flops))
    if not rows:
        return []
    for one in fit.record["approach2"].get("slices", []):
        params, tokens = one["params_optimum"], one["tokens_optimum"]
        if params is not None and tokens is not None:
            name = "slice" if one["used"] else "slice left out"
            best = _best(params, tokens) | {"loss": one["loss_optimum"]}
            rows += _rows(name, flops=one["budget"] / ratio, **best)
    run = _runs(fit.points, "params", "tokens", "loss")
    run["flops"] = 6 * run["params"] * run["tokens"]
    return rows + _rows("run", **run, ratio=run["tokens"] / run["params"])


def _best(params, tokens) -> dict:
    return {"params": params, "tokens": tokens, "ratio": tokens / params}


def _bands(fit, approach: str, flops) -> dict:
    """Return 95 % intervals at `flops`, and how many draws have no optimum there."""
    names = ("params", "tokens", "ratio")
    ends = [f"{name}_{end}" for name in names for end in ("low", "high")]
    bands = dict.fromkeys([*ends, "draws_missing"])
    if approach not in fit.draws:
        return bands
    drawn = fit.draws[approach]
    if approach == "approach3":
        if fit.law.power(drawn) is None:
            drawn = drawn[:MAX_NUMERIC_DRAWS]
        params, tokens = frontier.optimum(fit.law, _finite(drawn)[:, None, :], flops)
    else:
        k, a, k_tokens, b = _finite(drawn).T[..., None]
        ln = np.log(flops * fit.record["range"]["flops_ratio"])
        params, tokens = np.exp(k + a * ln), np.exp(k_tokens + b * ln)
    has = (np.isfinite(params) & np.isfinite(tokens)).all(axis=1)
    if has.sum() > 1:
        for name, values in _best(params[has], tokens[has]).items():
            bands[f"{name}_low"], bands[f"{name}_high"] = resamples.interval(values).T
    return bands | {"draws_missing": len(drawn) - int(has.sum())}


def _residuals(fit) -> list[dict]:
    points = fit.points
    fitted = _loss(fit, points.params, points.tokens, own=True)
    residual = np.log(points.loss / fitted)
    away = np.abs(residual - np.median(residual))
    # Runs without noise lie off the law by rounding alone.
    outlier = away > max(OUTLIER * 1.4826 * np.median(away), EXACT)
    worst = np.argsort(-away, kind="stable")[: min(MAX_NAMED, outlier.sum())]
    shown = np.union1d(_thinned(points), worst)
    columns = {"run": points.run, "params": points.params, "tokens": points.tokens}
    columns |= {"flops": points.flops, "loss": points.loss, "fitted": fitted}
    columns |= {"residual": residual, "outlier": outlier}
    columns = {name: column[shown] for name, column in columns.items()}
    return _rows("run", row=shown, **columns, named=np.isin(shown, worst))


def _contours(fit) -> list[dict]:
    sides = [
        np.geomspace(low / 1.6, high * 1.6, 48)
        for low, high in (fit.record["range"][name] for name in ("params", "tokens"))
    ]
    params, tokens = (side.ravel() for side in np.meshgrid(*sides))
    losses = _loss(fit, params, tokens)
    rows = _rows("surface", params=params, tokens=tokens, loss=losses)
    least, most = 6 * params[0] * tokens[0], 6 * params[-1] * tokens[-1]
    if not _others(fit.law):
        flops = np.geomspace(least, most, 33)
        theta = files.theta(fit.record["approach3"], fit.law)
        best = frontier.optimum(fit.law, theta, flops)
        path = {"params": best[0], "tokens": best[1], "loss": _loss(fit, *best)}
        rows += _rows("path", **path, flops=flops)
    for flops in axes.ticks(least * 2, most / 2, most=6):
        ends = np.clip(flops / (6 * sides[1][[-1, 0]]), sides[0][0], sides[0][-1])
        rows += _rows("isoflop", params=ends, tokens=flops / (6 * ends), flops=flops)
    return rows + _rows("run", **_runs(fit.points, "params", "tokens", "loss", "flops"))


def _draws(fit) -> list[dict]:
    record = fit.record["approach3"]
    drawn = _finite(fit.draws.get("approach3", np.empty((0, 0))))
    if not len(drawn):
        return []
    values = dict(zip(fit.law.names, drawn.T, strict=True))
    if "a" in record:
        values["a"] = fit.law.exponents(drawn)[0]
    values = {n: c for n, c in values.items() if np.ptp(c) > EXACT * np.abs(c).max()}
    # The four that most is read from: those of one size first, factors last.
    kinds = ("E", "alpha", "beta")
    first = [n for kind in kinds for n in values if n.startswith(kind)]
    names = list(dict.fromkeys([*first, *values.keys() & {"a"}, *values]))[:4]
    if not names:
        return []
    bounds = {name: resamples.interval(values[name]) for name in names}
    return [
        *_rows("estimate", **{name: record[name] for name in names}),
        *_rows("low", **{name: bounds[name][0] for name in names}),
        *_rows("high", **{name: bounds[name][1] for name in names}),
        *_rows("draw", **{name: values[name][:MAX_DRAWS] for name in names}),
    ]


def _cut(record) -> list[dict]:
    rows = []
    for one in record["held_out"]:
        low, high = one["ci"]["a"] if "a" in one else (None, None)
        flops = one["cut"] / record["range"]["flops_ratio"]
        line = {"flops": flops, "a": one.get("a"), "a_low": low, "a_high": high}
        # The last keeps every run and tests none: that is approach 3 itself.
        told = ("train", "test", "mare", "worst", "coverage") if one["test"] else ()
        line |= {name: one[name] for name in told}
        rows += _rows("cut" if one["test"] else "all", **line)
    return rows if len(rows) > 1 else []


def _rows(series: str, **columns) -> list[dict]:
    """Return a row for each entry of the columns; numbers stand in every row."""
    filled = np.broadcast_arrays(
        *(np.atleast_1d(column).astype(object) for column in columns.values())
    )
    return [
        {"series": series} | dict(zip(columns, map(_value, values), strict=True))
        for values in zip(*filled, strict=True)
    ]


def _level(rows: list[dict]) -> list[dict]:
    """Return rows that all have the keys of any, None where they had none."""
    keys = dict.fromkeys(key for row in rows for key in row)
    return [keys | row for row in rows]


def _value(value):
    """Return a value, or None for a number that is none."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _loss(fit, params, tokens, *, own=False) -> np.ndarray:
    """Return the law's loss; what else it reads is each run's `own`, or the median."""
    columns = {"params": params, "tokens": tokens}
    for name in _others(fit.law):
        column = fit.points.extra[name]
        columns[name] = column if own else np.full(len(params), np.median(column))
    return fit.law.loss(files.theta(fit.record["approach3"], fit.law), columns)


def _others(law) -> list[str]:
    """Return what a law reads beside params and tokens: then it has no frontier."""
    return [name for name in law.columns if name not in ("params", "tokens")]


def _finite(draws) -> np.ndarray:
    return draws[np.isfinite(draws).all(axis=1)]


def _runs(points, *names: str) -> dict:
    """Return columns of all runs, or of evenly many where there are too many."""
    return {name: getattr(points, name)[_thinned(points)] for name in names}


def _thinned(points) -> np.ndarray:
    count = len(points)
    return np.unique(np.linspace(0, count - 1, min(count, MAX_RUNS)).astype(int))
