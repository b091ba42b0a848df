"""Commands that measure: ours in turn with what a user would pick instead."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from fm_jax import machine
from fm_jax.commands.command import Command
from fm_jax.errors import UserError, unknown

# What each yardstick needs beyond this package's own dependencies.
NEEDS = {"nanogpt_like": ("torch",), "transformers": ("torch", "transformers")}


def step(flags, raw, argv) -> None:
    """Print how fast a config trains on this machine."""
    from fm_jax import config as configs

    _at_least_one(flags, "steps", "rounds")
    _check_yardstick(flags.vs, "nanogpt_like")
    config = configs.check(raw)
    machine.tune_allocator()
    from fm_jax.bench import startup, versus
    from fm_jax.bench import step as steps

    if flags.vs:
        versus.check(config)
    found = steps.step(config, num_steps=flags.steps, say=_say)
    if flags.startup:
        found |= startup.startup(config)
    if flags.vs:
        each = -(-flags.steps // flags.rounds)
        found |= versus.versus(config, num_steps=each, rounds=flags.rounds, say=_say)
    _show(found, flags)


def generate(flags, raw, argv) -> None:
    """Print how fast a config's model writes text on this machine."""
    from fm_jax import config as configs

    _at_least_one(flags, "rounds")
    _check_yardstick(flags.vs, "transformers")
    config = configs.check(raw)
    machine.tune_allocator()
    from fm_jax.bench import generate as generates

    how = {"rounds": flags.rounds, "vs": flags.vs, "int8": True, "say": _say}
    _show(generates.run(generates.sized(config), **how), flags)


def data(flags, raw, argv) -> None:
    """Print how fast this machine tokenises and reads the data of a config."""
    from fm_jax import config as configs
    from fm_jax.prepare import rates

    _at_least_one(flags, "rounds")
    _show(rates.measure(configs.check(raw), rounds=flags.rounds, say=_say), flags)


def checkpoint(flags, raw, argv) -> None:
    """Print how long a save holds up training, and how fast it and a restore are."""
    from fm_jax import config as configs

    _at_least_one(flags, "rounds")
    folder = Path(flags.folder)
    if not folder.is_dir():
        raise UserError(f"--folder must be a folder that exists; got {folder}.")
    config = configs.check(raw)
    machine.tune_allocator()
    from fm_jax.bench import checkpoint as checkpoints
    from fm_jax.bench import generate as generates

    config = dataclasses.replace(config, model=generates.sized(config))
    found = checkpoints.checkpoint(config, rounds=flags.rounds, folder=folder, say=_say)
    _show(found, flags)


def fit(flags, raw, argv) -> None:
    """Print how fast laws are fitted, beside a loop over SciPy."""
    from fm_jax.bench import fit as fits

    _at_least_one(flags, "rounds", "resamples", "sample")
    found = fits.fit(
        flags.runs,
        rounds=flags.rounds,
        num_draws=flags.resamples,
        sample=flags.sample,
        say=_say,
    )
    _show(found, flags)


def table(flags, raw, argv) -> None:
    """Run the parts, each in a process of its own, and write what they said."""
    from fm_jax.bench import table as tables

    print(tables.write(Path(flags.out), quick=flags.quick, say=_say))


def _at_least_one(flags: Any, *names: str) -> None:
    for name in names:
        if flags.values[name] < 1:
            raise UserError(f"--{name} must be >= 1; got {flags.values[name]}.")


def _check_yardstick(name: str, *known: str) -> None:
    """Raise UserError for a --vs that is not known, or that is not installed."""
    if not name:
        return
    if name not in known:
        raise unknown("--vs", name, known)
    missing = [x for x in NEEDS[name] if importlib.util.find_spec(x) is None]
    if missing:
        raise UserError(
            f"--vs={name} must have {' and '.join(missing)} installed; got none. "
            "pip install 'fm_jax[parity]', or give --vs= for ours alone."
        )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _show(found: dict[str, Any], flags: Any) -> None:
    """Print names and values: a table, or JSON. Flags: json."""
    if flags.json:
        print(json.dumps(found, indent=1))
        return
    width = max(map(len, found))
    for name, value in found.items():
        is_number = isinstance(value, float | int) and not isinstance(value, bool)
        shown = f"{value:,.4g}" if is_number else str(value)
        print(f"{name:{width + 2}}{shown:>14}")


_JSON = (False, "print JSON")
COMMANDS = {
    "bench step": Command(
        step,
        "print how fast a config trains on this machine, and how near its ceiling",
        "fm bench step --config=configs/quickstart.py --steps=20",
        {
            "steps": (20, "steps to time"),
            "rounds": (5, "with --vs: turns that each takes"),
            "vs": ("", "nanogpt_like: a PyTorch step of the same sizes, in turn"),
            "startup": (True, "also time the first step of new processes; --nostartup"),
            "json": _JSON,
        },
        takes_config=True,
    ),
    "bench generate": Command(
        generate,
        "print how fast a config's model writes text, beside transformers",
        "fm bench generate --config=configs/quickstart.py --rounds=5",
        {
            "rounds": (7, "times that each writes the same texts"),
            "vs": ("transformers", "who writes them in turn; --vs= for ours alone"),
            "json": _JSON,
        },
        takes_config=True,
    ),
    "bench data": Command(
        data,
        "print how fast the data of a config is tokenised and read, as ratios",
        "fm bench data --config=configs/quickstart.py",
        {
            "rounds": (5, "interleaved rounds, of which medians are taken"),
            "json": _JSON,
        },
        takes_config=True,
    ),
    "bench checkpoint": Command(
        checkpoint,
        "print how long a save holds up training, and its speed beside bare files",
        "fm bench checkpoint --config=configs/bench.py:tiny",
        {
            "rounds": (5, "interleaved rounds, of which medians are taken"),
            "folder": (".", "on the disk to measure; left as it was"),
            "json": _JSON,
        },
        takes_config=True,
    ),
    "bench fit": Command(
        fit,
        "print how fast laws are fitted, beside a loop over SciPy",
        "fm bench fit --runs=sweeps/tiny",
        {
            "runs": ("", "what fm fit reads; default: made-up noisy runs of a law"),
            "rounds": (5, "interleaved rounds, of which medians are taken"),
            "resamples": (4000, "bootstraps of a fit"),
            "sample": (100, "of the loop's starts and bootstraps, those that are run"),
            "json": _JSON,
        },
    ),
    "bench table": Command(
        table,
        "run every part beside its yardstick, and write the tables",
        "fm bench table --out=configs/benchmarks.md",
        {
            "out": ("configs/benchmarks.md", "the file to write"),
            "quick": (False, "tiny sizes: to see that it works, not how fast"),
        },
    ),
}
