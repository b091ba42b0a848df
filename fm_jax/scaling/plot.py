"""The figures of a fit."""

import io
from typing import Any

import numpy as np

from fm_jax.scaling import axes, drawn

# Of Okabe and Ito's colours, which the colour blind tell apart; dashes differ as well.
BLUE, RED, GREEN = "#0072B2", "#D55E00", "#009E73"
INK, GREY, PALE = axes.INK, "#808080", "#dbe9f2"
DOTTED = (0, (1, 1.5))
LINES = {
    "approach3": {"color": BLUE, "ls": "-", "lw": 2},
    "approach2": {"color": RED, "ls": (0, (5, 2)), "lw": 2},
    "approach1": {"color": GREEN, "ls": (0, (1, 1.2)), "lw": 2},
}


def figures(rows: dict[str, list[dict]], record: dict[str, Any]) -> dict[str, Any]:
    """Return a matplotlib Figure, by name, for each table that `drawn.tables` returns.

    `record` is what fit.json holds. Nothing of pyplot is touched, and a style that the
    user has set does not show.
    """
    with axes.styled():
        return {n: _DRAW[n](drawn.series(rows[n]), record) for n in rows}


def png(figure: Any) -> bytes:
    """Return a figure as a PNG on white: the same bytes for the same figure."""
    stream = io.BytesIO()
    with axes.styled():
        figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def _isoflop(of, record):
    figure = axes.figure(8.6, 5.3, left=0.075, right=0.74, bottom=0.1, top=0.92)
    panel = figure.subplots()
    runs, minima = of["run"], of["minimum"]
    stray = ~np.isin(runs["budget"], minima["budget"])
    panel.plot(runs["params"][stray], runs["loss"][stray], ".", color="#c4c4c4")
    beside, tints = [], axes.tints(minima["budget"])
    for index, (budget, tint) in enumerate(zip(minima["budget"], tints, strict=True)):
        mine = runs["budget"] == budget
        face = tint if minima["used"][index] else "white"
        dots = {"marker": "o", "ls": "", "ms": 4.5, "mec": tint, "mfc": face}
        panel.plot(runs["params"][mine], runs["loss"][mine], **dots)
        for series, dashes in (("slice", "-"), ("law", DOTTED)):
            if series in of:
                on = of[series]["budget"] == budget
                line = of[series]["params"][on], of[series]["loss"][on]
                panel.plot(*line, color=tint, ls=dashes, lw=1.5)
        at = minima["params"][index], minima["loss"][index]
        panel.plot(*at, "D", ms=8, mfc=face, mec=INK, mew=1.3, zorder=4)
        lowest = np.nanmin([at[1], *runs["loss"][mine]])
        beside.append((lowest, axes.power(budget), minima["flags"][index], tint))
    axes.log_axis(panel.xaxis, runs["params"], axes.amount)
    axes.log_axis(panel.yaxis, runs["loss"], axes.short, pad=1.03, most=9)
    panel.set(xlabel=f"parameters N ({_count(record)})", ylabel="loss (nats per token)")
    axes.beside(panel, "budget (FLOPs)", beside)
    keys = [
        axes.key("run", color=GREY, marker="o", ls="", ms=4.5),
        axes.key("slice fit", color=GREY),
        axes.key("slice minimum", marker="D", ls="", mfc=GREY, mec=INK),
        axes.key("slice left out", marker="D", ls="", mfc="w", mec=INK),
    ]
    if "law" in of:
        keys.append(axes.key("approach 3 at the budget", color=GREY, ls=DOTTED))
    axes.legend(figure, keys, 0.075)
    return figure


def _frontier(of, record):
    figure = axes.figure(
        8.7, 4.3, left=0.085, right=0.985, bottom=0.31, top=0.97, wspace=0.33
    )
    low, high = record["range"]["flops_6nd"]
    runs, there = of["run"], [name for name in drawn.APPROACHES if name in of]
    shows = {
        "params": (axes.amount, f"optimal parameters N* ({_count(record)})"),
        "tokens": (axes.amount, "optimal tokens D*"),
        "ratio": (axes.short, "optimal tokens per parameter D*/N*"),
    }
    style = axes.shades(runs["loss"]) | {"c": runs["loss"], "s": 9, "lw": 0}
    panels = figure.subplots(1, 3)
    for panel, (name, (show, label)) in zip(panels, shows.items(), strict=True):
        beyond = high * drawn.BEYOND
        panel.axvspan(high, beyond, color="#f0f0f0", lw=0, zorder=0)
        shown = panel.scatter(runs["flops"], runs[name], **style)
        seen = [runs[name]]
        for approach in there:
            line, tint = of[approach], LINES[approach]["color"]
            band = line[f"{name}_low"], line[f"{name}_high"]
            panel.fill_between(line["flops"], *band, color=tint, alpha=0.2, lw=0)
            panel.plot(line["flops"], line[name], **LINES[approach])
            seen += [*band, line[name]]
        for series, face in (("slice", RED), ("slice left out", "w")):
            if series in of:
                at = of[series]["flops"], of[series][name]
                panel.plot(*at, "D", ms=5.5, mfc=face, mec=INK)
        axes.log_axis(panel.xaxis, np.array([low, beyond]), axes.power, most=5)
        axes.log_axis(panel.yaxis, np.concatenate(seen), show)
        panel.set(xlabel="compute C (FLOPs)", ylabel=label)
    keys = [axes.key(drawn.APPROACHES[name], **LINES[name]) for name in there]
    if any(np.isfinite(of[name]["params_low"]).any() for name in there):
        left_out = np.nansum([of[name]["draws_missing"][0] for name in there])
        said = f"; {left_out:.0f} draws have no optimum" if left_out else ""
        keys.append(axes.patch("95 % bootstrap interval" + said, "#c3dceb"))
    if "slice" in of:
        keys.append(axes.key("slice minimum", marker="D", ls="", mfc=RED, mec=INK))
    keys.append(axes.patch(f"beyond the runs, to {drawn.BEYOND:.0f} times", "#e6e6e6"))
    figure.legend(handles=keys, loc="upper left", ncols=2, bbox_to_anchor=(0.085, 0.18))
    place, said = (0.66, 0.125, 0.3, 0.03), "loss of a run (nats per token)"
    axes.bar(figure, shown, place, said, orientation="horizontal")
    return figure


def _residuals(of, record):
    figure = axes.figure(
        8.7, 3.6, left=0.08, right=0.985, bottom=0.15, top=0.9, wspace=0.08
    )
    panels, runs = figure.subplots(1, 3), of["run"]
    percent, out, named = 100 * runs["residual"], runs["outlier"], runs["named"]
    said = [f"row {row:.0f}" for row in runs["row"][named]]
    spread = 100 * record["approach3"]["residual_sd"]
    reach = 1.15 * max(np.abs(percent).max(), 100 * drawn.EXACT)
    shows = {
        "params": (axes.amount, f"parameters N ({_count(record)})"),
        "tokens": (axes.amount, "tokens D"),
        "flops": (axes.power, "compute C (FLOPs)"),
    }
    dots = {"ls": "", "marker": "o", "ms": 4.5, "mew": 0, "color": BLUE, "alpha": 0.55}
    crosses = {"ls": "", "marker": "X", "ms": 6.5, "mew": 0, "color": RED}
    for panel, (name, (show, label)) in zip(panels, shows.items(), strict=True):
        panel.axhspan(-2 * spread, 2 * spread, color="#e9f1f6", lw=0, zorder=0)
        panel.axhline(0, color=INK, lw=1)
        panel.plot(runs[name][~out], percent[~out], **dots)
        panel.plot(runs[name][out], percent[out], **crosses)
        axes.log_axis(panel.xaxis, runs[name], show, most=6)
        panel.set(xlabel=label, ylim=(-reach, reach))
        panel.tick_params(labelleft=panel is panels[0])
        axes.label(panel, runs[name][named], percent[named], said)
    panels[0].set_ylabel("100 ln(loss / fitted loss)")
    keys = [axes.key("run", **dots)]
    keys.append(axes.patch(f"within 2 sd (sd {spread:.2g})", "#d5e5ef"))
    if out.any():
        keys.append(axes.key(f"beyond {drawn.OUTLIER:g} robust sd", **crosses))
    axes.legend(figure, keys, 0.075)
    return figure


def _contours(of, record):
    figure = axes.figure(8.2, 6.0, left=0.095, right=0.86, bottom=0.095, top=0.915)
    panel = figure.subplots()
    surface, runs, equal = of["surface"], of["run"], of["isoflop"]
    params, tokens = np.unique(surface["params"]), np.unique(surface["tokens"])
    losses = surface["loss"].reshape(len(tokens), len(params))
    levels = np.exp(np.linspace(*np.log([losses.min(), losses.max()]), 18))[1:-1]
    style = axes.shades(runs["loss"])
    panel.set(xscale="log", yscale="log")
    lines = panel.contour(params, tokens, losses, levels, linewidths=1.2, **style)
    panel.clabel(lines, levels[::2], fmt=lambda loss: f"{loss:.2f}", fontsize=9)
    for flops in np.unique(equal["flops"]):
        on = equal["flops"] == flops
        ends = equal["params"][on], equal["tokens"][on]
        panel.plot(*ends, color="#b5b5b5", lw=1, zorder=1)
        # Where the line leaves the picture at the bottom, or else at the right.
        at, text = (ends[0][0], ends[1][0]), {"color": "#666666", "fontsize": 8.5}
        text |= {"textcoords": "offset points", "va": "bottom"}
        panel.annotate(axes.power(flops), at, (3, 3), **text)
    style |= {"c": runs["loss"], "s": 26, "lw": 0.6, "ec": "white", "zorder": 3}
    shown = panel.scatter(runs["params"], runs["tokens"], **style)
    keys = [
        axes.key("run", marker="o", ls="", color="#35808a", mec="w", ms=6),
        axes.key("equal loss", color="#35808a", lw=1.2),
        axes.key("equal compute (FLOPs)", color="#b5b5b5", lw=1),
    ]
    if "path" in of:
        panel.plot(of["path"]["params"], of["path"]["tokens"], color=INK, lw=2.2)
        keys.append(axes.key("least loss for the compute", color=INK, lw=2.2))
    panel.grid(False)
    axes.log_axis(panel.xaxis, params, axes.amount, pad=1)
    axes.log_axis(panel.yaxis, tokens, axes.amount, pad=1)
    panel.set(xlabel=f"parameters N ({_count(record)})", ylabel="tokens D")
    axes.bar(figure, shown, (0.885, 0.095, 0.02, 0.82), "loss (nats per token)")
    axes.legend(figure, keys, 0.095)
    return figure


def _draws(of, record):
    figure = axes.figure(
        7.8, 7.4, left=0.1, right=0.98, bottom=0.08, top=0.95, wspace=0.09, hspace=0.09
    )
    labels, spans = {}, {}
    for name, values in of["draw"].items():
        labels[name] = _symbol(name)
        if values.min() > 0 and values.max() > 20 * values.min():
            labels[name] = f"log₁₀ {name}"
            of = {key: one | {name: np.log10(one[name])} for key, one in of.items()}
        spans[name] = _span(of["draw"][name])
    draws, names, size = of["draw"], list(labels), len(labels)
    for line, below in enumerate(names):
        for column, across in enumerate(names[: line + 1]):
            panel = figure.add_subplot(size, size, line * size + column + 1)
            panel.set_xlim(spans[across])
            axes.few_ticks(panel.xaxis)
            left, bottom = column == 0 < line, line == size - 1
            panel.tick_params(labelleft=left, labelbottom=bottom)
            panel.set_xlabel(labels[across] if bottom else "")
            panel.set_ylabel(labels[below] if left else "")
            if below != across:
                dots = {"ms": 3.5, "color": BLUE, "alpha": 0.3, "mew": 0}
                panel.plot(draws[across], draws[below], ".", **dots)
                at = of["estimate"][across], of["estimate"][below]
                panel.plot(*at, "P", ms=10, mfc=RED, mec="white")
                panel.set_ylim(spans[below])
                axes.few_ticks(panel.yaxis)
                continue
            best, low, high = (of[key][below][0] for key in ("estimate", "low", "high"))
            panel.axvspan(low, high, color=PALE, lw=0)
            panel.hist(draws[below], bins=30, range=spans[below], color="#8dbad6")
            panel.axvline(best, color=RED, lw=1.8)
            panel.set(yticks=[])
            panel.grid(False)
            form = ".3f" if max(best, low, high) < 100 else ".0f"
            title = f"{labels[below].split(' (')[0]} = {best:{form}}"
            title += f" [{low:{form}}, {high:{form}}]"
            panel.set_title(title, fontsize=9.5, loc="left", pad=3)
    keys = [
        axes.key("point estimate", color=RED, marker="P", ls="", ms=10, mec="w"),
        axes.key("bootstrap draw", color=BLUE, marker=".", ls="", ms=6),
        axes.patch("95 % interval", PALE),
    ]
    figure.legend(handles=keys, loc="upper right", bbox_to_anchor=(0.98, 0.95))
    return figure


def _cut(of, record):
    cuts, whole = of["cut"], of["all"]
    has = np.isfinite(whole["a"]).any()
    size = (8.0, 5.4) if has else (8.0, 3.0)
    ends = {"bottom": 0.105, "top": 0.93} if has else {"bottom": 0.18, "top": 0.89}
    figure = axes.figure(*size, left=0.1, right=0.97, hspace=0.24, **ends)
    *upper, lower = figure.subplots(1 + has, squeeze=False)[:, 0]
    spread = np.concatenate([cuts["flops"], whole["flops"]])
    for panel in upper:  # none where the law has no exponent
        keys = [axes.key("runs up to the cut", color=RED, marker="o", lw=1.4)]
        keys.append(axes.key("all runs", color=BLUE, marker="s", ms=7, lw=1.2))
        low, high = whole["a_low"][0], whole["a_high"][0]
        if np.isfinite([low, high]).all():
            panel.axhspan(low, high, color="#e4eef5", lw=0)
            keys.append(axes.patch("their 95 % interval", "#d5e5f0"))
        panel.axhline(whole["a"][0], color=BLUE, lw=1.2)
        panel.plot(whole["flops"], whole["a"], "s", ms=7, color=BLUE)
        bars = np.abs(np.stack([cuts["a_low"], cuts["a_high"]]) - cuts["a"])
        style = {"fmt": "o-", "ms": 6, "color": RED, "capsize": 3, "lw": 1.2}
        panel.errorbar(cuts["flops"], cuts["a"], yerr=bars, **style)
        panel.set_ylabel("exponent a (N* ∝ Cᵃ)")
        axes.log_axis(panel.xaxis, spread, axes.power, pad=1.3)
        panel.tick_params(labelbottom=False)
        axes.legend(figure, keys, 0.1)
    marks = {"mare": ("o", INK, "mean error"), "worst": ("v", GREY, "worst run")}
    for name, (marker, color, label) in marks.items():
        style = {"marker": marker, "ms": 6, "lw": 1, "color": color, "label": label}
        lower.plot(cuts["flops"], 100 * cuts[name], **style)
    points = zip(cuts["flops"], 100 * cuts["mare"], cuts["test"], strict=True)
    for *at, tested in points:
        text = {"textcoords": "offset points", "ha": "center", "fontsize": 8.5}
        lower.annotate(f"{tested:.0f} runs", at, (0, -14), color="#555555", **text)
    top = 100 * max(cuts["worst"].max(), drawn.EXACT)
    lower.set_ylim(-0.16 * top, 1.1 * top)
    axes.log_axis(lower.xaxis, spread, axes.power, pad=1.3)
    lower.set_xlabel("largest compute kept in the fit (FLOPs)")
    lower.set_ylabel("error beyond the cut (%)")
    lower.legend(loc="lower left", bbox_to_anchor=(0, 1.01), ncols=2)
    return figure


_DRAW = {
    "isoflop": _isoflop,
    "frontier": _frontier,
    "residuals": _residuals,
    "contours": _contours,
    "draws": _draws,
    "cut": _cut,
}


def _span(values) -> tuple[float, float]:
    """Return limits that hold all but the wildest values."""
    low, high = np.quantile(values, (0.002, 0.998))
    return low - 0.08 * (high - low), high + 0.08 * (high - low)


def _symbol(name: str) -> str:
    known = {"alpha": "α", "beta": "β", "E": "E (nats per token)"}  # noqa: RUF001
    return (known | {"a": "a (N* ∝ Cᵃ)"}).get(name, name)


def _count(record) -> str:
    return str(record["inputs"]["count"]).replace("_", "-")
