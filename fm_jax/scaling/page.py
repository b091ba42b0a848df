"""report.html: a fit and all that speaks against it, in one self-contained file."""

import base64
import csv
import html
import io
import json
import os
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fm_jax import report
from fm_jax.errors import UserError
from fm_jax.scaling import axes, drawn, plot, show
from fm_jax.scaling import fit as fits

FILE = "report.html"
STYLE = """
.warnings{background:#fff4e5;border-left:5px solid #d55e00;padding:.2rem 1rem .6rem}
.warnings h2{border:0;margin-top:.6rem}
.fine{background:#eef6f1;border-left:5px solid #009e73;padding:.5rem 1rem}
img{max-width:100%;height:auto}figcaption{color:#444;max-width:48rem}
td.n,th.n{text-align:right;white-space:nowrap}
td{overflow-wrap:anywhere}tr.out td{color:#999}
"""
TITLES = {  # of each figure, and how to read it
    "isoflop": (
        "Loss by size at each budget",
        "Each colour is one compute budget: where its valley is lowest, the size is "
        "best; a hollow one is left out of approach 2, for the reason beside it.",
    ),
    "frontier": (
        "The best size and length by compute",
        "Lines say how many parameters and tokens are best at a compute, bands how far "
        "resampled runs move them; on grey there are no runs, only the law.",
    ),
    "cut": (
        "What the smaller runs would have said",
        "Each point is fitted to the runs up to that compute alone: a law that holds "
        "keeps its exponent and predicts the runs beyond with small error.",
    ),
    "residuals": (
        "What the law leaves",
        "The cloud should have no slope, bend or funnel; rows are counted from 0 among "
        "those that were fitted, and crosses are far from all others.",
    ),
    "contours": (
        "The fitted surface and the runs on it",
        "A run whose colour differs from the lines about it is misfitted, and the "
        "surface is a guess wherever there are no runs.",
    ),
    "draws": (
        "How far resampling moves the parameters",
        "Each dot is a fit to resampled runs: a long thin cloud means that the two "
        "parameters are known together and not each alone.",
    ),
}


def write(folder: Path, fit: fits.Fit, text: Sequence[str] = ()) -> list[Path]:
    """Write report.html, and each figure as a .png with its numbers in a .csv.

    `text` is what the terminal shows of the fit. The same fit gives the same bytes.
    Returns the files; raises UserError where `folder` cannot be written.
    """
    rows = drawn.tables(fit)
    figures = plot.figures(rows, fit.record)
    images = {name: plot.png(figure) for name, figure in figures.items()}
    files = {f"{name}.png": image for name, image in images.items()}
    files |= {f"{name}.csv": _csv(rows[name]).encode() for name in rows}
    files[FILE] = html_of(fit.record, images, text).encode()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            beside = folder / f".{name}.writing"
            beside.write_bytes(data)
            os.replace(beside, folder / name)
    except OSError as error:
        raise UserError(
            f"--out must be a folder to write in; got {folder} ({error.strerror})."
        ) from error
    return [folder / name for name in files]


def html_of(
    record: dict[str, Any], images: dict[str, bytes], text: Sequence[str] = ()
) -> str:
    """Return the page of a fit's record, with PNG images by the figure's name."""
    name = Path(str(record["inputs"]["path"])).name
    title = f"Scaling law of {name}"
    beside = {
        "isoflop": _slices,
        "cut": _held_out,
        "residuals": _sensitivity,
    }
    parts = [f"<h1>{_safe(title)}</h1>", _inputs_line(record), _warnings(record)]
    parts += [_estimates(record), _optima(record)]
    for figure, (heading, reading) in TITLES.items():
        tables = beside[figure](record) if figure in beside else ""
        if figure in images or tables:
            parts.append(f"<h2>{heading}</h2>")
        if figure in images:
            parts.append(_image(figure, heading, reading, images[figure]))
        parts.append(tables)
    parts += [_provenance(record), _command(record)]
    if text:
        parts += ["<h2>As printed</h2>", f"<pre>{_safe(chr(10).join(text))}</pre>"]
    parts.append(_details("fit.json", record))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{_safe(title)}</title><style>{report.STYLE}{STYLE}</style></head>"
        "<body>\n" + "\n".join(filter(None, parts)) + "\n</body></html>\n"
    )


def _inputs_line(record: dict) -> str:
    inputs, spans = record["inputs"], record["range"]
    compute = {"6ND": "6 N D", "column": "the table's own", "exact": "counted exactly"}
    low, high = spans["flops"]
    said = [
        f"{inputs['rows']} runs",
        f"N {_between(spans['params'])} parameters ({inputs['count']})",
        f"D {_between(spans['tokens'])} tokens",
        f"C {low:.3g} to {high:.3g} FLOPs ({compute[inputs['flops']]})",
    ]
    return f"<p>{_safe('; '.join(said))}. Loss in nats per token.</p>"


def _between(ends: Sequence[float]) -> str:
    return " to ".join(map(axes.amount, ends))


def _warnings(record: dict) -> str:
    said = record["warnings"]
    if not said:
        return '<p class="fine">No check found anything to warn of.</p>'
    items = "".join(f"<li>{_safe(one)}</li>" for one in said)
    many = "1 warning" if len(said) == 1 else f"{len(said)} warnings"
    return f'<section class="warnings"><h2>{many}</h2><ul>{items}</ul></section>'


def _estimates(record: dict) -> str:
    units = {"a": " of N* ~ C^a", "b": " of D* ~ C^b", "E": " (nats per token)"}
    rows, skipped = [("", "estimate", "95 % interval", "standard error")], []
    for approach, label in drawn.APPROACHES.items():
        found = record.get(approach) or {"skipped": "it was not asked for"}
        if "skipped" in found:
            why = f"No {label} estimate: {found['skipped']}."
            skipped.append(f"<p>{_safe(why)}</p>")
            continue
        how = label.split(" (")[0]
        parts = {how: found}
        if "corrected" in found:
            parts[f"{how}, less its bias"] = found["corrected"]
        for said, part in parts.items():
            for name in (name for name in part["ci"] if name in part):
                thing = f"{name}{units.get(name, '')}, {said}"
                interval = show.bracket(part["ci"][name])
                error = show.number(part.get("se", {}).get(name), ".2g")
                rows.append((thing, show.number(part[name]), interval, error))
    return "<h2>Estimates</h2>" + _table(rows) + _certificate(record) + "".join(skipped)


def _certificate(record: dict) -> str:
    found = record.get("approach3") or {}
    if "certificate" not in found:
        return ""
    sure, said = found["certificate"], []
    objective = record["options"].get("objective", "objective")
    said.append(f"{objective} = {found['objective']:.8g}")
    said.append(
        f"{sure['agreeing']} of {sure['starts']} starts end there, with a gradient of "
        f"{sure['gradient_norm']:.1g}"
    )
    if not sure["converged"]:
        said.append("NOT CONVERGED")
    said.append(
        f"residuals of ln loss have a standard deviation of {found['residual_sd']:.2%}"
    )
    return f"<p>{_safe(found['law'])}: {_safe('; '.join(said))}.</p>"


def _optima(record: dict) -> str:
    head = ("C (FLOPs)", "N*", "D*", "tokens/parameter", "loss", "N within 0.5 %")
    rows = [(*head, "beyond the runs")]
    for one in record.get("optima", []):
        if "skipped" in one:
            return f"<h2>Optimum</h2><p>None: {_safe(one['skipped'])}.</p>"
        beyond = one["extrapolation"]
        rows.append(
            (
                f"{one['flops']:.3g}",
                *(
                    _counted(one[name], one["ci"][name])
                    for name in ("params", "tokens")
                ),
                show.valued(one, "tokens_per_param", ".3g"),
                show.valued(one, "loss", ".4f"),
                _counted(None, one["flat"]),
                f"{beyond:.3g} times" if beyond > 1.001 else "no",
            )
        )
    floor = ""
    if "bayes" in record:
        bayes = record["bayes"]
        inside = "inside" if bayes["is_inside_ci"] else "outside"
        floor = (
            "<p>The best possible loss on this held-out text is "
            f"{bayes['loss']:.4f} nats per token; E is "
            f"{bayes['difference']:+.4f} from it, {inside} its interval.</p>"
        )
    return ("<h2>Optimum</h2>" + _table(rows) if len(rows) > 1 else "") + floor


def _counted(value: float | None, interval: Sequence = ()) -> str:
    """Return parameters or tokens as 1.5B [1.2B, 1.9B], a dash where there is none."""
    ends = ["-" if end is None else axes.amount(end) for end in interval]
    bracket = f"[{', '.join(ends)}]" if ends else ""
    if value is None:
        return bracket or "-"
    return f"{axes.amount(value)} {bracket}".rstrip()


def _slices(record: dict) -> str:
    found = (record.get("approach2") or {}).get("slices") or []
    if not found:
        return ""
    rows = [("budget (FLOPs)", "runs", "N*", "D*", "loss there", "flags", "used")]
    for one in found:
        best = (one["params_optimum"], one["tokens_optimum"])
        rows.append(
            (
                f"{one['budget']:.3g}",
                str(one["points"]),
                *map(_counted, best),
                show.number(one["loss_optimum"], ".4f"),
                ", ".join(one["flags"]).replace("_", " "),
                "yes" if one["used"] else "no",
            )
        )
    return _table(rows, [not one["used"] for one in found])


def _held_out(record: dict) -> str:
    tested = record.get("held_out") or []
    rows = [
        (
            "runs up to (FLOPs)",
            "fitted",
            "tested",
            "mean error",
            "worst",
            "inside 95 %",
            "a",
        )
    ]
    for one in tested:
        errors = ("mare", ".2%"), ("worst", ".2%"), ("coverage", ".0%")
        rows.append(
            (
                f"{one['cut']:.3g}",
                str(one["train"]),
                str(one["test"]),
                *(show.number(one.get(name), form) for name, form in errors),
                show.valued(one, "a", ".3f") if "a" in one else "-",
            )
        )
    return _table(rows) if tested else ""


def _sensitivity(record: dict) -> str:
    others = [
        ("as chosen" if one["what"] == "as asked" else one["what"], one)
        for one in record.get("sensitivity") or []
    ]
    others += [
        (f"N counted {count.replace('_', '-')}", one)
        for count, one in (record.get("by_count") or {}).items()
    ]
    if not others:
        return ""
    names = [
        name for name in (record.get("approach3") or {}).get("ci", ()) if name != "b"
    ]
    rows = [("under another choice", *names)]
    rows += [(what, *(show.number(one.get(n)) for n in names)) for what, one in others]
    return "<h2>Under other choices</h2>" + _table(rows)


def _provenance(record: dict) -> str:
    inputs = dict(record["inputs"])
    lists = {name: inputs.pop(name, None) or [] for name in ("diverged", "failed")}
    parts = ["<h2>Inputs and options</h2>"]
    for state, names in lists.items():
        if names:
            said = ", ".join(f"<code>{_safe(name)}</code>" for name in names)
            parts.append(f"<p>{len(names)} {state}, not fitted: {said}</p>")
    rows = [("", "")]
    for group in (inputs, record["options"]):
        rows += [
            (name.replace("_", " "), _plain(value))
            for name, value in group.items()
            if value not in (None, "", [], {}, ())
        ]
    parts.append(_table(rows[1:], header=False))
    return "".join(parts)


def _command(record: dict) -> str:
    """Return the command that makes this fit, where its flags are not the defaults."""
    flags = {"mapping": "map", "fixed": "fix"}
    words = ["fm", "fit", f"--runs={record['inputs']['path']}"]
    defaults = vars(fits.Options())
    for name, value in record["options"].items():
        if name not in defaults or value in (defaults[name], []):
            continue
        if name == "delta" and value is None:
            value = "inf"  # noqa: PLW2901, JSON has no infinity
        values = value if isinstance(value, list) else [value]
        if isinstance(value, dict):
            values = [f"{key}={number!r}" for key, number in value.items()]
        words += [f"--{flags.get(name, name)}={one}" for one in values]
    return f"<h2>Again</h2><pre>{_safe(shlex.join(words))}</pre>"


def _image(name: str, heading: str, reading: str, image: bytes) -> str:
    data = base64.b64encode(image).decode()
    return (
        f'<figure><img alt="{_safe(heading)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{_safe(reading)} Its numbers are in {name}.csv.</figcaption>"
        "</figure>"
    )


def _details(summary: str, value: Any) -> str:
    text = _safe(json.dumps(value, indent=1))
    return f"<details><summary>{_safe(summary)}</summary><pre>{text}</pre></details>"


def _table(
    rows: Sequence[Sequence[str]], faint: Iterable[bool] = (), *, header: bool = True
) -> str:
    """Return rows of text as a table; where numbers stand they go to the right."""
    faint = list(faint) or [False] * len(rows)
    lines = []
    for index, row in enumerate(rows):
        tag = "th" if header and index == 0 else "td"
        shade = ' class="out"' if index and header and faint[index - 1] else ""
        cells = "".join(
            f"<{tag}{_side(rows, column)}>{_safe(cell)}</{tag}>"
            for column, cell in enumerate(row)
        )
        lines.append(f"<tr{shade}>{cells}</tr>")
    return f"<table>{''.join(lines)}</table>"


def _side(rows, column: int) -> str:
    cells = [row[column] for row in rows[1:]]
    numeric = column and all(cell[:1] in "0123456789-+[." for cell in cells)
    return ' class="n"' if numeric else ""


def _plain(value: Any) -> str:
    """Return a value of JSON as a reader would write it."""
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_plain(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return str(value)


def _safe(value: object) -> str:
    return html.escape(str(value))


def _csv(rows: list[dict]) -> str:
    text = io.StringIO()
    lines = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    lines.writeheader()
    lines.writerows(rows)
    return text.getvalue()
