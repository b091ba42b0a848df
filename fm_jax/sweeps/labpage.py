"""The config file that trains a predicted run: a lab page that says what to expect."""

import hashlib
import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fm_jax.errors import UserError
from fm_jax.sweeps.recipe import Recipe

UNITS = {
    "flops": "FLOPs",
    "params": "parameters",
    "tokens": "tokens",
    "tokens_per_param": "tokens a parameter",
}
_WIDTH = 88
_INDENT = 10
_MARK = "# fm predict "  # and a digest of what stands above: an edited file is kept


def write(
    made: Recipe, path: Path, *, found: Mapping, fit: Mapping, replace: bool = False
) -> list[str]:
    """Write a recipe as a config file and return what it is, as lines of text.

    A file that is this recipe already stays. With `replace` another one gives way, as
    of an older fit, unless it was edited. Raises UserError when `path` holds anything
    else or is no .py file.
    """
    path = Path(path).expanduser()
    text = source(made, path, found=found, fit=fit)
    if path.suffix != ".py":
        raise UserError(f"the config must be written to a .py file; got {path}.")
    try:
        before = path.read_bytes().decode(errors="replace") if path.is_file() else None
        if before != text:
            if path.exists() and not (replace and _is_ours(before)):
                raise UserError(
                    f"the config must be written to a new file; got {path}, which "
                    "holds something else. Remove it or give another --out."
                )
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"the config must be written where one can; got {path} ({error.strerror})."
        ) from error
    return lines(made, path)


def lines(made: Recipe, path: Path) -> list[str]:
    """Return what a recipe achieves, as lines of text."""
    return [
        f"config {path}",
        f"  achieved  {_size(made)}",
        f"  expect    {_loss(made)}",
        f"  train     fm train --config={path}",
        *(f"  warning: {text}" for text in made.warnings),
    ]


def file_name(found: Mapping) -> str:
    """Return a name for the config of a prediction, after what was asked for."""
    parts = [f"{name}_{value:.3g}" for name, value in found["asked"].items()]
    return "_".join(parts).replace("+", "").replace(".", "p").replace("-", "m") + ".py"


def source(made: Recipe, path: Path, *, found: Mapping, fit: Mapping) -> str:
    """Return the text of the config file."""
    inputs = fit["inputs"]
    asked = " and ".join(
        f"{value:.4g} {UNITS[name]}" for name, value in found["asked"].items()
    )
    best = "the compute-optimal run" if len(found["asked"]) == 1 else "the run"
    low, high = fit["range"]["flops_6nd"]
    page = [
        ("Purpose", f"train {best} of {asked}, as a fit of other runs sees it"),
        (
            "Source",
            f"fit of {inputs['path']} (sha256 {str(inputs['sha256'])[:16]}), law "
            f"{found['law']}, {inputs['rows']} runs from {low:.3g} to {high:.3g} FLOPs",
        ),
        ("Command", f"fm train --config={path}"),
        ("Hardware", f"any that holds it; fm plan --config={path} says which does"),
        ("Size", _size(made)),
        ("Expect", _loss(made)),
    ]
    warnings = [w for w in found["warnings"] if not w.startswith("approach 2")]
    for number, text in enumerate([*warnings, *made.warnings]):
        page.append(("" if number else "Beware", text))
    title = f"A decoder of {_short(made.params_total)} parameters on " + (
        f"{_short(made.tokens)} tokens, its size by a scaling law."
    )
    body = [f"    config{_place(k)} = {_code(v)}" for k, v in made.overrides.items()]
    text = [
        f'"""{title}',
        "",
        *(_field(name, value) for name, value in page),
        '"""',
        "",
        "from ml_collections import ConfigDict",
        "",
        "from configs import base",
        "",
        "",
        "def get_config() -> ConfigDict:",
        '    """Return configs/base.py with what the prediction changes."""',
        "    config = base.get_config()",
        *body,
        "    return config",
    ]
    body = "\n".join(text) + "\n"
    return f"{body}\n\n{_MARK}{_digest(body)}\n"


def _digest(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()[:16]


def _is_ours(text: str | None) -> bool:
    """Return whether a file is one that `source` made and nobody changed."""
    body, mark, digest = (text or "").rpartition(f"\n\n{_MARK}")
    return bool(mark) and digest == f"{_digest(body)}\n"


def _size(made: Recipe) -> str:
    counted = made.count.replace("_", "-")
    return (
        f"{made.params:,} {counted} parameters, {made.tokens:,} tokens "
        f"({made.tokens / made.params:.3g} a parameter) in {made.steps:,} steps, "
        f"{made.flops:.4g} FLOPs as 6ND, {made.flops_exact:.4g} by every product"
    )


def _loss(made: Recipe) -> str:
    low, high = made.loss["of_a_run"]
    text = f"held-out loss {made.loss['value']:.4f} nats per token"
    if made.loss["interval"]:
        text += ", {:.4f} to {:.4f} in 95 % of the draws".format(*made.loss["interval"])
    return text + f"; of one run, its own noise included, {low:.4f} to {high:.4f}"


def _field(name: str, value: str) -> str:
    # What stands in a docstring may not end it.
    value = value.replace("\\", "/").replace('"""', "'''")
    return textwrap.fill(
        name.ljust(_INDENT) + value,
        width=_WIDTH,
        subsequent_indent=" " * _INDENT,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _place(key: str) -> str:
    """Return the Python that names a key; `init.from` is no attribute."""
    section, name = key.split(".")
    return f'.{section}["from"]' if name == "from" else f".{section}.{name}"


def _code(value: Any) -> str:
    """Return a value as Python source, whole numbers with their thousands apart."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10_000:
        return f"{value:_}"
    return (
        json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
    )


def _short(number: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"
