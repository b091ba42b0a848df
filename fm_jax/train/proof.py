"""Proof, by killing, that a run which is killed ends as it would have ended.

Imports no jax of its own: the runs are processes of their own, as a user would start.
"""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from fm_jax import events
from fm_jax.errors import UserError
from fm_jax.runs import Run

KINDS = ("compile", "step", "save", "eval")
# Measured by a clock or of a machine: no two runs have the same.
OF_TIME = ("run/", "perf/", "time/", "startup/", "memory/", "compile/", "predicted/")
LOOK, PATIENCE = 0.005, 600.0  # seconds


@dataclasses.dataclass(frozen=True)
class Kill:
    """When a start is killed: `delay` seconds after what `kind` and `step` say."""

    kind: str
    step: int
    delay: float


@dataclasses.dataclass
class Proof:
    """What was done to a run, and what in it is other than in the undisturbed one."""

    kills: list[Kill]
    differences: list[str]
    num_arrays: int
    num_lines: int


def draw(seed: int, num_kills: int, num_steps: int, config: dict) -> list[Kill]:
    """Return kills of all kinds, spread over a run's steps, always the same ones."""
    rng = random.Random(seed)
    steps = sorted(rng.randrange(1, max(2, num_steps)) for _ in range(num_kills))
    every = {"save": config["checkpoint"]["every"], "eval": config["eval"]["every"]}
    found = []
    for number, step in enumerate(steps):
        kind = KINDS[(number + seed) % len(KINDS)]
        if kind in every and not every[kind]:
            kind = "step"
        period = every.get(kind, 1)
        at = min(-(-step // period) * period, num_steps)
        found.append(Kill(kind, at, rng.uniform(0, 0.3)))
    return found


def prove(
    raw: dict,
    folder: Path,
    *,
    num_kills: int,
    seed: int,
    say: Callable[[str], None],
) -> Proof:
    """Train a config twice, once killed again and again; return how they differ.

    The two run folders, `undisturbed` and `killed`, are made in `folder`, which must
    not hold them. Compared are digests of all arrays of the last checkpoint, parameters
    and optimizer, and every line of metrics but for what clocks and machines say.
    """
    for name in ("undisturbed", "killed"):
        if (folder / name).exists():
            raise UserError(
                f"--workdir must be a new folder; got {folder}, which has {name}."
            )
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "config.json"
    file.write_text(json.dumps({"config": raw}))
    whole, killed = Run(folder / "undisturbed"), Run(folder / "killed")
    say("undisturbed")
    _end(_start(file, whole), whole)
    num_steps = whole.done_step()
    kills = draw(seed, num_kills, num_steps, raw)
    for number, kill in enumerate(kills, 1):
        child = _start(file, killed)
        came = _kill(child, killed, kill)
        how = "killed" if came else "had ended before it could be killed"
        say(f"{number}/{num_kills}: {how} at {kill.kind}, step {kill.step}")
    _end(_start(file, killed), killed)
    return Proof(kills, *_compare(whole, killed, num_steps))


def _start(config: Path, run: Run) -> subprocess.Popen:
    command = [sys.executable, "-m", "fm_jax.cli", "train", f"--config={config}"]
    with open(run.path.with_suffix(".txt"), "a") as said:
        return subprocess.Popen(
            [*command, f"--workdir={run.path}"],
            stdout=said,
            stderr=said,
            env=os.environ,
            process_group=0,
        )


def _end(child: subprocess.Popen, run: Run) -> None:
    """Wait for a start that nobody disturbs."""
    if child.wait():
        said = run.path.with_suffix(".txt").read_text().splitlines()
        raise UserError(
            f"the config must train to its end; got exit {child.returncode}: "
            f"{said[-1] if said else 'nothing said'}"
        )


def _kill(child: subprocess.Popen, run: Run, kill: Kill) -> bool:
    """Kill a start when it comes where it shall; return whether it was still there."""
    begun = sum(row["event"] == "start" for row in events.read(run))
    deadline = time.monotonic() + PATIENCE
    while child.poll() is None and time.monotonic() < deadline:
        if _has_come(run, kill, begun):
            time.sleep(kill.delay)
            break
        time.sleep(LOOK)
    is_there = child.poll() is None
    if is_there:
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    return is_there


def _has_come(run: Run, kill: Kill, begun: int) -> bool:
    """Return whether the latest start, after `begun` others, is where it is killed."""
    own = [row for row in events.read(run) if row["attempt"] > begun]
    if not own or kill.kind == "compile":
        return bool(own)
    if kill.kind == "save":
        return any(r["event"] == "save" and r["step"] >= kill.step for r in own)
    ready = [row["step"] for row in own if row["event"] == "ready"]
    if not ready:
        return False
    reached = max((row["step"] for row in run.rows()), default=0)
    return reached >= max(kill.step, ready[0] + 1)


def _compare(whole: Run, killed: Run, step: int) -> tuple[list[str], int, int]:
    from fm_jax import digests
    from fm_jax.checkpoints import Checkpoints

    found = []
    for run in (whole, killed):
        saved = Checkpoints(run.checkpoints)
        saved.check(step)
        found.append(saved.digests(step))
        saved.close()
    differences = digests.changed(*found)
    differences += sorted(found[0].keys() ^ found[1].keys())
    lines = [_lines(run) for run in (whole, killed)]
    for ours, theirs in zip(*lines, strict=False):
        if ours != theirs:
            differences.append(f"metrics of step {ours['step']}")
    if len(lines[0]) != len(lines[1]):
        differences.append(f"{len(lines[0])} and {len(lines[1])} lines of metrics")
    return differences, len(found[0]), len(lines[0])


def _lines(run: Run) -> list[dict]:
    """Return what a run measured, but for what clocks and machines say."""
    rows = (
        {k: v for k, v in row.items() if not k.startswith(OF_TIME)}
        for row in run.rows()
    )
    return [row for row in rows if len(row) > 1]
