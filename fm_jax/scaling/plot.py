"""The figures of a fit, and the rows of numbers that each of them draws."""

import contextlib
import io
import math
import textwrap
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from fm_jax.scaling import frontier, laws, resamples, slices
from fm_jax.tables import table

BEYOND = 100.0  # how far past the largest compute of the runs the frontier is drawn
MAX_RUNS = 2000  # rows of the table, and draws, that a figure shows at most
MAX_DRAWS = 1000
MAX_NUMERIC_DRAWS = 400  # where a law's optimum has no closed form
MAX_NAMED = 6  # outliers named in the residuals
EXACT = 1e-9  # a relative difference that is rounding
OUTLIER = 5.0  # robust standard deviations from the median residual
DPI = 110

APPROACHES = {
    "approach3": "parametric (approach 3)",
    "approach2": "isoFLOP (approach 2)",
    "approach1": "envelope (approach 1)",
}
# Of Okabe and Ito's colours, which the colour blind tell apart; dashes differ as well.
BLUE, RED, GREEN = "#0072B2", "#D55E00", "#009E73"
INK, GREY, PALE = "#222222", "#808080", "#dbe9f2"
COLORS = {"approach3": BLUE, "approach2": RED, "approach1": GREEN}
DASHES = {"approach3": "-", "approach2": (0, (5, 2)), "approach1": (0, (1, 1.2))}
STYLE = {
    "font.family": ["DejaVu Sans"],  # comes with matplotlib: the same everywhere
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8e8e8",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.borderaxespad": 0,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
}


def figures(
    points: table.Points,
    fit: dict[str, Any],
    draws: dict[str, np.ndarray],
    law: laws.Law,
    *,
    rows: dict[str, list[dict]] | None = None,
) -> dict[str, Any]:
    """Return a matplotlib Figure, by name, for each table that `tables` returns.

    `rows` is what `tables` returned for the same arguments, where it is at hand.
    Nothing of pyplot is touched, and a style that the user has set does not show.
    """
    rows = tables(points, fit, draws, law) if rows is None else rows
    with _styled():
        return {name: _DRAW[name](_series(rows[name]), fit) for name in rows}


def png(figure: Any, *, dpi: int = DPI) -> bytes:
    """Return a figure as a PNG on white: the same bytes for the same figure."""
    stream, plain = io.BytesIO(), {"Software": None}
    with _styled():
        figure.savefig(stream, format="png", dpi=dpi, facecolor="white", metadata=plain)
    return stream.getvalue()


def tables(
    points: table.Points,
    fit: dict[str, Any],
    draws: dict[str, np.ndarray],
    law: laws.Law,
) -> dict[str, list[dict]]:
    """Return the rows that each figure draws, by the figure's name.

    `fit` is what fit.json holds; `draws` has `approach3` [R, P] and `approach2` [R, 4]
    where there are such. A name is absent where there is nothing to draw: `isoflop`
    without slices, `residuals` and `contours` without approach 3, `draws` without a
    bootstrap, `cut` without held-out runs. Rows of one table have the same keys;
    `series` says what a row is, and None stands where it has no such value.
    """
    made = {
        "isoflop": _isoflop_rows(points, fit, law),
        "frontier": _frontier_rows(points, fit, draws, law),
        "residuals": _residual_rows(points, fit, law),
        "contours": _contour_rows(points, fit, law),
        "draws": _draw_rows(fit, draws, law),
        "cut": _cut_rows(fit),
    }
    return {name: _level(rows) for name, rows in made.items() if rows}


def amount(value: float) -> str:
    """Return a number of parameters or tokens as 70M or 1.5B."""
    if value >= 1e15:
        return _power(value)
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= unit * (1 - 1e-9):
            return f"{value / unit:.3g}{letter}"
    return f"{value:.3g}"


def _isoflop_rows(points, fit, law) -> list[dict]:
    record = fit.get("approach2") or {}
    found = record.get("slices") or []
    if not found:
        return []
    planned = points.budget if np.isfinite(points.budget).any() else None
    of, budgets = slices.assign(points.flops, budget=planned)
    shown = _thinned(len(points.loss))
    rows = _rows(
        "run",
        budget=np.where(of < 0, np.nan, budgets[of])[shown] if len(budgets) else None,
        params=points.params[shown],
        loss=points.loss[shown],
    )
    for one in found:
        rows += _rows(
            "minimum",
            budget=one["budget"],
            params=one["params_optimum"],
            loss=one["loss_optimum"],
            flags=", ".join(one["flags"]).replace("_", " "),
            used=bool(one["used"]),
        )
        # The rows' own budgets are recomputed, so they are equal but for rounding.
        mine = np.isclose(budgets, one["budget"], rtol=1e-6)[of] & (of >= 0)
        sizes, losses = np.log(points.params[mine]), points.loss[mine]
        if len(np.unique(sizes)) < 3:
            continue
        at = np.linspace(sizes.min(), sizes.max(), 41)
        curve = _curve(record.get("method", "parabola"), sizes, losses, at)
        rows += _rows("slice", budget=one["budget"], params=np.exp(at), loss=curve)
        if _part(fit, "approach3") and not _others(law):
            price = points.flops[mine] / (points.params[mine] * points.tokens[mine])
            order = np.argsort(sizes)
            price = np.interp(at, sizes[order], price[order])
            tokens = one["budget"] / (price * np.exp(at))
            curve = _loss(points, fit, law, np.exp(at), tokens)
            rows += _rows("law", budget=one["budget"], params=np.exp(at), loss=curve)
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


def _frontier_rows(points, fit, draws, law) -> list[dict]:
    low, high = fit["range"]["flops"]
    flops = np.geomspace(low, high * BEYOND, 33)
    rows = []
    for approach in APPROACHES:
        if not _part(fit, approach) or (approach == "approach3" and _others(law)):
            continue
        params, tokens = _frontier(approach, points, fit, law, flops)
        bands = _bands(approach, points, draws, law, flops)
        line = {"params": params, "tokens": tokens, "ratio": tokens / params}
        if approach == "approach3":
            line["loss"] = _loss(points, fit, law, params, tokens)
        rows += _rows(approach, flops=flops, **line, **bands)
    if not rows:
        return []
    for one in (fit.get("approach2") or {}).get("slices") or []:
        params, tokens = one["params_optimum"], one["tokens_optimum"]
        if params is not None and tokens is not None:
            series = "slice" if one["used"] else "slice left out"
            best = {"params": params, "tokens": tokens, "ratio": tokens / params}
            rows += _rows(series, flops=one["budget"], **best, loss=one["loss_optimum"])
    shown = _thinned(len(points.loss))
    run = {n: getattr(points, n)[shown] for n in ("flops", "params", "tokens", "loss")}
    return rows + _rows("run", **run, ratio=run["tokens"] / run["params"])


def _frontier(approach, points, fit, law, flops) -> tuple[np.ndarray, np.ndarray]:
    if approach == "approach3":
        return frontier.optimum(law, _theta(fit, law), flops)
    record = fit[approach]
    params = record["coefficient"] * flops ** record["a"]
    return params, record["coefficient_tokens"] * flops ** record["b"]


def _bands(approach, points, draws, law, flops) -> dict:
    """Return 95 % intervals at `flops`, and how many draws have no optimum there."""
    ends = [
        f"{n}_{end}" for n in ("params", "tokens", "ratio") for end in ("low", "high")
    ]
    bands = dict.fromkeys([*ends, "draws_missing"])
    if approach not in draws:
        return bands
    drawn = draws[approach]
    if approach == "approach3":
        if law.power(drawn) is None:
            drawn = drawn[:MAX_NUMERIC_DRAWS]
        known = _finite(drawn)
        params, tokens = frontier.optimum(law, known[:, None, :], flops)
    else:
        known = _finite(drawn)
        params = np.exp(known[:, :1] + known[:, 1:2] * np.log(flops))
        tokens = np.exp(known[:, 2:3] + known[:, 3:4] * np.log(flops))
    has = np.isfinite(params).all(axis=1) & np.isfinite(tokens).all(axis=1)
    if has.sum() > 1:
        params, tokens = params[has], tokens[has]
        for name, values in zip(
            ("params", "tokens", "ratio"),
            (params, tokens, tokens / params),
            strict=True,
        ):
            interval = resamples.interval(values)
            bands[f"{name}_low"], bands[f"{name}_high"] = interval.T
    return bands | {"draws_missing": len(drawn) - int(has.sum())}


def _residual_rows(points, fit, law) -> list[dict]:
    if not _part(fit, "approach3"):
        return []
    fitted = _loss(points, fit, law, points.params, points.tokens, own=True)
    residual = np.log(points.loss / fitted)
    away = np.abs(residual - np.median(residual))
    # Runs without noise lie off the law by rounding alone.
    outlier = away > max(OUTLIER * 1.4826 * np.median(away), EXACT)
    worst = np.argsort(-away, kind="stable")[: min(MAX_NAMED, outlier.sum())]
    named = np.isin(np.arange(len(points.loss)), worst)
    shown = np.union1d(_thinned(len(points.loss)), worst)
    columns = {"row": np.arange(len(points.loss)), "run": points.run.astype(object)}
    for name in ("params", "tokens", "flops", "loss"):
        columns[name] = getattr(points, name)
    columns |= {"fitted": fitted, "residual": residual}
    columns |= {"outlier": outlier, "named": named}
    return _rows("run", **{name: column[shown] for name, column in columns.items()})


def _contour_rows(points, fit, law) -> list[dict]:
    if not _part(fit, "approach3"):
        return []
    sides = [
        np.geomspace(low / 1.6, high * 1.6, 48)
        for low, high in (fit["range"]["params"], fit["range"]["tokens"])
    ]
    params, tokens = (side.ravel() for side in np.meshgrid(*sides))
    losses = _loss(points, fit, law, params, tokens)
    rows = _rows("surface", params=params, tokens=tokens, loss=losses)
    least, most = 6 * params[0] * tokens[0], 6 * params[-1] * tokens[-1]
    if not _others(law):
        flops = np.geomspace(least, most, 33)
        best = frontier.optimum(law, _theta(fit, law), flops)
        losses = _loss(points, fit, law, *best)
        rows += _rows("path", params=best[0], tokens=best[1], loss=losses, flops=flops)
    for flops in _ticks(least * 2, most / 2, most=6):
        ends = np.clip(flops / (6 * sides[1][[-1, 0]]), sides[0][0], sides[0][-1])
        rows += _rows("isoflop", params=ends, tokens=flops / (6 * ends), flops=flops)
    shown = _thinned(len(points.loss))
    run = {n: getattr(points, n)[shown] for n in ("params", "tokens", "loss", "flops")}
    return rows + _rows("run", **run)


def _draw_rows(fit, draws, law) -> list[dict]:
    record = _part(fit, "approach3")
    if not record or "approach3" not in draws:
        return []
    drawn = _finite(draws["approach3"])
    if len(drawn) < 2:
        return []
    values = dict(zip(law.names, drawn.T, strict=True))
    exponents = law.exponents(drawn)
    if exponents is not None and "a" in record:
        values["a"] = exponents[0]
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


def _cut_rows(fit) -> list[dict]:
    tested = fit.get("held_out") or []
    rows = []
    # One of them may keep every run and test none: that is approach 3 itself.
    for one in (one for one in tested if one["test"]):
        kept = {name: one[name] for name in ("train", "test", "mare", "worst")}
        coverage = one.get("coverage")
        rows += _rows(
            "cut", flops=one["cut"], **_exponent(one), **kept, coverage=coverage
        )
    most = fit["range"]["flops"][1]
    whole = _exponent(_part(fit, "approach3"))
    return rows and rows + _rows("all", flops=most, **whole)


def _exponent(record) -> dict:
    low, high = record.get("ci", {}).get("a", (None, None))
    return {"a": record.get("a"), "a_low": low, "a_high": high}


def _rows(series: str, **columns) -> list[dict]:
    """Return a row for each entry of the columns; numbers stand in every row."""
    size = max(map(np.size, columns.values()))
    filled = [
        np.broadcast_to(np.asarray(c, dtype=object), size) for c in columns.values()
    ]
    return [
        {"series": series} | dict(zip(columns, map(_value, values), strict=True))
        for values in zip(*filled, strict=True)
    ]


def _level(rows: list[dict]) -> list[dict]:
    """Return rows that all have the keys of any, None where they had none."""
    keys = dict.fromkeys(key for row in rows for key in row)
    return [keys | row for row in rows]


def _value(value):
    """Return Python's number for numpy's, and None for what is no number."""
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _part(fit, name) -> dict:
    """Return the record of an approach, empty where it was not done."""
    record = fit.get(name) or {}
    return {} if "skipped" in record else record


def _theta(fit, law) -> np.ndarray:
    return np.array([fit["approach3"][name] for name in law.names])


def _loss(points, fit, law, params, tokens, *, own=False) -> np.ndarray:
    """Return the law's loss; what else it reads is each run's `own`, or the median."""
    columns = {"params": params, "tokens": tokens}
    for name in _others(law):
        column = points.extra[name]
        columns[name] = column if own else np.full(len(params), np.nanmedian(column))
    return law.loss(_theta(fit, law), columns)


def _others(law) -> list[str]:
    """Return what a law reads beside params and tokens: then it has no frontier."""
    return [name for name in law.columns if name not in ("params", "tokens")]


def _finite(draws) -> np.ndarray:
    return draws[np.isfinite(draws).all(axis=1)]


def _thinned(count: int) -> np.ndarray:
    """Return the indexes of all rows, or of evenly many where there are too many."""
    return np.unique(np.linspace(0, count - 1, min(count, MAX_RUNS)).astype(int))


def _draw_isoflop(of, fit):
    figure, axes = _figure(8.6, 5.3, left=0.075, right=0.74, bottom=0.1, top=0.92)
    runs, minima = of["run"], of["minimum"]
    color = _scale(minima["budget"])
    stray = ~np.isin(runs["budget"], minima["budget"])
    axes.plot(runs["params"][stray], runs["loss"][stray], ".", color="#c4c4c4")
    beside = []
    for index, budget in enumerate(minima["budget"]):
        tint, used = color(budget), minima["used"][index]
        mine = runs["budget"] == budget
        face = tint if used else "white"
        dots = {"marker": "o", "ls": "", "ms": 4.5, "mec": tint, "mfc": face}
        axes.plot(runs["params"][mine], runs["loss"][mine], **dots)
        for series, dashes in (("slice", "-"), ("law", (0, (1, 1.5)))):
            if series in of:
                on = of[series]["budget"] == budget
                line = of[series]["params"][on], of[series]["loss"][on]
                axes.plot(*line, color=tint, ls=dashes, lw=1.5)
        at = minima["params"][index], minima["loss"][index]
        axes.plot(*at, "D", ms=8, mfc=face, mec=INK, mew=1.3, zorder=4)
        lowest = np.nanmin([at[1], *runs["loss"][mine]])
        beside.append((lowest, _power(budget), minima["flags"][index], tint))
    _log_axis(axes.xaxis, runs["params"], amount)
    _log_axis(axes.yaxis, runs["loss"], _short, pad=1.03, most=9)
    axes.set(xlabel=f"parameters N ({_count(fit)})", ylabel="loss (nats per token)")
    _beside(axes, "budget (FLOPs)", beside)
    keys = [
        _key("run", color=GREY, marker="o", ls="", ms=4.5),
        _key("slice fit", color=GREY),
        _key("slice minimum", marker="D", ls="", mfc=GREY, mec=INK),
        _key("slice left out", marker="D", ls="", mfc="w", mec=INK),
    ]
    if "law" in of:
        keys.append(_key("approach 3 at the budget", color=GREY, ls=(0, (1, 1.5))))
    _legend(figure, keys, 0.075)
    return figure


def _draw_frontier(of, fit):
    figure, panels = _figure(
        8.7, 4.3, columns=3, left=0.085, right=0.985, bottom=0.31, top=0.97, wspace=0.33
    )
    low, high = fit["range"]["flops"]
    runs, count = of["run"], _count(fit)
    norm, colors = _losses(runs["loss"])
    shows = {"params": amount, "tokens": amount, "ratio": _short}
    labels = (f"optimal parameters N* ({count})", "optimal tokens D*", "D* / N*")
    for axes, (name, show), label in zip(panels, shows.items(), labels, strict=True):
        axes.axvspan(high, high * BEYOND, color="#f0f0f0", lw=0, zorder=0)
        at = {"c": runs["loss"], "norm": norm, "cmap": colors, "s": 9, "lw": 0}
        shown = axes.scatter(runs["flops"], runs[name], **at)
        seen = [runs[name]]
        for approach in filter(of.__contains__, APPROACHES):
            line, color = of[approach], COLORS[approach]
            band = line[f"{name}_low"], line[f"{name}_high"]
            axes.fill_between(line["flops"], *band, color=color, alpha=0.2, lw=0)
            seen += band
            style = {"color": color, "ls": DASHES[approach], "lw": 2}
            axes.plot(line["flops"], line[name], **style)
            seen.append(line[name])
        for series, face in (("slice", RED), ("slice left out", "w")):
            if series in of:
                at = of[series]["flops"], of[series][name]
                axes.plot(*at, "D", ms=5.5, mfc=face, mec=INK)
        _log_axis(axes.xaxis, np.array([low, high * BEYOND]), _power, most=5)
        _log_axis(axes.yaxis, np.concatenate(seen), show)
        axes.set(xlabel="compute C (FLOPs)", ylabel=label)
    panels[2].set_ylabel("optimal tokens per parameter D*/N*")
    there = [name for name in APPROACHES if name in of]
    keys = [
        _key(APPROACHES[name], color=COLORS[name], ls=DASHES[name], lw=2)
        for name in there
    ]
    if any(np.isfinite(of[name]["params_low"]).any() for name in there):
        left_out = np.nansum([of[name]["draws_missing"][0] for name in there])
        said = f"; {left_out:.0f} draws have no optimum" if left_out else ""
        keys.append(_patch("95 % bootstrap interval" + said, "#c3dceb"))
    if "slice" in of:
        keys.append(_key("slice minimum", marker="D", ls="", mfc=RED, mec=INK))
    keys.append(_patch(f"beyond the runs, to {BEYOND:.0f} times", "#e6e6e6"))
    figure.legend(handles=keys, loc="upper left", ncols=2, bbox_to_anchor=(0.085, 0.18))
    place = figure.add_axes((0.66, 0.125, 0.3, 0.03))
    bar = figure.colorbar(shown, cax=place, orientation="horizontal")
    _bar(bar, place.xaxis, norm, "loss of a run (nats per token)")
    return figure


def _draw_residuals(of, fit):
    figure, panels = _figure(
        8.7, 3.6, columns=3, left=0.08, right=0.985, bottom=0.15, top=0.9, wspace=0.08
    )
    runs = of["run"]
    percent = 100 * runs["residual"]
    spread = 100 * fit["approach3"]["residual_sd"]
    out, reach = runs["outlier"], 1.15 * max(np.abs(percent).max(), 100 * EXACT)
    labels = {"params": f"parameters N ({_count(fit)})", "tokens": "tokens D"}
    labels |= {"flops": "compute C (FLOPs)"}
    dots = {"ls": "", "marker": "o", "ms": 4.5, "mew": 0, "color": BLUE, "alpha": 0.55}
    crosses = {"ls": "", "marker": "X", "ms": 6.5, "mew": 0, "color": RED}
    for axes, (name, label) in zip(panels, labels.items(), strict=True):
        axes.axhspan(-2 * spread, 2 * spread, color="#e9f1f6", lw=0, zorder=0)
        axes.axhline(0, color=INK, lw=1)
        axes.plot(runs[name][~out], percent[~out], **dots)
        axes.plot(runs[name][out], percent[out], **crosses)
        _log_axis(axes.xaxis, runs[name], _power if name == "flops" else amount, most=6)
        axes.set(xlabel=label, ylim=(-reach, reach))
        axes.tick_params(labelleft=axes is panels[0])
        named = runs["named"]
        said = [f"row {row:.0f}" for row in runs["row"][named]]
        _name(axes, runs[name][named], percent[named], said)
    panels[0].set_ylabel("100 ln(loss / fitted loss)")
    keys = [_key("run", **dots), _patch(f"within 2 sd (sd {spread:.2g})", "#d5e5ef")]
    if out.any():
        keys.append(_key(f"beyond {OUTLIER:g} robust sd", **crosses))
    _legend(figure, keys, 0.075)
    return figure


def _draw_contours(of, fit):
    figure, axes = _figure(8.2, 6.0, left=0.095, right=0.86, bottom=0.095, top=0.915)
    surface, runs, equal = of["surface"], of["run"], of["isoflop"]
    params, tokens = np.unique(surface["params"]), np.unique(surface["tokens"])
    losses = surface["loss"].reshape(len(tokens), len(params))
    norm, colors = _losses(runs["loss"])
    levels = np.exp(np.linspace(*np.log([losses.min(), losses.max()]), 18))[1:-1]
    style = {"norm": norm, "cmap": colors}
    axes.set(xscale="log", yscale="log")
    lines = axes.contour(params, tokens, losses, levels, linewidths=1.2, **style)
    axes.clabel(lines, levels[::2], fmt=lambda loss: f"{loss:.2f}", fontsize=9)
    for flops in np.unique(equal["flops"]):
        on = equal["flops"] == flops
        ends = equal["params"][on], equal["tokens"][on]
        axes.plot(*ends, color="#b5b5b5", lw=1, zorder=1)
        # Where the line leaves the picture at the bottom, or else at the right.
        at = {"textcoords": "offset points", "color": "#666666", "fontsize": 8.5}
        axes.annotate(
            _power(flops), (ends[0][0], ends[1][0]), (3, 3), va="bottom", **at
        )
    edge = {"s": 26, "lw": 0.6, "ec": "white", "zorder": 3}
    shown = axes.scatter(
        runs["params"], runs["tokens"], c=runs["loss"], **edge, **style
    )
    keys = [_key("run", marker="o", ls="", color="#35808a", mec="w", ms=6)]
    keys.append(_key("equal loss", color="#35808a", lw=1.2))
    keys.append(_key("equal compute (FLOPs)", color="#b5b5b5", lw=1))
    if "path" in of:
        axes.plot(of["path"]["params"], of["path"]["tokens"], color=INK, lw=2.2)
        keys.append(_key("least loss for the compute", color=INK, lw=2.2))
    axes.grid(False)
    _log_axis(axes.xaxis, params, amount, pad=1)
    _log_axis(axes.yaxis, tokens, amount, pad=1)
    axes.set(xlabel=f"parameters N ({_count(fit)})", ylabel="tokens D")
    place = figure.add_axes((0.885, 0.095, 0.02, 0.82))
    bar = figure.colorbar(shown, cax=place)
    _bar(bar, place.yaxis, norm, "loss (nats per token)")
    _legend(figure, keys, 0.095)
    return figure


def _draw_draws(of, fit):
    names, size = list(of["draw"]), len(of["draw"])
    wide = {name for name in names if _is_wide(of["draw"][name])}
    drawn, estimate, low, high = (
        {n: np.log10(of[key][n]) if n in wide else of[key][n] for n in names}
        for key in ("draw", "estimate", "low", "high")
    )
    labels = {n: f"log₁₀ {n}" if n in wide else _symbol(n) for n in names}
    figure, grid = _figure(
        7.8, 7.4, grid=(size, size), left=0.1, right=0.98, bottom=0.08, top=0.95,
        wspace=0.09, hspace=0.09,
    )  # fmt: skip
    spans = {name: _span(drawn[name]) for name in names}
    for line, below in enumerate(names):
        for column, across in enumerate(names[: line + 1]):
            axes = figure.add_subplot(grid[line, column])
            axes.set_xlim(spans[across])
            axes.xaxis.set_major_locator(_locator())
            left = column == 0 < line
            axes.tick_params(labelleft=left, labelbottom=line == size - 1)
            axes.set_xlabel(labels[across] if line == size - 1 else "")
            axes.set_ylabel(labels[below] if left else "")
            if below != across:
                dots = {"ms": 3.5, "color": BLUE, "alpha": 0.3, "mew": 0}
                axes.plot(drawn[across], drawn[below], ".", **dots)
                at = estimate[across], estimate[below]
                axes.plot(*at, "P", ms=10, mfc=RED, mec="white")
                axes.set_ylim(spans[below])
                axes.yaxis.set_major_locator(_locator())
                continue
            axes.axvspan(low[below][0], high[below][0], color=PALE, lw=0)
            axes.hist(drawn[below], bins=30, range=spans[below], color="#8dbad6")
            axes.axvline(estimate[below][0], color=RED, lw=1.8)
            axes.set(yticks=[])
            axes.grid(False)
            said = [one[below][0] for one in (estimate, low, high)]
            title = (
                "{} = {:.3f} [{:.3f}, {:.3f}]"
                if max(said) < 100
                else ("{} = {:.0f} [{:.0f}, {:.0f}]")
            )
            title = title.format(labels[below].split(" (")[0], *said)
            axes.set_title(title, fontsize=9.5, loc="left", pad=3)
    keys = [
        _key("point estimate", color=RED, marker="P", ls="", ms=10, mec="w"),
        _key("bootstrap draw", color=BLUE, marker=".", ls="", ms=6),
        _patch("95 % interval", PALE),
    ]
    figure.legend(handles=keys, loc="upper right", bbox_to_anchor=(0.98, 0.95))
    return figure


def _is_wide(values) -> bool:
    """Return whether values are better seen by their logarithms."""
    return bool(values.min() > 0 and values.max() > 20 * values.min())


def _draw_cut(of, fit):
    has = np.isfinite(of["all"]["a"]).any()
    figure, panels = _figure(
        8.0, 5.4 if has else 3.0, lines=1 + has, left=0.1, right=0.97,
        bottom=0.105 if has else 0.18, top=0.93 if has else 0.89, hspace=0.24,
    )  # fmt: skip
    cuts, whole, lower = of["cut"], of["all"], np.atleast_1d(panels)[-1]
    spread = np.concatenate([cuts["flops"], whole["flops"]])
    if has:
        axes, ends = panels[0], (whole["a_low"][0], whole["a_high"][0])
        keys = [_key("runs up to the cut", color=RED, marker="o", lw=1.4)]
        keys.append(_key("all runs", color=BLUE, marker="s", ms=7, lw=1.2))
        if np.isfinite(ends).all():
            axes.axhspan(*ends, color="#e4eef5", lw=0)
            keys.append(_patch("their 95 % interval", "#d5e5f0"))
        axes.axhline(whole["a"][0], color=BLUE, lw=1.2)
        axes.plot(whole["flops"], whole["a"], "s", ms=7, color=BLUE)
        bars = np.abs(np.stack([cuts["a_low"], cuts["a_high"]]) - cuts["a"])
        style = {"fmt": "o-", "ms": 6, "color": RED, "capsize": 3, "lw": 1.2}
        axes.errorbar(cuts["flops"], cuts["a"], yerr=bars, **style)
        axes.set_ylabel("exponent a (N* ∝ Cᵃ)")
        _log_axis(axes.xaxis, spread, _power, pad=1.3)
        axes.tick_params(labelbottom=False)
        _legend(figure, keys, 0.1)
    marks = {"mare": ("o", INK, "mean error"), "worst": ("v", GREY, "worst run")}
    keys = []
    for name, (marker, color, label) in marks.items():
        style = {"marker": marker, "ms": 6, "lw": 1, "color": color}
        lower.plot(cuts["flops"], 100 * cuts[name], **style)
        keys.append(_key(label, **style))
    for flops, error, tested in zip(
        cuts["flops"], cuts["mare"], cuts["test"], strict=True
    ):
        at = {"textcoords": "offset points", "ha": "center", "fontsize": 8.5}
        said = f"{tested:.0f} runs"
        lower.annotate(said, (flops, 100 * error), (0, -14), color="#555555", **at)
    top = 100 * max(cuts["worst"].max(), EXACT)
    lower.set_ylim(-0.16 * top, 1.1 * top)
    _log_axis(lower.xaxis, spread, _power, pad=1.3)
    lower.set_xlabel("largest compute kept in the fit (FLOPs)")
    lower.set_ylabel("error beyond the cut (%)")
    anchor = {"loc": "lower left", "bbox_to_anchor": (0, 1.01), "ncols": 2}
    lower.legend(handles=keys, **anchor)
    return figure


_DRAW = {
    "isoflop": _draw_isoflop,
    "frontier": _draw_frontier,
    "residuals": _draw_residuals,
    "contours": _draw_contours,
    "draws": _draw_draws,
    "cut": _draw_cut,
}


@contextlib.contextmanager
def _styled() -> Iterator[None]:
    import matplotlib

    plain = dict(matplotlib.rcParamsDefault)
    plain.pop("backend")  # not ours to choose; a Figure made by hand is drawn by Agg
    with matplotlib.rc_context(plain | STYLE):
        yield


def _figure(width, height, *, lines=1, columns=1, grid=None, **margins):
    """Return a figure and its panels, or its empty grid where one is asked for."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    if grid:
        return figure, figure.add_gridspec(*grid, **margins)
    return figure, figure.subplots(lines, columns, gridspec_kw=margins)


def _series(rows: list[dict]) -> dict[str, dict[str, np.ndarray]]:
    """Return the columns of each series; those that it has nothing of are NaN."""
    found = {}
    for row in rows:
        found.setdefault(row["series"], []).append(row)
    return {
        series: {
            key: _array([row[key] for row in mine])
            for key in mine[0]
            if key != "series"
        }
        for series, mine in found.items()
    }


def _array(values: list) -> np.ndarray:
    kinds = {type(value) for value in values}
    kind = bool if kinds == {bool} else object if str in kinds else float
    return np.array(values, dtype=kind)


def _key(label, **style):
    from matplotlib.lines import Line2D

    return Line2D([], [], label=label, **style)


def _patch(label, color):
    from matplotlib.patches import Patch

    return Patch(color=color, label=label, lw=0)


def _legend(figure, keys, left: float) -> None:
    """Put the keys in one line above the panels."""
    style = {"ncols": len(keys), "columnspacing": 1.6, "handletextpad": 0.5}
    figure.legend(handles=keys, loc="upper left", bbox_to_anchor=(left, 0.99), **style)


def _locator():
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(3, steps=[1, 2, 5, 10], prune="upper")


def _span(values) -> tuple[float, float]:
    """Return limits that hold all but the wildest values."""
    low, high = np.quantile(values, (0.002, 0.998))
    return low - 0.08 * (high - low), high + 0.08 * (high - low)


def _scale(budgets) -> Callable:
    """Return a function from a budget to its colour, dark for the least."""
    from matplotlib import colormaps

    low, high = np.log([budgets.min(), budgets.max()])

    def color(budget):
        share = (math.log(budget) - low) / (high - low) if high > low else 0.4
        return colormaps["viridis"](0.78 * share)  # its yellow end is lost on white

    return color


def _losses(losses):
    """Return the norm and the colours of losses, the dark ones for the highest."""
    from matplotlib import colormaps, colors

    shades = colormaps["viridis_r"](np.linspace(0.2, 1, 128))
    low, high = losses.min(), losses.max()
    return colors.LogNorm(low, max(high, low * 1.01)), colors.ListedColormap(shades)


def _bar(bar, axis, norm, label: str) -> None:
    ticks = _ticks(norm.vmin, norm.vmax, most=8)
    bar.set_ticks(ticks, labels=[_short(tick) for tick in ticks])
    bar.set_label(label)
    bar.outline.set_visible(False)
    axis.minorticks_off()


def _log_axis(axis, values, show: Callable, *, pad=1.15, most=7) -> None:
    """Give an axis a log scale about `values`, with ticks that `show` writes."""
    values = values[np.isfinite(values) & (values > 0)]
    low, high = values.min() / pad, values.max() * pad
    ticks = _ticks(low, high, most=most)
    name = axis.axis_name
    # Limits first: without them the scale looks through everything drawn for some.
    axis.axes.set(**{f"{name}lim": (low, high), f"{name}scale": "log"})
    axis.minorticks_off()
    axis.set_ticks(ticks, labels=[show(tick) for tick in ticks])


def _ticks(low: float, high: float, *, most: int = 7) -> np.ndarray:
    """Return as many round numbers from `low` to `high` as `most` allows."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = [np.arange(10, 100, step) / 10 for step in (1, 2, 5)]
    steps += [(1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3)]
    choices = [(each, 1) for each in steps] + [((1,), every) for every in range(1, 9)]
    for each, every in choices:
        powers = 10.0 ** np.arange(first, last + 1, every)
        ticks = np.unique(np.outer(powers, each))
        ticks = ticks[(ticks >= low) & (ticks <= high)]
        if len(ticks) <= most:
            break
    return ticks if len(ticks) > 1 else np.geomspace(low, high, 3)


def _power(value: float) -> str:
    """Return a number as 3·10²¹, in Unicode alone: mathtext takes far longer."""
    factor, exponent = f"{value:.1e}".split("e")
    raised = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    factor = factor.removesuffix(".0")
    return f"10{raised}" if factor == "1" else f"{factor}·10{raised}"


def _short(value: float) -> str:
    return f"{value:.4g}" if value < 1e4 else amount(value)


def _symbol(name: str) -> str:
    known = {"alpha": "α", "beta": "β", "E": "E (nats per token)"}  # noqa: RUF001
    return (known | {"a": "a (N* ∝ Cᵃ)"}).get(name, name)


def _count(fit) -> str:
    return str(fit["inputs"]["count"]).replace("_", "-")


def _name(axes, across, up, said: Iterable[str]) -> None:
    """Write labels beside points, on the side that has room, none upon another."""
    low, high = axes.get_xlim()
    gap = 0.05 * np.ptp(axes.get_ylim())
    free = math.inf
    for height, at, text in sorted(zip(up, across, said, strict=True), reverse=True):
        free = min(height, free - gap)
        left = at > math.sqrt(low * high)
        style = {"ha": "right" if left else "left", "va": "center", "fontsize": 8.5}
        offset = {"textcoords": "offset points", "xytext": (-7 if left else 7, 0)}
        axes.annotate(text, (at, free), **offset, **style)


def _beside(axes, title: str, said: Iterable[tuple]) -> None:
    """Write (height, name, remark, colour) right of the axes, none upon another."""
    low, high = np.log(axes.get_ylim())
    place = {"transform": axes.transAxes, "va": "center"}
    axes.text(1.02, 1.0, title, weight="bold", **place)
    free = 1.0
    for height, name, remark, color in sorted(said, key=lambda one: -one[0]):
        free = min((math.log(height) - low) / (high - low), free - 0.045)
        axes.text(1.02, free, name, color=color, **place)
        if remark:
            lines = textwrap.fill(remark, 24)
            axes.text(1.135, free, lines, color="#555555", fontsize=8.5, **place)
