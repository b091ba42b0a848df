"""What fm sweep and predict do: flags in, runs, text and files out."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from fm_jax.errors import UserError
from fm_jax.scaling.command import numbers


def sweep(raw: dict, flags: Any) -> int:
    """Print the plan of a sweep or run what is not done; return the exit status.

    Flags: workdir, dry_run, status, parallel, mfu, fit.
    """
    from fm_jax.sweeps import outlook, runner
    from fm_jax.sweeps import sweep as sweeps

    planned = sweeps.check(raw)
    stem = Path(flags.config_file.partition(":")[0]).stem
    # Absolute, for its runs are known again by their paths.
    folder = Path(flags.workdir or f"sweeps/{stem}").expanduser().resolve()
    if ":" in str(folder):
        raise UserError(
            f"--workdir must have no colon in its path; got {folder}. In a --config "
            "what follows one is the variant."
        )
    if not 0 < flags.mfu <= 1:
        raise UserError(f"--mfu must be above 0 and at most 1; got {flags.mfu}.")
    if flags.parallel < 1:
        raise UserError(f"--parallel must be >= 1; got {flags.parallel}.")
    if flags.dry_run and flags.status:
        raise UserError("--dry_run and --status must not be given both; choose one.")
    if flags.dry_run:
        text = outlook.dry_run(
            planned, folder, parallel=flags.parallel, mfu=flags.mfu, fit=flags.fit
        )
        _print(text)
        return 0
    if flags.status:
        _print(runner.status(planned, folder))
        return 0
    return runner.run(planned, folder, parallel=flags.parallel, mfu=flags.mfu, say=_say)


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
