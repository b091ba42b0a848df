"""report.html: a run, or several side by side, in one self-contained file."""

import html
import io
import json
from collections.abc import Sequence
from pathlib import Path

from fm_jax.errors import UserError
from fm_jax.runs import Run

CURVES = (
    ("loss", "nats per token", (("train/loss", "train"), ("eval/loss", "held out"))),
    (
        "compression",
        "bits per byte",
        (("train/bits_per_byte", "train"), ("eval/bits_per_byte", "held out")),
    ),
    ("learning rate", "", (("optimizer/learning_rate", ""),)),
    ("gradient norm", "", (("grads/norm", ""),)),
    ("throughput", "tokens per second", (("perf/tokens_per_second", ""),)),
)
# A line across a figure: the last value of a metric, where a run has it.
YARDSTICKS = {
    "loss": ("final/bayes_loss", "best possible (Bayes), held out"),
    "compression": ("gzip/bits_per_byte", "gzip -9, held out"),
}
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;
color:#222}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem;border-bottom:1px solid #ddd}
table{border-collapse:collapse;font-size:.9rem}
td,th{padding:.2rem .8rem .2rem 0;text-align:left;vertical-align:top}
td.n{text-align:right;font-variant-numeric:tabular-nums}
pre{background:#f6f6f4;padding:.8rem;white-space:pre-wrap;overflow-wrap:anywhere;
font-size:.85rem}
figure{margin:1rem 0}svg{max-width:100%;height:auto}details{margin:.5rem 0}
"""


def write(paths: Sequence[Path], out: Path) -> None:
    """Write the report of runs to `out`; several share their figures.

    Raises UserError when a path is not a run.
    """
    runs = [Run(path) for path in paths]
    records = [run.read_config() for run in runs]
    names = [path.resolve().name for path in paths]
    parts = [f"<h1>{html.escape(' and '.join(names))}</h1>", _summary(runs, names)]
    parts += [_figure(svg) for svg in curves(runs, names).values()]
    for run, record, name in zip(runs, records, names, strict=True):
        title = f": {name}" if len(runs) > 1 else ""
        parts += _one(run, record, html.escape(title))
    text = (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        f"<title>{html.escape(names[0])}</title><style>{STYLE}</style>"
        + "\n".join(parts)
        + "</html>\n"
    )
    Run(out.parent).write(out.name, text)


def write_figures(paths: Sequence[Path], folder: Path) -> list[Path]:
    """Write each figure of the report of runs as a file of `folder`; return them."""
    runs = [Run(path) for path in paths]
    for run in runs:
        run.read_config()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--figures must be a folder to write in; got {folder} ({error.strerror})."
        ) from error
    written = []
    for title, svg in curves(runs, [path.resolve().name for path in paths]).items():
        name = f"{title.replace(' ', '_')}.svg"
        Run(folder).write(name, svg)
        written.append(folder / name)
    return written


def curves(runs: Sequence[Run], names: Sequence[str]) -> dict[str, str]:
    """Return an SVG, by title, for each group of curves that any of the runs has."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.fonttype"] = "none"
    # Without fixed ids and dates the same run gives the same file.
    matplotlib.rcParams["svg.hashsalt"] = "fm_jax"
    from matplotlib import pyplot

    figures = {}
    for title, unit, series in CURVES:
        figure, axes = pyplot.subplots(figsize=(8, 3.2), layout="constrained")
        drawn = 0
        for index, (run, name) in enumerate(zip(runs, names, strict=True)):
            for metric, kind in series:
                steps, values = run.series(metric)
                if not steps:
                    continue
                drawn += 1
                label = ", ".join(filter(None, (name if len(runs) > 1 else "", kind)))
                label = label or title
                if metric.startswith("eval/"):
                    axes.plot(
                        steps,
                        values,
                        "--o",
                        color=f"C{index}",
                        label=label,
                        markersize=4,
                        linewidth=1.2,
                    )
                    continue
                # One step's number is noisy: faint as it is, and its running mean.
                axes.plot(steps, values, color=f"C{index}", linewidth=0.8, alpha=0.3)
                axes.plot(
                    steps,
                    running_mean(values, len(values) // 20),
                    color=f"C{index}",
                    label=label,
                    linewidth=1.4,
                )
        if title in YARDSTICKS and drawn:
            metric, label = YARDSTICKS[title]
            for index, run in enumerate(runs):
                _, values = run.series(metric)
                if values:
                    axes.axhline(
                        values[-1],
                        color=f"C{index}",
                        linewidth=1,
                        linestyle=":",
                        label=label,
                    )
        if drawn:
            axes.set(title=title, xlabel="step", ylabel=unit)
            axes.grid(alpha=0.25)
            if drawn > 1:
                axes.legend(frameon=False)
            stream = io.StringIO()
            figure.savefig(stream, format="svg", metadata={"Date": None})
            figures[title] = stream.getvalue()
        pyplot.close(figure)
    return figures


def running_mean(values: Sequence[float], reach: int) -> list[float]:
    """Return the mean of each value and up to `reach` neighbours on either side."""
    means = []
    for index in range(len(values)):
        # As many on the left as on the right, so that ends do not lag.
        side = min(reach, index, len(values) - 1 - index)
        near = values[index - side : index + side + 1]
        means.append(sum(near) / len(near))
    return means


def _figure(svg: str) -> str:
    return f"<figure>{svg[svg.index('<svg') :]}</figure>"


def _summary(runs: Sequence[Run], names: Sequence[str]) -> str:
    wanted = {
        "steps": ("train/loss", lambda steps, values: f"{steps[-1]:,}"),
        "train loss (nats/token)": ("train/loss", _last),
        "held-out loss (nats/token)": ("final/loss", _last),
        "best possible, Bayes (nats/token)": ("final/bayes_loss", _last),
        "held-out above it (nats/token)": ("final/excess_loss", _last),
        "held-out bits/byte": ("final/bits_per_byte", _last),
        "gzip -9 bits/byte": ("gzip/bits_per_byte", _last),
        "tokens/s (median)": ("perf/median_tokens_per_second", _whole),
        "MFU (median)": ("perf/median_mfu", lambda s, v: f"{v[-1]:.1%}"),
        "time that trained what was kept": ("run/goodput", lambda s, v: f"{v[-1]:.1%}"),
        "starts": ("run/starts", _whole),
        "peak host memory (MB)": ("memory/peak_host_bytes", _megabytes),
        "peak memory as predicted (MB)": ("predicted/memory_bytes", _megabytes),
        "peak memory as measured (MB)": ("memory/peak_bytes", _megabytes),
        "step at the roofline (ms)": ("predicted/step_seconds", _milliseconds),
        "step as measured, median (ms)": ("perf/median_step_seconds", _milliseconds),
    }
    rows = ["<tr><th></th>" + "".join(f"<th>{html.escape(n)}</th>" for n in names)]
    for label, (metric, show) in wanted.items():
        cells = []
        for run in runs:
            steps, values = run.series(metric)
            cells.append(show(steps, values) if steps else "")
        if any(cells):
            shown = "".join(f"<td class=n>{cell}</td>" for cell in cells)
            rows.append(f"<tr><td>{label}</td>{shown}")
    states = [
        "done"
        if (run.path / "DONE").exists()  # of an imported run it says 0
        else (run.path / "FAILED").read_text()
        if (run.path / "FAILED").exists()
        else "not finished"
        for run in runs
    ]
    rows.append(
        "<tr><td>state</td>" + "".join(f"<td>{html.escape(s)}</td>" for s in states)
    )
    return f"<table>{''.join(rows)}</table>"


def _last(steps, values) -> str:
    return f"{values[-1]:.4f}"


def _megabytes(steps, values) -> str:
    return f"{values[-1] / 1e6:,.0f}"


def _milliseconds(steps, values) -> str:
    return f"{values[-1] * 1e3:,.3g}"


def _whole(steps, values) -> str:
    return f"{values[-1]:,.0f}"


def _one(run: Run, record: dict, title: str) -> list[str]:
    parts = []
    times = {
        key.removeprefix("time/").removesuffix("_seconds"): values[-1]
        for key in {k for row in run.rows() for k in row if k.startswith("time/")}
        for _, values in [run.series(key)]
    }
    if times:
        total = sum(times.values())
        rows = "".join(
            f"<tr><td>{html.escape(name)}<td class=n>{seconds:.2f} s"
            f"<td class=n>{seconds / total:.1%}"
            for name, seconds in sorted(
                times.items(), key=lambda item: (-item[1], item[0])
            )
        )
        last = ", since the last start" if len(record["history"]) > 1 else ""
        parts += [f"<h2>Where the time went{last}{title}</h2><table>{rows}</table>"]
    samples = list(run.rows("samples.jsonl"))
    if samples:
        parts.append(f"<h2>Samples{title}</h2>")
        parts += [
            f"<p>step {s['step']}</p><pre>{html.escape(s['text'])}</pre>"
            for s in samples[-4:]
        ]
    changed = "".join(
        f"<tr><td>{html.escape(key)}<td>{html.escape(repr(new))}"
        f"<td>{html.escape(repr(old))}"
        for key, (old, new) in record["changed_from_base"].items()
    )
    parts.append(
        f"<h2>Config{title}</h2><table><tr><th>changed<th>here<th>in base.py{changed}"
        "</table><details><summary>every key</summary><pre>"
        f"{html.escape(json.dumps(record['config'], indent=1))}</pre></details>"
    )
    rest = {key: record[key] for key in ("resolved", "data", "history")}
    parts.append(
        f"<h2>Environment{title}</h2><pre>"
        f"{html.escape(json.dumps(rest, indent=1))}</pre>"
    )
    return parts
