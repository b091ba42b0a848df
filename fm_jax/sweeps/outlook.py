"""Before a sweep is paid for: every run, the cost of all, what a fit would know."""

import math
import shlex
from collections.abc import Sequence
from pathlib import Path

from fm_jax import durations, listing
from fm_jax.sweeps import arrays, costs, plans, workdir
from fm_jax.sweeps.plans import Planned
from fm_jax.sweeps.sweep import Sweep

HEADER = (
    "run",
    "dial",
    "layers",
    "params",
    "tokens",
    "tok/param",
    "steps",
    "rows",
    "rate",
    "FLOPs",
    "of budget",
    "from",
    "time",
)


def seconds(one: Planned, rates: costs.Rates) -> float:
    """Return the estimated seconds of a run."""
    return rates.seconds(one.params["total"], one.cost_flops)


def expected(sweep: Sweep, runs: Sequence[Planned], fit: str = "") -> list[str]:
    """Return what a fit to these runs would know of the optimum at target_flops.

    Linear-Gaussian, under the law and noise of the fit in a folder, else under Epoch's
    constants (2404.10102) and config.noise: the answer holds as far as they do.
    """
    from fm_jax.scaling import information, laws

    count = sweep.size.count
    if fit:
        from fm_jax.scaling import files, predict

        record, draws, law = files.load(Path(fit))
        _, _, ensemble = predict.choose(record, draws, law, count)
        theta, noise = ensemble[0], information.run_noise(record)
        source = f"the fit {fit}"
    else:
        published = laws.PUBLISHED["epoch"]
        law, theta, noise = laws.LAWS[published.law], published.theta, sweep.noise
        source = f"Chinchilla's law by Epoch, sd of ln loss {noise:.2g}"
    ends = [one for one in runs if one.role != "trunk"]
    columns = {
        "params": [float(one.params[count]) for one in ends],
        "tokens": [float(one.tokens) for one in ends],
    }
    largest = 6 * max(map(math.prod, zip(*columns.values(), strict=True)))
    target = sweep.target_flops or 100 * largest
    begin = f"expect   at {target:.3g} FLOPs"
    if set(law.columns) > set(columns):
        return [f"{begin} nothing: the law {law.name} reads more than these runs vary"]
    sd = information.optimum_sd(law, theta, columns, noise, target)
    if not math.isfinite(sd["params"]):
        return [f"{begin} no answer: these runs do not determine the law ({source})"]
    params, tokens = (math.exp(1.96 * sd[name]) for name in ("params", "tokens"))
    return [
        f"{begin} N* within a factor {params:.3g} (95 %), D* {tokens:.3g}, loss +- "
        f"{1.96 * sd['loss']:.2g}, exponent a +- {1.96 * sd['a']:.2g}, if "
        f"{source} holds"
    ]


def dry_run(
    sweep: Sweep,
    folder: Path | None = None,
    *,
    parallel: int = 1,
    mfu: float = 0.4,
    fit: str = "",
) -> list[str]:
    """Return the lines of `fm sweep --dry_run`: every run, totals, what to expect.

    folder: the sweep's own, where there may be one already; fit: as in `expected`.
    Touches no device.
    """
    runs = plans.plan(sweep) if folder is None else workdir.planned(sweep, folder)
    rates = costs.rates(
        workdir.finished(folder, runs) if folder else (),
        dtype=sweep.base["model"]["dtype"],
        mfu=mfu,
        parallel=parallel,
    )
    table = [HEADER, *(_cells(one, seconds(one, rates), sweep) for one in runs)]
    total = sum(seconds(one, rates) for one in runs)
    dials = {one.dial for one in runs}
    return [
        f"{sweep.design.kind}: {len(runs)} runs of {len(dials)} sizes, N is "
        f"{sweep.size.count} parameters, FLOPs are {sweep.design.flops}",
        "",
        *listing.columns(table),
        "",
        f"compute  {sum(one.cost_flops for one in runs):.3g} FLOPs by every product; "
        f"{sum(one.flops for one in runs if one.role != 'trunk'):.3g} in the table",
        f"time     {durations.clock(total / parallel)} with {parallel} at once, "
        f"{rates.source}, {rates.overhead_seconds:.0f} s of each run beside its steps "
        "(an estimate)",
        f"memory   {max(one.memory_bytes for one in runs) / 1e6:,.0f} MB at most in "
        "one run (an estimate; fm plan compiles and knows)",
        f"disk     {sum(one.disk_bytes for one in runs) / 1e6:,.0f} MB of checkpoints "
        "stay",
        *expected(sweep, runs, fit),
        *(f"note     {remark}" for remark in plans.remarks(sweep, runs)),
    ]


def variants(runs: Sequence[Planned]) -> list[str]:
    """Return a line for each run of one config with other values, and their cost."""
    rows = [
        (one.name, *(f"{key}={value}" for key, value in one.overrides.items()))
        for one in runs
    ]
    widest = max(map(len, rows))
    padded = [row + ("",) * (widest - len(row)) for row in rows]
    known = [one for one in runs if one.tokens]
    return [
        *listing.columns(padded, left=range(widest)),
        "",
        f"{len(runs)} runs; {sum(one.cost_flops for one in known):.3g} FLOPs by every "
        "product" + ("" if known == list(runs) else f" in {len(known)} of them"),
    ]


def submission(runs: Sequence[Planned], file: str) -> list[str]:
    """Return how a sweep's file is run, by SLURM or here, and how one looks at it."""
    commands = arrays.commands(runs, [one.name for one in runs], file)
    return [
        f"{file}: {len(runs)} runs",
        *(f"slurm   {command}" for command in commands),
        f"here    fm sweep --workdir={shlex.quote(str(Path(file).parent))}",
        f"status  fm sweep status {shlex.quote(file)}",
    ]


def _cells(one: Planned, took: float, sweep: Sweep) -> tuple[str, ...]:
    count = one.params[sweep.size.count]
    return (
        one.name,
        str(one.dial),
        str(one.overrides["model.num_layers"]),
        f"{count:,}",
        f"{one.tokens:,}",
        f"{one.tokens / count:.1f}",
        f"{one.steps:,}",
        str(one.overrides["train.batch_size"]),
        f"{one.overrides['optimizer.learning_rate']:.3g}",
        f"{one.flops:.3g}",
        f"{one.flops / one.budget_flops:.1%}" if one.budget_flops else "",
        f"{one.parent[:3]}@{one.branch_step}" if one.parent else "",
        durations.clock(took),
    )
