"""What fm sweep and predict do: flags in, runs, text and files out."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from fm_jax.errors import UserError
from fm_jax.scaling.command import numbers


def sweep(raw: dict, flags: Any) -> int:
    """Print, write or run what is not done of a sweep; return the exit status.

    Flags: workdir, overrides, grid, out, dry_run, parallel, mfu, fit.
    """
    from fm_jax.sweeps import outlook, runner, workdir
    from fm_jax.sweeps.variants import Variants

    asked = _asked(raw, flags)
    folder = _folder(flags)
    if not 0 < flags.mfu <= 1:
        raise UserError(f"--mfu must be above 0 and at most 1; got {flags.mfu}.")
    if flags.parallel < 1:
        raise UserError(f"--parallel must be >= 1; got {flags.parallel}.")
    if asked is None and (flags.out or flags.dry_run):
        raise UserError("--config must be given with --out and --dry_run; got none.")
    if isinstance(asked, Variants) and flags.dry_run:
        _print(outlook.variants(workdir.planned(asked, folder, must_be_free=False)))
    elif flags.dry_run:
        text = outlook.dry_run(
            asked, folder, parallel=flags.parallel, mfu=flags.mfu, fit=flags.fit
        )
        _print(text)
    elif flags.out:
        runs = workdir.planned(asked, folder, must_be_free=False)
        workdir.make(folder)
        workdir.write_plan(asked, folder, runs)
        _print(outlook.submission(runs, flags.out))
    else:
        return runner.run(
            asked, folder, parallel=flags.parallel, mfu=flags.mfu, say=_say
        )
    return 0


def _asked(raw: dict, flags: Any):
    """Return the Sweep or Variants of the flags; None where the folder's file is it."""
    from fm_jax.sweeps import sweep as sweeps
    from fm_jax.sweeps import variants

    if not (flags.overrides or flags.grid):
        if flags.config_file and "model" in raw and "design" not in raw:
            raise UserError(
                "--config must be a sweep's, as configs/sweeps/tiny_isoflop.py, or "
                f"have --grid or --overrides beside it; got {flags.config_file} alone."
            )
        return sweeps.check(raw) if flags.config_file else None
    if not flags.config_file or "design" in raw:
        raise UserError(
            "--config must be a run's, as configs/quickstart.py, with --overrides and "
            f"--grid; got {flags.config_file or 'none'}."
        )
    if flags.overrides and flags.grid:
        raise UserError("--overrides and --grid must not be given both; choose one.")
    if flags.grid:
        return variants.of_grid(raw, flags.grid)
    return variants.of_file(raw, Path(flags.overrides))


def _folder(flags: Any) -> Path:
    """Return the sweep's folder, absolute, for its runs are known by their paths."""
    from fm_jax.tables.rows import SWEEP_FILE

    if flags.out and flags.workdir:
        raise UserError(
            "--out and --workdir must not be given both: the runs of a file lie "
            "beside it. Choose one."
        )
    if flags.out and Path(flags.out).name != SWEEP_FILE:
        raise UserError(
            f"--out must be a {SWEEP_FILE}, in a folder of its sweep; got "
            f"{flags.out}. Write --out={Path(flags.out).with_suffix('')}/{SWEEP_FILE}."
        )
    if not (flags.out or flags.workdir or flags.config_file):
        raise UserError(
            "--config or --workdir must be given: what to plan, or a folder with a "
            f"{SWEEP_FILE} to go on with. Example: "
            "--config=configs/sweeps/tiny_isoflop.py"
        )
    stem = Path(flags.config_file.partition(":")[0]).stem
    given = str(Path(flags.out).parent) if flags.out else flags.workdir
    folder = Path(given or f"sweeps/{stem}").expanduser().resolve()
    if ":" in str(folder):
        raise UserError(
            f"--{'out' if flags.out else 'workdir'} must have no colon in its path; "
            f"got {folder}. In a --config what follows one is the variant."
        )
    return folder


def predict(flags: Any) -> None:
    """Print what a fit says of a budget, and write the config that trains it."""
    from fm_jax.scaling import files
    from fm_jax.scaling import predict as predictions
    from fm_jax.sweeps import labpage
    from fm_jax.sweeps import recipe as recipes

    folder = files.folder_of(Path(flags.fit))
    record, draws, law = files.load(folder, law=flags.law)
    found = predictions.predict(
        record,
        draws,
        law,
        flops=flags.flops or None,
        params=flags.params or None,
        tokens=flags.tokens or None,
        tokens_per_param=flags.tokens_per_param or None,
        count=flags.count,
        columns=numbers(flags.column, "--column") or None,
    )
    out = Path(flags.out) if flags.out else folder / labpage.file_name(found)
    made = recipes.recipe(found, fit=record, draws=draws, law=law)
    written = labpage.write(made, out, found=found, fit=record, replace=not flags.out)
    if flags.json:
        _print([json.dumps(found | {"recipe": dataclasses.asdict(made)}, indent=1)])
    else:
        _print([*predictions.lines(found), *written])


def _print(lines: list[str]) -> None:
    print("\n".join(lines))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
