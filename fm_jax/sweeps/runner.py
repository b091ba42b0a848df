"""Runs what a sweep planned: a process for each run, until every one has ended.

Started again it goes on: a run that is done stays done, one that was cut off goes on
from its checkpoint, one that diverged is recorded and left alone.
"""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fm_jax import configfile
from fm_jax.errors import UserError
from fm_jax.runs import Run
from fm_jax.sweeps import costs, outlook, progress, workdir
from fm_jax.sweeps.plans import Planned
from fm_jax.sweeps.progress import Line
from fm_jax.sweeps.sweep import Sweep
from fm_jax.tables import table

STATES = "states.json"
TRAIN = (sys.executable, "-m", "fm_jax.cli", "train")
EXIT_DIVERGED = 76  # as in cli.py, which is above
POLL_SECONDS = 0.2
SHOW_SECONDS = 1.0
GRACE_SECONDS = 20.0  # between asking a run to stop and ending it
SHARED_MEMORY = 0.9  # of a GPU that several runs share, for all of them together


def run(
    sweep: Sweep,
    folder: Path,
    *,
    parallel: int = 1,
    say: Callable[[str], None] = print,
    mfu: float = 0.4,
    train: Sequence[str] = TRAIN,
    is_terminal: bool | None = None,
) -> int:
    """Run what is not done of a sweep in `folder`, `parallel` runs at once.

    Returns the exit status: 0 when every run is done or its divergence recorded, 1 when
    one failed. train: the command that gets --config and --workdir. Raises UserError
    when the folder is another's, in use, or there are fewer cores than runs at once;
    KeyboardInterrupt when it was asked to stop, by Ctrl-C or SIGTERM, its runs stopped.
    """
    workdir.planned(sweep, folder)  # before anything is written
    slots = _slots(parallel)
    with Run(folder).held():
        runs = workdir.write(sweep, folder)
        going = _Runner(sweep, folder, runs, slots, train, mfu)
        view = progress.View(say, is_terminal=is_terminal)
        try:
            with _stop_asked() as asked:
                going.go(view, asked)
        except KeyboardInterrupt:
            view.close()
            going.stop()
            say(
                f"{progress.summary(going.lines())}. Stopped; the same command goes on."
            )
            raise
        finally:
            view.close()
            going.stop()
    lines = going.lines()
    for text in progress.table(lines):
        say(text)
    return int(any(line.state == "failed" for line in lines))


def status(sweep: Sweep, folder: Path) -> list[str]:
    """Return the lines of `fm sweep --status`: where every run of a folder is.

    Raises UserError when the folder is not this sweep's.
    """
    workdir.read(folder)
    runs = workdir.planned(sweep, folder)
    recorded = _recorded(folder)
    lines = []
    for one in runs:
        path, record = workdir.run_path(folder, one.name), recorded.get(one.name, {})
        state = _state(path, one, record)
        if state == "waiting" and _is_ours(record.get("pid", 0), path):
            state = "running"
        lines.append(_line(folder, one, state, record))
    lost = {line.name for line in lines if line.state in ("failed", "diverged")}
    for index, one in enumerate(runs):
        if lines[index].state == "waiting" and one.parent in lost:
            lines[index] = dataclasses.replace(lines[index], state="blocked")
    return progress.table(lines)


@dataclasses.dataclass(frozen=True)
class _Slot:
    """A share of the machine: cores to stay on, and variables that say which GPUs."""

    cores: frozenset[int] | None
    environment: dict[str, str]


@dataclasses.dataclass
class _Child:
    process: subprocess.Popen
    slot: _Slot
    began: float


class _Runner:
    """The runs of a sweep, their states, and the processes that go."""

    def __init__(self, sweep, folder, runs, slots, train, mfu):
        self.sweep, self.folder = sweep, folder
        self.runs: dict[str, Planned] = {one.name: one for one in runs}
        self.slots, self.train = list(slots), tuple(train)
        self.parallel = len(slots)
        self.measured: list[costs.Measured] = []
        self.rates = costs.rates(
            (), dtype=sweep.base["model"]["dtype"], mfu=mfu, parallel=self.parallel
        )
        self._measure(runs)
        self.children: dict[str, _Child] = {}
        self.records: dict[str, dict[str, Any]] = _recorded(folder)
        self.states: dict[str, str] = {}

    def go(self, view: progress.View, stop_asked: threading.Event) -> None:
        """Run until every run has ended; raise KeyboardInterrupt when asked to stop."""
        for name in ("configs", "logs", "runs"):
            (self.folder / name).mkdir(exist_ok=True)
        self._end_leftovers(view.say)
        for one in self.runs.values():
            state = _state(self._path(one), one, self.records.get(one.name, {}))
            # What failed, or was blocked, is tried again.
            self.states[one.name] = "waiting" if state == "failed" else state
        ended = [one for one, s in self.states.items() if s in progress.FINISHED]
        if ended:
            view.say(f"{len(ended)} of {len(self.runs)} runs ended before")
            self._collect(view.say)
        shown = 0.0
        while True:
            if stop_asked.is_set():
                raise KeyboardInterrupt
            changed = self._reap() + self._start()
            if changed or time.monotonic() - shown > SHOW_SECONDS:
                shown = time.monotonic()
                view.update(self.lines(), self._left())
            for name in changed:
                if self.states[name] in ("done", "diverged"):
                    self._collect(view.say)
            if not self.children and "waiting" not in self.states.values():
                return
            time.sleep(POLL_SECONDS)

    def lines(self) -> list[Line]:
        """Return where every run is."""
        lines = []
        for name, one in self.runs.items():
            record = dict(self.records.get(name, {}))
            if name in self.children:
                record["seconds"] = time.monotonic() - self.children[name].began
            state = self.states.get(name, "waiting")
            lines.append(_line(self.folder, one, state, record))
        return lines

    def stop(self) -> None:
        """Ask the processes that go to stop, wait, and end those that do not."""
        try:
            for child in self.children.values():
                child.process.terminate()
            end = time.monotonic() + GRACE_SECONDS
            for child in self.children.values():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.process.wait(max(0.0, end - time.monotonic()))
        finally:
            for name, child in self.children.items():
                if child.process.poll() is None:
                    child.process.kill()
                child.process.wait()
                self.states[name] = "waiting"
                self.records[name] = {}
            if self.children:
                self._write_records()
            self.children.clear()

    def _path(self, one: Planned) -> Path:
        return workdir.run_path(self.folder, one.name)

    def _reap(self) -> list[str]:
        """Note which processes ended and how; return their runs' names."""
        changed = []
        for name, child in list(self.children.items()):
            code = child.process.poll()
            if code is None:
                continue
            del self.children[name]
            self.slots.append(child.slot)
            one, record = self.runs[name], self.records[name]
            record |= {"pid": 0, "exit": code, "why": ""}
            record["seconds"] = round(time.monotonic() - child.began, 1)
            if code == EXIT_DIVERGED:
                record["state"] = "diverged"
            self.states[name] = _state(self._path(one), one, record)
            if self.states[name] not in ("done", "diverged"):
                self.states[name] = "failed"
            record["state"] = self.states[name]
            if record["state"] != "done":
                record["why"] = self._why(one, code)
            changed.append(name)
            if self.states[name] == "done":
                self._measure([one])
        if changed:
            self._write_records()
        return changed

    def _start(self) -> list[str]:
        """Start what may go and block what cannot; return the names of both."""
        changed = []
        for name, one in self.runs.items():
            if self.states[name] != "waiting":
                continue
            parent = self.states.get(one.parent, "done")
            if parent in ("failed", "diverged", "blocked"):
                self.states[name] = "blocked"
                self.records[name] = {"why": f"{one.parent} {parent}"}
                changed.append(name)
            elif parent == "done" and self.slots:
                self._launch(one, self.slots.pop(0))
                changed.append(name)
        if changed:
            self._write_records()
        return changed

    def _launch(self, one: Planned, slot: _Slot) -> None:
        config = {section: dict(keys) for section, keys in one.config.items()}
        if one.parent:
            parent = workdir.run_path(self.folder, one.parent).absolute()
            config["init"]["from"] = f"{parent}@{one.branch_step}"
        file = f"{one.name}.json"
        Run(self.folder / "configs").write(file, json.dumps({"config": config}) + "\n")
        log = open(self.folder / "logs" / f"{one.name}.log", "ab")  # noqa: SIM115
        package = Path(__file__).parents[2]
        paths = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
        with log:
            process = subprocess.Popen(
                [
                    *self.train,
                    f"--config={self.folder / 'configs' / file}",
                    f"--workdir={self._path(one)}",
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ
                | {"PYTHONPATH": os.pathsep.join(paths)}
                | slot.environment,
                start_new_session=True,  # Ctrl-C is for us: we stop it cleanly
            )
        # At once, before it has threads, which take over what their parent may use.
        if slot.cores is not None:
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(process.pid, slot.cores)
        self.children[one.name] = _Child(process, slot, time.monotonic())
        self.states[one.name] = "running"
        self.records[one.name] = {"state": "running", "pid": process.pid}

    def _end_leftovers(self, say: Callable[[str], None]) -> None:
        """End the processes of a runner that was killed before it could."""
        for name, record in self.records.items():
            pid = record.get("pid", 0)
            if name not in self.runs or not _is_ours(pid, self._path(self.runs[name])):
                continue
            say(f"ending {name}, process {pid}, left by a sweep that was killed")
            for number, wait in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, 5)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
                end = time.monotonic() + wait
                while time.monotonic() < end and _is_ours(
                    pid, self._path(self.runs[name])
                ):
                    time.sleep(POLL_SECONDS)

    def _why(self, one: Planned, code: int) -> str:
        """Return the last line of a run's log, where there is one."""
        text = (self.folder / "logs" / f"{one.name}.log").read_text(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return lines[-1][:200] if lines else f"exit status {code}, no output"

    def _measure(self, runs: Sequence[Planned]) -> None:
        """Take what the runs that are done took for what the others will."""
        self.measured += workdir.finished(self.folder, runs)
        if self.measured:
            dtype = self.sweep.base["model"]["dtype"]
            self.rates = costs.rates(self.measured, dtype=dtype, mfu=1.0)

    def _left(self) -> float:
        """Return the estimated seconds until all have ended."""
        left = 0.0
        for name, one in self.runs.items():
            if self.states[name] not in ("waiting", "running"):
                continue
            whole = outlook.seconds(one, self.rates)
            if name in self.children:
                own = max(1, one.steps - one.branch_step)
                done = max(0, progress.last_step(self._path(one)) - one.branch_step)
                whole *= 1 - min(1.0, done / own)
            left += whole
        return left / self.parallel

    def _collect(self, say: Callable[[str], None]) -> None:
        """Write the table of all runs so far."""
        try:
            rows = table.collect(self.folder)
            if rows:
                table.write(self.folder, rows)
        except UserError as error:
            say(f"the table of runs was not written: {error}")

    def _write_records(self) -> None:
        Run(self.folder).write(STATES, json.dumps(self.records, indent=1) + "\n")


def _recorded(folder: Path) -> dict[str, dict[str, Any]]:
    file = folder / STATES
    return configfile.read_json(file) if file.exists() else {}


def _state(path: Path, one: Planned, record: dict) -> str:
    """Return the state of a run that no process trains."""
    run = Run(path)
    if run.done_step() == one.steps:
        return "done"
    why = path / "FAILED"
    failed = why.read_text() if why.exists() else ""
    diverged = record.get("state") == "diverged" and path.exists()
    if diverged or failed.startswith("DivergedError"):
        return "diverged"
    if failed.startswith("KeyboardInterrupt"):
        return "waiting"
    return "failed" if failed or record.get("state") == "failed" else "waiting"


def _line(folder: Path, one: Planned, state: str, record: dict) -> Line:
    path, loss = workdir.run_path(folder, one.name), None
    if state == "done":
        for row in Run(path).rows():
            loss = row.get("final/loss", loss)
    return Line(
        name=one.name,
        state=state,
        step=one.steps if state == "done" else progress.last_step(path),
        steps=one.steps,
        loss=loss,
        seconds=record.get("seconds"),
        why=record.get("why", "") if state in progress.FINISHED else "",
    )


def _is_ours(pid: int, path: Path) -> bool:
    """Return whether a process lives and trains the run at `path`."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return f"--workdir={path}".encode() in words


def _slots(parallel: int) -> list[_Slot]:
    """Return the shares of this machine that runs at once get.

    One run alone gets everything. On GPUs each gets its own, or a part of one's memory
    where they are fewer; on CPU each gets its own cores.
    """
    if parallel < 1:
        raise UserError(f"--parallel must be >= 1; got {parallel}.")
    if parallel == 1:
        return [_Slot(None, {})]
    devices = [device for device, _ in costs.gpus()]
    if devices:
        sharing = -(-parallel // len(devices))
        memory = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{SHARED_MEMORY / sharing:.3f}"}
        slots = []
        for index in range(parallel):
            own = devices[index::parallel] or [devices[index % len(devices)]]
            given = {"CUDA_VISIBLE_DEVICES": ",".join(own)}
            slots.append(_Slot(None, given | (memory if sharing > 1 else {})))
        return slots
    if not hasattr(os, "sched_getaffinity"):
        return [_Slot(None, {})] * parallel
    cores = sorted(os.sched_getaffinity(0))
    if parallel > len(cores):
        raise UserError(
            f"--parallel must be at most the cores of this machine, {len(cores)}; got "
            f"{parallel}."
        )
    share = len(cores) // parallel
    return [
        _Slot(frozenset(cores[i * share : (i + 1) * share]), {})
        for i in range(parallel)
    ]


@contextlib.contextmanager
def _stop_asked() -> Iterator[threading.Event]:
    """Yield what is set when Ctrl-C or SIGTERM comes while the block runs.

    An exception in between could lose a process that was just started.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(number, frame):
        asked.set()

    before = {n: signal.signal(n, ask) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
