"""A fit as text: estimates with their intervals, checks, and warnings."""

import math
from collections.abc import Sequence
from typing import Any

SIGNIFICANT = ".4g"


def lines(record: dict[str, Any]) -> list[str]:
    """Return a fit's record as lines for a terminal."""
    text = [_inputs(record), *_parametric(record["approach3"], record["options"])]
    text += _others(record)
    text += ["", *_optima(record)]
    if "bayes" in record:
        text += ["", _floor(record["bayes"])]
    if "rates" in record:
        text += ["", *_rates(record["rates"])]
    text += ["", *_held_out(record["held_out"], record["approach3"])]
    text += ["", *_sensitivity(record)]
    warnings = record["warnings"]
    notes = record["inputs"].get("notes", [])
    text += ["", *(f"NOTE     {said}" for said in notes)]
    return text + [f"WARNING  {said}" for said in warnings]


def _inputs(record: dict) -> str:
    inputs, spans = record["inputs"], record["range"]
    left_out = inputs["excluded"] or {}
    said = ", ".join(f"{n} by {condition}" for condition, n in left_out.items())
    low, high = spans["flops"]
    extra = "".join(
        f", {count} {state}"
        for state in ("diverged", "failed", "running", "unstarted")
        for found in [inputs.get(state) or 0]
        if (count := found if isinstance(found, int) else len(found))
    )
    return (
        f"{inputs['rows']} runs ({said or 'none'} excluded{extra}), C {low:.3g} to "
        f"{high:.3g} ({spans['decades']:.1f} decades), N {inputs['count']}, "
        f"C {inputs['flops']}"
    )


def _parametric(fit: dict, options: dict) -> list[str]:
    sure = fit["certificate"]
    state = "converged" if sure["converged"] else "NOT CONVERGED"
    names = [n for n in fit["ci"] if n not in ("a", "b")]
    text = [
        f"approach 3 ({fit['law']}): {options['objective']} = "
        f"{number(fit['objective'], '.8g')}; "
        f"{state}, {sure['agreeing']} of {sure['starts']} starts agree, gradient "
        f"{sure['gradient_norm']:.1g}"
    ]
    shown = [f"{name} {valued(fit, name)}" for name in names]
    shown += [f"{name} {number(value)} (held)" for name, value in fit["fixed"].items()]
    text.append("  " + "  ".join(shown))
    exponents = [n for n in ("a", "b") if n in fit]
    if exponents:
        laws = {"a": "N* ~ C^a", "b": "D* ~ C^b"}
        shown = "  ".join(f"{n} {valued(fit, n)} ({laws[n]})" for n in exponents)
        text.append(f"  {shown}")
    seeds = fit["replicate_sd"]
    text.append(
        f"  95 % intervals of {fit['draws']:,} {options['bootstrap']} bootstraps; "
        f"residuals of ln loss {fit['residual_sd']:.2%} (sd)"
        + (f", {seeds:.2%} between seeds" if seeds is not None else "")
    )
    return text


def _others(record: dict) -> list[str]:
    said = []
    for number in (2, 1):
        found = record[f"approach{number}"]
        if "skipped" in found:
            said.append(f"approach {number}: none, {found['skipped']}")
            continue
        shown = f"approach {number}: a {valued(found, 'a')}"
        if "b" in found:
            shown += f"  b {valued(found, 'b')}"
        if "corrected" in found:
            shown += f" (its bias corrected: a {valued(found['corrected'], 'a')})"
        shown += f"; intervals by {found['bootstrap']}"
        if found["draws_refused"]:
            shown += f", {found['draws_refused']:,} draws without a line left out"
        said.append(shown)
    return said


def _optima(record: dict) -> list[str]:
    rows = [("C", "N*", "D*", "tokens/param", "loss (nats)", "N within 0.5 %", "")]
    for one in record["optima"]:
        if "skipped" in one:
            return [f"no optimum: {one['skipped']}"]
        beyond = one["extrapolation"]
        rows.append(
            (
                f"{one['flops']:.3g}",
                *(
                    valued(one, name, ".3g" if name != "loss" else ".4f")
                    for name in ("params", "tokens", "tokens_per_param", "loss")
                ),
                bracket(one["flat"], ".2g"),
                f"{beyond:.3g}x EXTRAPOLATED" if beyond > 1.001 else "",
            )
        )
    return table(rows)


def _floor(bayes: dict) -> str:
    inside = "inside" if bayes["is_inside_ci"] else "OUTSIDE"
    return (
        f"the best possible loss on this held-out text is {bayes['loss']:.4f} nats per "
        f"token; E is {bayes['E']:.4f}, {bayes['difference']:+.4f} from it, which is "
        f"{inside} its interval"
    )


def _rates(found: dict) -> list[str]:
    if "skipped" in found:
        return [f"learning rate and batch: no law, {found['skipped']}"]
    text = []
    for thing in ("learning_rate", "batch_tokens"):
        if thing in found and "skipped" not in found[thing]:
            one = found[thing]
            text.append(
                f"best {thing} = {valued(one, 'coefficient', '.3g')} * "
                f"N^{valued(one, 'params', '.3f')} * D^{valued(one, 'tokens', '.3f')}"
            )
    return text


def _held_out(tested: list[dict], fit: dict) -> list[str]:
    rows = [
        ("held out above", "fitted", "tested", "error", "worst", "inside 95 %", "a")
    ]
    for one in tested:
        a = valued(one, "a", ".3f") if "a" in one else ""
        if not one["test"]:
            rows.append(("nothing", str(one["train"]), "0", "", "", "", a))
            continue
        rows.append(
            (
                f"{one['cut']:.3g} FLOPs",
                str(one["train"]),
                str(one["test"]),
                f"{one['mare']:.2%}",
                f"{one['worst']:.2%}",
                f"{one['coverage']:.0%}",
                a,
            )
        )
    return [*table(rows), f"  error of the fit itself: {fit['residual_mare']:.2%}"]


def _sensitivity(record: dict) -> list[str]:
    names = [n for n in record["approach3"]["ci"] if n != "b"]
    rows = [("under another choice", "runs", *names)]
    rows += [
        (one["what"], str(one["runs"]), *(number(one.get(n)) for n in names))
        for one in record["sensitivity"]
    ]
    rows += [
        (f"N counted {count}", "", *(number(one.get(n)) for n in names))
        for count, one in record["by_count"].items()
    ]
    return table(rows)


def valued(found: dict, name: str, form: str = SIGNIFICANT) -> str:
    """Return a number with its interval, as `0.514 [0.48, 0.556]`."""
    ends = found["ci"].get(name) if found[name] is not None else None
    interval = "" if ends is None or ends[0] == ends[1] else bracket(ends, form)
    return f"{number(found[name], form)} {interval}".rstrip()


def bracket(ends: Sequence[float | None] | None, form: str = SIGNIFICANT) -> str:
    """Return an interval in brackets, nothing where there is none."""
    return f"[{', '.join(number(end, form) for end in ends)}]" if ends else ""


def number(value: float | None, form: str = SIGNIFICANT) -> str:
    """Return a number, or a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:{form}}"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows of cells as lines, the first column to the left, others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
