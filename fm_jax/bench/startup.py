"""From the command to the first step: what `fm train` spends its first seconds on."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from fm_jax import config as configs
from fm_jax.errors import UserError
from fm_jax.prepare import opened
from fm_jax.runs import Run

SAID = "first step after"  # by which a run tells that its first step was read
# What a run's phases come to: all of them, so that the parts sum up to the whole.
PARTS = {
    "import": ("import",),
    "data": ("prepare_data", "wait_for_data"),
    "trace": ("trace",),
    "compile": ("compile",),
    "first_step": ("train",),
}
REST = "other"  # devices, drawing or reading the first weights, and what has no phase


def startup(config: configs.Config, *, rounds: int = 1) -> dict[str, float]:
    """Return medians of seconds from `fm train` to its first step, cache cold and warm.

    In each round two processes train until they have read the numbers of one step: the
    first without any compiled program, the second with the first one's. Data is
    prepared before. Raises UserError with what a process said that failed.
    """
    opened.open_data(config, lambda line: None)
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            for kind in ("cold", "warm"):
                phases = _phases(config, Path(folder), kind)
                for name, seconds in _parts(phases).items():
                    found.setdefault(f"{kind}_{name}", []).append(seconds)
    return {name: statistics.median(values) for name, values in found.items()}


def _parts(phases: dict[str, float]) -> dict[str, float]:
    """Return `NAME_seconds` of the parts of a run's start, and of all of it."""
    parts = {
        f"{part}_seconds": sum(phases.get(name, 0.0) for name in names)
        for part, names in PARTS.items()
    }
    total = phases["total"]
    rest = {f"{REST}_seconds": total - sum(parts.values())}
    return {"first_step_after_seconds": total} | parts | rest


def _phases(config: configs.Config, folder: Path, name: str) -> dict[str, float]:
    """Return seconds by phase of a new run, which is stopped after its first step.

    folder: holds the run `name`, and the compile cache of all of them.
    """
    file, workdir = folder / f"{name}.json", folder / name
    file.write_text(json.dumps({"config": config.raw}))
    env = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    command = [sys.executable, "-m", "fm_jax.cli", "train"]
    command += [f"--config={file}", f"--workdir={workdir}"]
    said = "nothing"
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as run:
        for line in run.stderr:
            said = line.strip() or said
            if said.startswith(SAID):
                run.kill()
                break
    if not said.startswith(SAID):
        raise UserError(f"fm train must reach its first step to be timed; got: {said}")
    row = next(row for row in Run(workdir).rows() if "startup/total_seconds" in row)
    return {
        name.removeprefix("startup/").removesuffix("_seconds"): seconds
        for name, seconds in row.items()
        if name.startswith("startup/")
    }
