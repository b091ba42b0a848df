"""JSON files of others, read with care."""

import json
from pathlib import Path
from typing import Any

from fm_jax.errors import UserError, reason


def read(file: Path, *, must: bool = True) -> dict[str, Any]:
    """Return a JSON object; {} where there is no file and none `must` be.

    Raises UserError on anything else.
    """
    if not must and not file.exists():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{file} must be a JSON file to read; got {reason(error)}."
        ) from error
    if not isinstance(found, dict):
        raise UserError(f"{file} must hold a JSON object; got {str(found)[:40]!r}.")
    return found
