"""From a table of runs to a fit: estimates, intervals, checks, and files to keep."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fm_jax import configfile
from fm_jax.errors import UserError, unknown
from fm_jax.scaling import (
    bias,
    checks,
    envelope,
    files,
    laws,
    optimum,
    problem,
    rates,
    resamples,
    slices,
    solver,
)
from fm_jax.tables import table

SAID = {"approach1": "approach 1", "approach2": "approach 2", "rates": "rates"}
BEYOND = (1.0, 10.0, 100.0)  # times the largest compute, where optima are shown


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How to fit. `fixed` holds parameters; `bootstrap` "auto" chooses by the runs."""

    law: str = "chinchilla"
    count: str = "total"
    flops: str = "auto"
    delta: float = 1e-3
    space: str = "log"
    weight: str = ""
    fixed: dict[str, float] = dataclasses.field(default_factory=dict)
    mapping: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    duplicates: str = "refuse"
    slices: str = "parabola"
    bootstrap: str = "auto"
    num_bootstraps: int = 4000
    seed: int = 0

    def check(self) -> None:
        """Raise UserError on a value that is wrong by itself."""
        if self.space not in solver.SPACES:
            raise unknown("--space", self.space, solver.SPACES)
        if self.slices not in slices.METHODS:
            raise unknown("--slices", self.slices, slices.METHODS)
        if self.bootstrap not in ("auto", *resamples.KINDS):
            raise unknown("--bootstrap", self.bootstrap, ("auto", *resamples.KINDS))
        if not self.delta >= 0:
            raise UserError(f"--delta must be >= 0, or inf; got {self.delta}.")
        if self.num_bootstraps < 100:
            raise UserError(
                "--num_bootstraps must be at least 100 for an interval; got "
                f"{self.num_bootstraps}."
            )
        if not 0 <= self.seed < 2**32:
            raise UserError(f"--seed must be from 0 to {2**32 - 1}; got {self.seed}.")


@dataclasses.dataclass(frozen=True)
class Fit:
    """A fit: `record` is what fit.json holds, `draws` what draws.npz holds."""

    points: table.Points
    law: laws.Law
    record: dict[str, Any]
    draws: dict[str, np.ndarray]


def run(path: Path, options: Options) -> Fit:
    """Fit all that a table allows: the law, and by slices and envelope where it can.

    Raises UserError for a table or options that cannot be fitted.
    """
    options.check()
    law = laws.find(options.law)
    if options.fixed:
        law = laws.fixed(law, **options.fixed)
    reading = {
        "flops": options.flops,
        "mapping": options.mapping,
        "exclude": options.exclude,
        "duplicates": options.duplicates,
    }
    points = table.read(path, count=options.count, **reading)
    asked = _problem(points, law, options)
    kind = options.bootstrap
    if kind == "auto":
        kind = problem.choose_resampling(asked)
    fitted, draws, third = _parametric(asked, kind, options)
    settings = _settings(points)
    third["replicate_sd"] = checks.replicate_sd(asked, list(settings.values()))
    tested = checks.held_out(asked, fitted.theta, draws, kind=kind, seed=options.seed)
    warnings = checks.warnings(asked, fitted, draws, tested)
    optima = _optima(asked, fitted.theta, draws, points)
    warnings += _about_draws(third, optima, asked, kind)
    sensitivity = checks.sensitivity(asked, fitted.theta)
    best = _best_of_places(asked)
    if settings and len(best) < len(asked):
        warnings.append(
            f"runs of one size and length differ in {' and '.join(settings)}: the law "
            "goes through all of them, not through the best of each"
        )
        if best.can_be_fitted():
            row = checks.row(best, best.fit().theta, "the best run of each place")
            sensitivity.append(row)
    by_slices, second = _by_slices(points, asked, fitted.theta, kind, options)
    first = None
    by_envelope = _optional(lambda: _by_envelope(path, points, options, reading))
    if not isinstance(by_envelope, dict):
        by_envelope, first = by_envelope
    record = {
        "format": files.FORMAT,
        "inputs": points.record | {"columns_read": sorted(asked.columns)},
        "options": dataclasses.asdict(options)
        | {
            "bootstrap": kind,
            "objective": problem.objective_name(
                options.delta, options.space, options.weight
            ),
        },
        "range": _range(points),
        "approach3": third,
        "approach2": by_slices,
        "approach1": by_envelope,
        "optima": optima,
        "held_out": tested,
        "sensitivity": sensitivity,
        "warnings": warnings,
    }
    kept = {"approach3": draws}
    kept |= {"approach2": second} if second is not None else {}
    kept |= {"approach1": first} if first is not None else {}
    record["sensitivity"] += _with_excluded(path, points, law, options, reading)
    record |= _by_count(path, points, law, kind, options, reading, kept)
    if settings:
        record["rates"] = _optional(lambda: _rates(points, settings, options))
    for name in ("approach1", "approach2", "rates"):
        found = record.get(name, {})
        if "skipped" not in found:
            warnings += [f"{SAID[name]}: {w}" for w in found.get("warnings", [])]
    record |= _floor(points, third)
    record |= _sweep(path)
    return Fit(points, law, files.plain(record), kept)


def _problem(points, law, options) -> problem.Problem:
    return problem.of(
        points,
        law,
        delta=options.delta,
        space=options.space,
        weight=options.weight,
    )


def _parametric(asked, kind, options) -> tuple[Any, np.ndarray, dict]:
    """Return the law's fit, its draws [R, P], and what fit.json says of both."""
    fitted = asked.fit()
    draws, stray = asked.draws(
        fitted.theta, kind=kind, num=options.num_bootstraps, seed=options.seed
    )
    names = asked.law.names
    record = {"law": asked.law.name, "fixed": options.fixed, **options.fixed}
    record |= dict(zip(names, map(float, fitted.theta), strict=True))
    ci = {name: checks.interval(draws[:, i]) for i, name in enumerate(names)}
    se = {name: float(np.std(draws[:, i], ddof=1)) for i, name in enumerate(names)}
    exponents = asked.law.exponents(fitted.theta)
    if exponents is not None:
        drawn = asked.law.exponents(draws)
        for name, value, ensemble in zip(("a", "b"), exponents, drawn, strict=True):
            record[name] = float(value)
            ci[name] = checks.interval(ensemble)
            se[name] = float(np.nanstd(ensemble, ddof=1))
    pair, value = checks.correlation(asked, draws)
    record |= {
        "objective": fitted.objective,
        "ci": ci,
        "se": se,
        "certificate": {
            "gradient_norm": fitted.gradient_norm,
            "starts": fitted.num_starts,
            "agreeing": fitted.num_agreeing,
            "converged": bool(fitted.converged),
        },
        "draws": len(draws),
        "draws_not_converged": stray,
        "residual_sd": asked.noise(fitted.theta),
        "residual_mare": float(
            np.mean(np.abs(np.expm1(-asked.residuals(fitted.theta))))
        ),
        "correlation": {"pair": list(pair), "value": value},
    }
    return fitted, draws, record


def _by_slices(points, asked, theta, kind, options):
    """Return approach 2's record, and its draws or None."""
    planned = points.budget if np.any(np.isfinite(points.budget)) else None
    columns = {"params": points.params, "tokens": points.tokens, "flops": points.flops}
    found = slices.fit(
        columns,
        points.loss,
        budget=planned,
        cluster=points.cluster if kind.endswith("cluster") else None,
        method=options.slices,
        num_bootstraps=options.num_bootstraps,
        seed=options.seed,
    )
    record = found.record()
    if found.skipped:
        return record, None
    extra = {n: c for n, c in asked.columns.items() if n not in columns}
    mended = bias.corrected(found, bias.of(found, asked.law, theta, columns | extra))
    if not mended.skipped:
        other = mended.record()
        record["corrected"] = {name: other[name] for name in ("a", "b", "ci")}
    return record, found.draws


def _by_envelope(path, points, options, reading):
    """Return approach 1's record and its draws, or why there are none."""
    if len(points) == len(np.unique(points.run)):
        points = table.read(path, count=options.count, curves=True, **reading)
    found = envelope.fit(
        points, num_bootstraps=options.num_bootstraps, seed=options.seed
    )
    return found.record(), found.draws


def _optima(asked, theta, draws, points) -> list[dict]:
    """Return the optimum with its intervals at and beyond the largest compute."""
    largest = float(np.max(6 * points.params * points.tokens))
    return [
        optimum.row(asked.law, theta, draws, largest * beyond, largest=largest)
        for beyond in BEYOND
    ]


def _by_count(path, points, law, kind, options, reading, kept) -> dict:
    """Return the fits under the other counts of parameters that the table has."""
    found = {}
    for count in points.record["counts"]:
        if points.record["count"] not in points.record["counts"]:
            break  # a table with a column of its own for params
        if count == options.count:
            continue
        others = table.read(path, count=count, **reading)
        try:
            asked = _problem(others, law, options)
        except UserError:  # one size by this count: nothing to tell by it
            continue
        fitted, draws, record = _parametric(asked, kind, options)
        record["replicate_sd"] = None
        optima = _optima(asked, fitted.theta, draws, others)
        said = checks.warnings(asked, fitted, draws, [])
        found[count] = record | {
            "range": _range(others),
            "optima": optima,
            "warnings": said + _about_draws(record, optima, asked, kind),
        }
        kept[f"approach3_{count}"] = draws
    return {"by_count": found}


def _with_excluded(path, points, law, options, reading) -> list[dict]:
    """Return the fit's row with the rows that were excluded, where they can be read."""
    if not sum(points.record["excluded"].values()):
        return []
    try:
        whole = table.read(path, count=options.count, **(reading | {"exclude": ()}))
        asked = _problem(whole, law, options)
    except UserError:  # no numbers, or twice the same: why they are excluded
        return []
    return [checks.row(asked, asked.fit().theta, "with the excluded rows")]


def _optional(find: Callable) -> Any:
    """Return what `find` returns, or why a part that may be missing cannot be had."""
    try:
        return find()
    except UserError as error:
        return {"skipped": str(error)}


def _settings(points) -> dict[str, np.ndarray]:
    """Return the columns of learning rate and batch in which runs of a place differ."""
    found = {}
    places = np.stack([points.params, points.tokens], 1)
    _, group = np.unique(places, axis=0, return_inverse=True)
    for name in rates.THINGS:
        column = points.extra.get(name, np.array([math.nan]))
        if np.all(np.isfinite(column)):
            pairs = np.unique(np.stack([group, column], 1), axis=0)
            if len(pairs) > group.max() + 1:
                found[name] = column
    return found


def _rates(points, settings, options) -> dict:
    """Return the laws of learning rate and batch size, where runs differ in them."""
    columns = {"params": points.params, "tokens": points.tokens}
    return rates.fit(
        columns | settings,
        points.loss,
        num_bootstraps=options.num_bootstraps,
        seed=options.seed,
    ).record()


def _best_of_places(asked: problem.Problem) -> problem.Problem:
    """Return the problem of the run of least loss at each place."""
    places = np.stack(list(asked.columns.values()), 1)
    order = np.argsort(asked.loss, kind="stable")
    _, first = np.unique(places[order], axis=0, return_index=True)
    return asked.take(np.sort(order[first]))


def _about_draws(third, optima, asked, kind) -> list[str]:
    """Return what the draws themselves say against the intervals made of them."""
    said, total = [], third["draws"]
    if third["draws_not_converged"]:
        said.append(
            f"{third['draws_not_converged']} of {total} draws did not converge; they "
            "are in the intervals as they ended"
        )
    without = max((one.get("draws_without", 0) for one in optima), default=0)
    if without:
        said.append(
            f"{without} of {total} draws have no best size: intervals of N* and D* are "
            "of the others"
        )
    if kind.endswith("cluster") and asked.num_clusters == len(asked):
        said.append(f"no two runs share a cluster: bootstrap {kind} is one of runs")
    return said


def _floor(points, third) -> dict:
    """Return the loss that no model can go below, where the source knows it."""
    known = points.extra.get("bayes_loss", np.array([math.nan]))
    if not np.all(np.isfinite(known)) or "E" not in third["ci"]:
        return {}
    low, high = third["ci"]["E"]
    floor = float(np.mean(known))
    return {
        "bayes": {
            "loss": floor,
            "spread": float(np.ptp(known)),
            "E": third["E"],
            "difference": third["E"] - floor,
            "is_inside_ci": bool(low <= floor <= high),
        }
    }


def _sweep(path: Path) -> dict:
    """Return the sweep that the runs came from, where there is one."""
    file = Path(path).expanduser() / "sweep.json"
    if not file.is_file():
        return {}
    return {"sweep": configfile.read_json(file).get("sweep", {})}


def _range(points) -> dict:
    ends = {
        name: [float(column.min()), float(column.max())]
        for name in ("params", "tokens", "flops", "loss")
        for column in [getattr(points, name)]
    }
    low, high = ends["flops"]
    by_rule = 6 * points.params * points.tokens
    return ends | {
        "decades": math.log10(high / low),
        "flops_6nd": [float(by_rule.min()), float(by_rule.max())],
        "flops_ratio": float(np.median(points.flops / by_rule)),
    }
