"""One config with other values, a run for each: what is varied is for the user to say.

A design (designs.py) plans sizes and durations for a law; here every line of a file, or
every combination of lists, is a run of the same config but for the keys that it names.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fm_jax import config as configs
from fm_jax import configfile, demands, jsonfiles
from fm_jax.errors import UserError, reason, unknown
from fm_jax.hf import adopt
from fm_jax.models import counts
from fm_jax.sweeps import costs
from fm_jax.sweeps import sweep as sweeps
from fm_jax.sweeps.plans import Planned


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variants:
    """A config as nested dicts, and what each run has other than it.

    `places` say where each was asked for, for messages.
    """

    base: dict
    overrides: tuple[dict[str, Any], ...]
    places: tuple[str, ...]

    @property
    def raw(self) -> dict:
        """What sweep.json keeps."""
        return {"base": self.base}


def of_file(base: dict, file: Path) -> Variants:
    """Return a run for each line of a file: a JSON object of `section.key` and values.

    Raises UserError, with the line's number, on one that is none.
    """
    try:
        text = jsonfiles.text(file)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--overrides must be a file of JSON lines; got {file}: {reason(error)}."
        ) from error
    found, places = [], []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        where = f"line {number} of {file}"
        try:
            one = jsonfiles.parse(line, object_pairs_hook=_once)
        except ValueError as error:
            raise UserError(f"{where} must be JSON; got {reason(error)}.") from error
        jsonfiles.check(one, dict, where)
        found.append(one)
        places.append(where)
    if not found:
        raise UserError(
            f"{file} must have a run a line; got none. A line is an object such as "
            '{"optimizer.learning_rate": 0.001, "train.seed": 1}.'
        )
    return Variants(base=base, overrides=tuple(found), places=tuple(places))


def of_grid(base: dict, asked: Sequence[str]) -> Variants:
    """Return a run for each combination of `section.key=VALUE,VALUE,...`.

    The last varies fastest. Raises UserError on what is no such list.
    """
    axes: dict[str, list] = {}
    for text in asked:
        key, _, listed = text.partition("=")
        if not listed:
            raise UserError(
                f"--grid must be section.key=VALUE,VALUE,...; got {text!r}. For "
                "values with commas in them use --overrides."
            )
        if key.strip() in axes:
            raise UserError(
                f"--grid must have each key once; got {key.strip()} twice. Write all "
                "its values in one list."
            )
        axes[key.strip()] = [_value(one) for one in listed.split(",")]
    combined = [
        dict(zip(axes, values, strict=True))
        for values in itertools.product(*axes.values())
    ]
    places = tuple(f"--grid at {json.dumps(one)}" for one in combined)
    return Variants(base=base, overrides=tuple(combined), places=places)


def plan(asked: Variants, *, earlier: Sequence[dict] = ()) -> list[Planned]:
    """Return the runs, in the order in which they were asked for.

    earlier: records of a plan that this one goes on from: the same runs keep their
    names, new ones are numbered after them. Raises UserError, with the place, on a key
    or value that no config has, and on the same run twice.
    """
    names = {record["hash"]: record["name"] for record in earlier}
    found: dict[str, Planned] = {}
    places: dict[str, str] = {}
    next_index, plain = len(names), configfile.flat(asked.base)
    for overrides, where in zip(asked.overrides, asked.places, strict=True):
        try:
            raw, config = _checked(asked.base, overrides)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        # What does not change a run's numbers, as a mesh, may be what is varied.
        values = {key: demands.value(config, key) for key in overrides}
        varied = {key: v for key, v in values.items() if v != plain[key]}
        known_by = [configfile.fingerprint(raw, with_duration=True), varied]
        text = json.dumps(known_by, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        if digest in found:
            raise UserError(
                f"{where} must ask for a run of its own; got that of {places[digest]}."
            )
        places[digest] = where
        if digest not in names:
            names[digest] = f"{next_index:03d}-{digest[:8]}"
            next_index += 1
        found[digest] = Planned(
            index=int(names[digest].partition("-")[0]),
            name=names[digest],
            hash=digest,
            config=raw,
            overrides=overrides,
            **_figures(config),
        )
    return list(found.values())


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key twice")
    return found


def _value(text: str) -> Any:
    """Return a value as JSON has it, true and false as Python too, else the text."""
    text = text.strip()
    if text in ("True", "False"):
        return text == "True"
    try:
        return jsonfiles.parse(text)
    except ValueError:
        return text


def _checked(base: dict, overrides: dict[str, Any]) -> tuple[dict, configs.Config]:
    raw = {name: dict(section) for name, section in base.items()}
    known = configfile.flat(raw)
    if overrides.keys() & set(configfile.DURATION_KEYS):
        # One duration takes the place of another.
        raw["train"] |= dict.fromkeys(configfile.DURATIONS, 0)
    for key, value in overrides.items():
        if key not in known:
            raise unknown("config key", key, known)
        section, name = key.split(".")
        is_float = type(known[key]) is float and type(value) is int
        raw[section][name] = float(value) if is_float else value
    raw = adopt.adopted(raw)
    return raw, configs.check(raw)


def _figures(config: configs.Config) -> dict[str, Any]:
    """Return what is known of a run's cost before its data is opened."""
    size = sweeps.known_vocabulary(config)
    if not size:
        return {}
    model = dataclasses.replace(config.model, vocab_size=size)
    params, length = counts.params(model), config.data.max_length
    figures = {"params": vars(params)}
    if config.train.epochs:
        return figures
    rows = config.train.batch_size
    steps = configs.resolve_steps(
        config.train,
        tokens_per_step=rows * length,
        corpus_tokens=0,
        num_params=params.total,
    )
    tokens, whole = steps * rows * length, dataclasses.replace(config, model=model)
    flops = counts.flops_per_token(model, length) * tokens
    return figures | {
        "steps": steps,
        "tokens": tokens,
        "flops": flops,
        "flops_exact": flops,
        "memory_bytes": costs.memory_bytes(whole),
        "disk_bytes": costs.disk_bytes(whole, steps, steps),
    }
