"""fm bench table: every part in a process of its own, and a page of what they said."""

import dataclasses
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fm_jax import machine
from fm_jax.errors import UserError

BENCH = "configs/bench.py"
VARIANTS = ("tiny", "tiny_bf16", "small", "small_bf16")
BOUNDS = (("low", "high"), ("least", "most"))
QUICK = {  # of the config
    "model.num_layers": 1,
    "model.embed_dim": 16,
    "model.num_heads": 2,
    "model.mlp_dim": 32,
    "model.vocab_size": 512,
    "model.max_length": 64,
    "data.vocab_size": 512,
    "data.max_length": 64,
    "train.batch_size": 8,
    "eval.batch_size": 8,
}


@dataclasses.dataclass(frozen=True)
class Section:
    """A table: a title, what to know of it, and a command for each of its columns."""

    title: str
    text: str
    columns: dict[str, tuple[str, ...]]


def sections(*, quick: bool) -> list[Section]:
    """Return the tables of the page; quick: of tiny sizes and two rounds."""
    rounds = f"--rounds={2 if quick else 5}"
    sizes = [f"--config.{key}={value}" for key, value in QUICK.items()] if quick else []
    torch = _yardstick("nanogpt_like", "torch")
    both = _yardstick("transformers", "torch", "transformers")
    variants = VARIANTS[:2] if quick else VARIANTS
    tiny = (f"--config={BENCH}:tiny", *sizes)

    def stepped(variant):
        is_tiny = quick or variant.startswith("tiny")
        steps = 2 if quick else 50 if is_tiny else 10
        given = (f"--steps={steps}", rounds, torch, *(["--nostartup"] * quick))
        return ("step", f"--config={BENCH}:{variant}", *sizes, *given)

    fits = ("--resamples=20", "--sample=2") if quick else ()
    return [
        Section(
            "Training step",
            "Ratios above 1: ours is faster. Of PyTorch eager and compiled, with the "
            "same sizes and the same ids, each process in its turn.",
            {variant: stepped(variant) for variant in variants},
        ),
        Section(
            "Generation",
            "Greedy texts of the same weights, beside transformers with its cache.",
            {"tiny": ("generate", *tiny, rounds, both)},
        ),
        Section(
            "Data",
            "Beside the tokenizer library's own call, and NumPy's copies of the "
            "same memory map.",
            {"tiny": ("data", *tiny, rounds)},
        ),
        Section(
            "Checkpoint",
            "Beside NumPy writing and reading as many bytes in one file.",
            {
                variant: ("checkpoint", f"--config={BENCH}:{variant}", *sizes, rounds)
                for variant in variants[::2]
            },
        ),
        Section(
            "Fitting laws",
            "Beside a loop over SciPy, reckoned from a sample of its starts.",
            {"240 runs": ("fit", rounds, *fits)},
        ),
    ]


def write(out: Path, *, quick: bool, say: Callable[[str], None]) -> Path:
    """Run the parts and write their tables to `out`; return it.

    Raises UserError with what a part said that failed; nothing is written then.
    """
    if not out.parent.is_dir() or out.is_dir():
        raise UserError(f"--out must be a file in a folder that exists; got {out}.")
    found = []
    for section in sections(quick=quick):
        numbers = {}
        for name, argv in section.columns.items():
            say(_shown(argv))
            numbers[name] = run(argv)
        found.append((section, numbers))
    out.write_text(page(found, quick=quick))
    return out


def run(argv: Sequence[str]) -> dict[str, Any]:
    """Return what `fm bench` says in JSON, of a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "fm_jax.cli", "bench", *argv, "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        said = (done.stderr.strip() or "nothing").splitlines()[-1]
        raise UserError(f"a part must end well; {_shown(argv)} said: {said}")
    return json.loads(done.stdout)


def page(found: list[tuple[Section, dict[str, dict]]], *, quick: bool) -> str:
    """Return the page of sections and of the numbers of their columns, in markdown."""
    command = f"fm bench table{' --quick' if quick else ''}"
    lines = [
        "# Benchmarks",
        "",
        f"Made by `{command}` on {datetime.datetime.now(datetime.UTC):%Y-%m-%d}. "
        "Medians; in brackets the quartiles over interleaved rounds. Compare ratios: "
        "rates are of one machine on one day.",
        "",
        *(["Tiny sizes: it says that the parts work, not how fast.", ""] * quick),
        *(f"- {line}" for line in this_machine()),
    ]
    for section, numbers in found:
        lines += ["", f"## {section.title}", "", section.text, "", "```"]
        lines += [_shown(argv) for argv in section.columns.values()]
        lines += ["```", "", *rows(numbers)]
    return "\n".join(lines) + "\n"


def rows(numbers: dict[str, dict[str, Any]]) -> list[str]:
    """Return a markdown table of names by columns.

    NAME_low and NAME_high, its quartiles, or NAME_least and NAME_most, stand beside
    NAME. What a column does not have is left empty.
    """
    names = dict.fromkeys(name for found in numbers.values() for name in found)
    bounds = {
        end
        for found in numbers.values()
        for name in found
        for end in _spread(name, found)
    }
    lines = [f"| | {' | '.join(numbers)} |", f"|---|{'---:|' * len(numbers)}"]
    for name in names:
        if name not in bounds:
            cells = " | ".join(_cell(name, found) for found in numbers.values())
            lines.append(f"| {name} | {cells} |")
    return lines


def this_machine() -> list[str]:
    """Return what numbers depend on: processor, memory and versions; no host's name."""
    found = machine.versions()
    for name in ("torch", "transformers", "scipy"):
        if importlib.util.find_spec(name):
            found[name] = importlib.metadata.version(name)
    shown = ", ".join(f"{k} {v}" for k, v in found.items() if k != "system")
    gigabytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    return [
        f"{_processor()}, {machine.num_cores()} cores, {gigabytes:.0f} GB of memory",
        found["system"],
        shown,
    ]


def _processor() -> str:
    """Return the processor's name, as the system has it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _yardstick(name: str, *needed: str) -> str:
    """Return the flag of a yardstick, of none where what it needs is not installed."""
    return f"--vs={name if all(map(importlib.util.find_spec, needed)) else ''}"


def _shown(argv: Sequence[str]) -> str:
    return shlex.join(["fm", "bench", *argv])


def _spread(name: str, found: dict[str, Any]) -> tuple[str, ...]:
    """Return the two names in `found` of the bounds of `name`; () where it has none."""
    for pair in BOUNDS:
        ends = [
            key
            for end in pair
            for key in found
            if key != name and re.sub(f"_{end}(?=_|$)", "", key, count=1) == name
        ]
        if len(ends) == len(pair):
            return tuple(ends)
    return ()


def _cell(name: str, found: dict[str, Any]) -> str:
    if name not in found:
        return ""
    shown = _number(found[name])
    spread = [_number(found[end]) for end in _spread(name, found)]
    return f"{shown} [{', '.join(spread)}]" if spread else shown


def _number(value: Any) -> str:
    is_number = isinstance(value, float | int) and not isinstance(value, bool)
    return f"{value:,.4g}" if is_number else str(value)
