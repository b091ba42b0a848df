"""Processes that take turns: each does its piece of work while the others wait."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fm_jax.errors import UserError

MODULE = "fm_jax.bench.child"


@dataclasses.dataclass(frozen=True)
class Sample:
    """One turn. `busy` is the part of the machine that others took meanwhile."""

    seconds: float
    cpu_seconds: float
    faults: int
    busy: float


class Worker:
    """A process of its own, which answers each turn with what the turn took.

    spec: what `fm_jax.bench.child` is told; its "side" names what runs there. Raises
    UserError with the last line of a process that ends before its time.
    """

    def __init__(self, spec: dict[str, Any], env: dict[str, str] | None = None):
        self.name = spec["side"]
        self._process = subprocess.Popen(
            [sys.executable, "-m", MODULE, json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | (env or {}),
        )
        # Ready when it has compiled and warmed up; until then nobody else runs.
        self.ready: dict[str, Any] = self._answer()

    def turn(self) -> Sample:
        """Let it do its piece of work."""
        before = _busy_seconds()
        self._ask("go")
        took = self._answer()
        others = _busy_seconds() - before - took["cpu_seconds"]
        share = others / (took["seconds"] * (os.cpu_count() or 1))
        return Sample(**took, busy=max(0.0, share))

    def end(self) -> dict[str, Any]:
        """Return what it says of itself at the end, such as the memory that it held."""
        self._ask("end")
        said = self._answer()
        self.close()
        return said

    def close(self) -> None:
        """End the process, whatever it does."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()

    def _ask(self, word: str) -> None:
        try:
            self._process.stdin.write(word + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._fail()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            self._fail()
        return json.loads(line)

    def _fail(self) -> None:
        said = self._process.communicate()[1].strip().splitlines() or ["nothing"]
        raise UserError(
            f"a process to time must end well; {self.name} said: {said[-1]}"
        )


def run(workers: Sequence[Worker], rounds: int) -> list[list[Sample]]:
    """Return each worker's samples: in every round all have one turn, in order."""
    samples: list[list[Sample]] = [[] for _ in workers]
    for _ in range(rounds):
        for worker, taken in zip(workers, samples, strict=True):
            taken.append(worker.turn())
    return samples


def _busy_seconds() -> float:
    """Return the CPU seconds that the machine has worked so far; 0: unknown."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return 0.0
    idle = int(fields[3]) + int(fields[4])
    return (sum(map(int, fields[:8])) - idle) / os.sysconf("SC_CLK_TCK")
