"""A run's trackers: TensorBoard's files, and those that a user asks for by name."""

import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fm_jax import configfile, redact
from fm_jax.errors import UserError, unknown
from fm_jax.trackers.board import FOLDER, Board
from fm_jax.trackers.child import Child
from fm_jax.trackers.feed import Tracker

# What each imports, and its own file imports that alone.
LIBRARIES = {"mlflow": ("mlflow", "sqlalchemy", "alembic"), "wandb": ("wandb",)}


def check(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names, each once; nothing is imported.

    Raises UserError when one is not known, or its library is not installed.
    """
    for name in names:
        if name not in LIBRARIES:
            raise unknown("--track", name, LIBRARIES)
        absent = [module for module in LIBRARIES[name] if not _is_installed(module)]
        if absent:
            raise UserError(
                f"--track={name} must have its libraries; got no {', '.join(absent)}. "
                f"pip install 'fm_jax[{name}]'"
            )
    return tuple(dict.fromkeys(names))


def openers(
    path: Path, record: dict[str, Any], names: Sequence[str]
) -> dict[str, Callable[[], Tracker]]:
    """Return functions that open the trackers of the run in `path`, by name.

    record: its config.json.
    """

    def child(name: str) -> Callable[[], Tracker]:
        log = path / "trackers" / f"{name}.log"
        return lambda: Child(told(path, record) | {"tracker": name}, log)

    return {
        "TensorBoard": lambda: Board(path / FOLDER),
        **{name: child(name) for name in names},
    }


def told(path: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Return what a tracker is told of the run in `path`, without secrets.

    record: the run's config.json. The id is one run folder's: it stays when the run
    goes on, and a run of the same name elsewhere has another.
    """
    first = json.dumps(record["history"][0], sort_keys=True, default=str)
    digest = hashlib.blake2b(first.encode(), digest_size=4).hexdigest()
    resolved = record["resolved"]
    kept = {
        key: resolved[key] for key in ("steps", "params", "tokens_per_step", "init")
    }
    config = configfile.flat(record["config"] | {"resolved": kept})
    return {
        "path": str(path.absolute()),
        "name": path.absolute().name,
        "id": re.sub(r"[^\w.-]", "-", f"{resolved['run_id']}-{digest}")[-120:],
        "config": redact.values(config, os.environ),
    }


def _is_installed(module: str) -> bool:
    # A folder of that name, which W&B makes where it runs, is no library.
    found = importlib.util.find_spec(module)
    return found is not None and found.origin is not None
