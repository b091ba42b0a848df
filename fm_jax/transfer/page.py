"""The table of a study, as JSON and as a page: what it shows and how sure that is."""

from collections.abc import Mapping, Sequence

from fm_jax.transfer import paired
from fm_jax.transfer.paired import Estimate
from fm_jax.transfer.study import Found

Chosen = Mapping[str, Mapping[int, Found]]


def summary(
    chosen: Chosen, *, names: Sequence[str], rates: Sequence[float], against: str
) -> dict:
    """Return means, intervals and paired differences of every method and file.

    chosen: the run of each method and seed. names: of the held-out files; the first
    chose the rates. against: the method that the others are compared with, of which
    there may be no run.
    """
    table = {
        method: {
            "accuracy": _by_name(runs, names, "accuracy"),
            "loss": _by_name(runs, names, "loss"),
            "drift": _by_name(runs, names, "drift"),
            "rates": {seed: run.rate for seed, run in sorted(runs.items())},
        }
        for method, runs in chosen.items()
    }
    differences = {
        method: {
            name: vars(
                paired.difference(
                    _values(runs, "accuracy", name),
                    _values(chosen[against], "accuracy", name),
                )
            )
            for name in names
        }
        for method, runs in chosen.items()
        if method != against and against in chosen
    }
    return {
        "level": paired.LEVEL,
        "files": list(names),
        "rates": list(rates),
        "against": against,
        "methods": table,
        "differences": differences,
    }


def lines(found: Mapping, *, title: str, about: Sequence[str]) -> list[str]:
    """Return `summary` as a page of Markdown; accuracies are in per cent.

    about: what stands before the tables, a line each.
    """
    names, methods = found["files"], found["methods"]
    head = ["method", *(f"accuracy {name}, %" for name in names)]
    drifts = [n for n in names if any(m["drift"][n]["count"] for m in methods.values())]
    head += [*(f"drift {name}" for name in drifts), "rates chosen"]
    rows = [
        [
            method,
            *(_number(numbers["accuracy"][name], 100, ".1f") for name in names),
            *(_number(numbers["drift"][name], 1, ".3f") for name in drifts),
            _rates(numbers["rates"].values()),
        ]
        for method, numbers in methods.items()
    ]
    text = [f"# {title}", "", *about, "", *_table([head, *rows])]
    if found["differences"]:
        head = ["difference", *(f"{name}, points" for name in names)]
        rows = [
            [
                f"{method} - {found['against']}",
                *(_number(by_name[name], 100, "+.1f") for name in names),
            ]
            for method, by_name in found["differences"].items()
        ]
        text += ["", *_table([head, *rows]), "", *_said(found)]
    return [*text, "", *_remarks(found)]


def _values(runs: Mapping[int, Found], kind: str, name: str) -> dict[int, float]:
    return {
        seed: getattr(run, kind)[name]
        for seed, run in runs.items()
        if name in getattr(run, kind)
    }


def _by_name(runs: Mapping[int, Found], names: Sequence[str], kind: str) -> dict:
    return {
        name: vars(paired.estimate(list(_values(runs, kind, name).values())))
        for name in names
    }


def _said(found: Mapping) -> list[str]:
    """Return each comparison as a sentence."""
    said = []
    for name in found["files"]:
        for method, by_name in found["differences"].items():
            one = Estimate(**by_name[name])
            if one.half_width is None:
                what = "cannot be compared with"
            elif not one.excludes_zero:
                what = "cannot be told from"
            else:
                what = "is above" if one.mean > 0 else "is below"
            count = f"{one.count} pair{'' if one.count == 1 else 's'}"
            said.append(f"- {name}: {method} {what} {found['against']} ({count})")
    return said


def _remarks(found: Mapping) -> list[str]:
    """Return what must be known to read the tables, as lines."""
    counts = {
        numbers["accuracy"][found["files"][0]]["count"]
        for numbers in found["methods"].values()
    }
    seeds = " to ".join(str(n) for n in sorted({min(counts), max(counts)}))
    level = f"{found['level']:.0%}".replace("%", " %")
    remarks = [
        f"+- is half a {level} t interval over {seeds} seeds, as if they were normal; "
        "each interval stands for itself, uncorrected for their number.",
        f"{found['files'][0]} chose each seed's rate, so what stands under it "
        "flatters methods that have one; no other file was looked at.",
    ]
    rates = found["rates"]
    edges = {min(rates), max(rates)} if len(rates) > 1 else set()
    for method, numbers in found["methods"].items():
        there = [rate for rate in numbers["rates"].values() if rate in edges]
        if there:
            remarks.append(
                f"{method}: {len(there)} of {len(numbers['rates'])} rates are at an "
                "end of the sweep: a wider one may do better."
            )
    return remarks


def _number(estimate: Mapping, scale: float, form: str) -> str:
    one = Estimate(**estimate)
    if one.mean is None:
        return "-"
    mean = f"{scale * one.mean:{form}}"
    if one.half_width is None:
        return mean
    return f"{mean} +- {scale * one.half_width:{form.lstrip('+')}}"


def _rates(rates) -> str:
    """Return rates with how many seeds chose them, lowest first."""
    counted: dict[float, int] = {}
    for rate in rates:
        if rate is not None:
            counted[rate] = counted.get(rate, 0) + 1
    return ", ".join(f"{rate:g} x{counted[rate]}" for rate in sorted(counted)) or "-"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows, the first of them the head, as a table of Markdown."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    made = [
        "| "
        + " | ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        + " |"
        for row in rows
    ]
    rule = ["-" * w if not place else "-" * (w - 1) + ":" for place, w in
            enumerate(widths)]  # fmt: skip
    return [made[0], "| " + " | ".join(rule) + " |", *made[1:]]
