"""Commands about many runs and the laws fitted to them."""

import os
import sys

from fm_jax.commands import runs
from fm_jax.commands.command import Command
from fm_jax.errors import DivergedError, UserError


def sweep(flags, raw, argv) -> int:
    """Plan the runs of a sweep, or run those that are not done."""
    from fm_jax.sweeps import command

    return command.sweep(raw, flags)


def sweep_run(flags, raw, argv) -> int:
    """Train one run of a sweep's file, which an array's task says."""
    from fm_jax.sweeps import lines, task, workdir

    folder = lines.find(_file(flags, "run"))
    one = task.find(folder, task.index_of(flags.index, os.environ))
    if said := task.diverged(folder, one):
        print(f"fm: {one.name} is left alone: {said}", file=sys.stderr)
        return DivergedError.exit_status
    task.begins(folder, one)
    raw = workdir.config_of(folder, one)
    try:
        runs.train_in(workdir.run_path(folder, one.name), raw, flags, argv)
    except UserError as error:
        task.refused(folder, one, str(error))
        raise
    return 0


def sweep_status(flags, raw, argv) -> None:
    """Print where every run of a sweep is, and the commands that repeat what failed."""
    from fm_jax.sweeps import lines, standing
    from fm_jax.tables import rows

    file = _file(flags, "status")
    folder = lines.find(file)
    print("\n".join(standing.table(folder, file)))
    if flags.table:
        rows.write(folder, rows.collect(folder).rows)
        print(f"\n{folder / 'table.csv'} and table.parquet are written")


def _file(flags, name: str) -> str:
    if len(flags.positional) != 1:
        raise UserError(
            f"fm sweep {name} must be given one sweep.jsonl; got "
            f"{len(flags.positional)}. Example: {COMMANDS[f'sweep {name}'].example}"
        )
    return flags.positional[0]


def fit(flags, raw, argv) -> None:
    """Fit scaling laws to a table of runs."""
    from fm_jax.scaling import command

    command.fit(flags)


def predict(flags, raw, argv) -> None:
    """Print what a fit says of a budget, and write the config that trains it."""
    from fm_jax.sweeps import command

    command.predict(flags)


def suggest(flags, raw, argv) -> None:
    """Print the next runs that tell most about a target."""
    from fm_jax.scaling import command

    command.suggest(flags)


COMMANDS = {
    "sweep": Command(
        sweep,
        "plan the runs that a scaling law is fitted to, and run what is not done",
        "fm sweep --config=configs/sweeps/tiny_isoflop.py --workdir=sweeps/tiny",
        {
            "workdir": (
                "",
                "the sweep's folder; default: sweeps/<config>; without --config one "
                "with a sweep.jsonl to go on with",
            ),
            "overrides": (
                "",
                "a file of JSON lines: runs of one config, each with other values",
            ),
            "grid": (
                (),
                "section.key=VALUE,VALUE: runs of every combination; may be repeated",
            ),
            "out": ("", "only write every run, a line each, to this sweep.jsonl"),
            "dry_run": (False, "only print every run and the cost of all"),
            "parallel": (1, "runs at once, each with its share of cores, or a GPU"),
            "mfu": (0.4, "of the machine's peak, for the times of --dry_run"),
            "fit": ("", "a fit whose law and noise --dry_run plans with"),
        },
        takes_config=True,
        config=None,
    ),
    "sweep run": Command(
        sweep_run,
        "train one run of a sweep's file, as a task of a cluster's array",
        "fm sweep run sweeps/lr/sweep.jsonl --index=3",
        {
            "index": (
                -1,
                "which line, from 0; default: FM_SWEEP_INDEX, or the array's own",
            ),
            **runs.LAUNCH,
        },
        positional="FILE",
    ),
    "sweep status": Command(
        sweep_status,
        "print where every run of a sweep is, and how to repeat what failed",
        "fm sweep status sweeps/lr/sweep.jsonl",
        {"table": (False, "also write table.csv and table.parquet of all runs so far")},
        positional="FILE",
    ),
    "fit": Command(
        fit,
        "fit scaling laws to a sweep, or to any table of params, tokens and loss",
        "fm fit --runs=sweeps/tiny --out=fits/tiny",
        {
            "runs": (None, "a folder of runs, or a .csv, .parquet or .jsonl"),
            "out": ("", "a folder for the report; default: RUNS/fit, <table>-fit"),
            "law": (
                "chinchilla",
                "chinchilla, tied, kaplan, data_constrained, or a file.py",
            ),
            "fix": ((), "hold a parameter of the law, as E=1.69; may be repeated"),
            "delta": (1e-3, "of the Huber loss; 0: absolute deviation, inf: squares"),
            "space": ("log", "residuals of ln loss (log) or of loss (linear)"),
            "weight": ("", "a column that the runs' misfits are multiplied by"),
            "count": ("total", "of params: total, non_embedding or matmul"),
            "flops": ("auto", "6nd, exact, or auto: the table's own where it has them"),
            "map": ((), "a column under another name, as params=N; may be repeated"),
            "exclude": ((), "rows to leave out, as loss>6; may be repeated"),
            "duplicates": ("refuse", "rows that are the same: refuse, keep or drop"),
            "slices": ("parabola", "approach 2 by parabola, cubic or akima"),
            "bootstrap": (
                "auto",
                "pairs, cluster, bayesian, bayesian_cluster; auto: by the runs",
            ),
            "num_bootstraps": (4000, "resamples for intervals"),
            "seed": (0, "of the resamples"),
            "figures": (True, "also draw figures and report.html; --nofigures"),
            "json": (False, "print fit.json in place of the text"),
        },
    ),
    "predict": Command(
        predict,
        "print the best params, tokens and loss of a budget, and write its config",
        "fm predict --fit=fits/tiny --flops=1e21",
        {
            "fit": (None, "a folder that fm fit made"),
            "law": ("", "the file.py of its law, where it has one: it is run"),
            "flops": (0.0, "the budget, 6 * params * tokens"),
            "params": (0.0, "in place of a budget, with --tokens: the loss there"),
            "tokens": (0.0, "in place of a budget, with --params"),
            "tokens_per_param": (0.0, "in place of --tokens or --params, beside one"),
            "column": ((), "what else the law reads, as unique_tokens=1e9"),
            "count": ("", "which count N is: total, non_embedding or matmul"),
            "out": ("", "the config to write; default: FIT/flops_<flops>.py"),
            "json": (False, "print JSON"),
        },
    ),
    "suggest": Command(
        suggest,
        "print the next runs that tell most about a target, for a budget",
        "fm suggest --fit=fits/tiny --target_flops=1e21 --budget_flops=5e18",
        {
            "fit": (None, "a folder that fm fit made"),
            "law": ("", "the file.py of its law, where it has one: it is run"),
            "target_flops": (0.0, "the compute whose best params are asked for"),
            "budget_flops": (0.0, "for all suggested runs together"),
            "max_runs": (12, "how many at most"),
            "top_share": (0.25, "of the budget, for the largest compute it can pay"),
            "params_factor": (1.0, "how far sizes may leave the range of the fit's"),
            "noise": (0.0, "sd of a run's ln loss; 0: that of the fit's residuals"),
            "column": ((), "what else the law reads, as unique_tokens=1e9"),
            "out": ("", "also write them, a JSON object a line"),
            "json": (False, "print JSON"),
        },
    ),
}
