"""Runs what a sweep planned: a process for each run, until every one has ended.

Started again it goes on: a run that is done stays done, one that was cut off goes on
from its checkpoint, one that diverged is recorded and left alone.
"""

import contextlib
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from fm_jax.errors import DivergedError, UserError
from fm_jax.runs import Run
from fm_jax.sweeps import children, costs, lines, outlook, progress, records, workdir
from fm_jax.sweeps import sweep as sweeps
from fm_jax.sweeps.plans import Planned
from fm_jax.sweeps.progress import Line
from fm_jax.sweeps.sweep import Sweep
from fm_jax.sweeps.variants import Variants
from fm_jax.tables import rows

TRAIN = (sys.executable, "-m", "fm_jax.cli", "train")
EXIT_MISTAKE, EXIT_DIVERGED = UserError.exit_status, DivergedError.exit_status
SHOW_SECONDS = 1.0
MAX_WHY = 300  # characters of what stopped a run


def run(
    asked: Sweep | Variants | None,
    folder: Path,
    *,
    parallel: int = 1,
    say: Callable[[str], None] = print,
    mfu: float = 0.4,
    train: Sequence[str] = TRAIN,
    is_terminal: bool | None = None,
) -> int:
    """Run what is not done of a sweep in `folder`, `parallel` runs at once.

    asked: None for what the folder's own file says.

    Returns the exit status: 0 when every run is done or its divergence recorded, 1 when
    one failed or could not begin for want of its parent. folder: an absolute path, by
    which a process is known again; train: the command that gets --config and --workdir.
    Raises UserError when the folder is another's, in use, or there are fewer cores than
    runs at once, and when a run is refused before any has ended well;
    KeyboardInterrupt when it was asked to stop, by Ctrl-C, SIGTERM or a terminal that
    closed. Its runs are stopped first.
    """
    if asked is None:
        lines.read(lines.find(str(folder)))
    else:
        workdir.planned(asked, folder)  # before anything is written
    slots = children.slots(parallel)
    with Run(folder).held(), _stop_asked() as stop:
        if asked is None:
            runs = lines.read(folder)
            workdir.make(folder)
        else:
            runs = workdir.write(asked, folder)
        told = sweeps.of_base if isinstance(asked, Sweep) else str
        going = _Runner(folder, runs, slots, train, mfu, told)
        view = progress.View(say, is_terminal=is_terminal)
        try:
            going.go(view, stop)
        finally:
            going.stop()  # first: what shows may fail with its terminal
            view.close()
    found = going.lines()
    if stop.is_set():
        say(f"{progress.summary(found)}. Stopped; the same command goes on.")
        raise KeyboardInterrupt
    for text in progress.table(found):
        say(text)
    return int(any(line.state in ("failed", "blocked") for line in found))


class _Runner:
    """The runs of a sweep, their records, and the processes that go."""

    def __init__(self, folder, runs, slots, train, mfu, told):
        self.folder, self.slots, self.train = folder, list(slots), tuple(train)
        self.told = told  # turns what is said of a run into what is said of its sweep
        self.runs: dict[str, Planned] = {one.name: one for one in runs}
        self.parallel = len(slots)
        self.dtype = runs[0].config["model"]["dtype"]
        self.measured: list[costs.Measured] = []
        self.rates = costs.rates((), dtype=self.dtype, mfu=mfu, parallel=self.parallel)
        self._measure(runs)
        self.children: dict[str, children.Child] = {}
        self.records: dict[str, records.Record] = records.read(folder)

    def go(self, view: progress.View, stop_asked: threading.Event) -> None:
        """Run until every run has ended, or something asks to stop."""
        for name, one in self.runs.items():
            record, path = self.records.get(name, {}), self._path(one)
            if children.is_ours(pid := record.get("pid", 0), path):
                view.say(f"ending {name}, process {pid}, of a sweep that was killed")
                children.end_leftover(pid, path)
            record = records.known(path, one, record)
            # What failed is tried again.
            is_over = record["state"] in ("done", "diverged")
            self.records[name] = record if is_over else {"state": "waiting"}
        if ended := len(self._in("done", "diverged")):
            view.say(f"{ended} of {len(self.runs)} runs ended before")
            self._collect(view.say)
        view.skip(self.lines())
        shown = 0.0
        while not stop_asked.is_set():
            ended = self._reap()
            changed = ended + self._start()
            if changed or time.monotonic() - shown > SHOW_SECONDS:
                shown = time.monotonic()
                view.update(self.lines(), self._left())
            if ended:
                self._collect(view.say)
            if not self._in("waiting", "running"):
                return
            time.sleep(children.POLL_SECONDS)

    def lines(self) -> list[Line]:
        """Return where every run is."""
        for name, child in self.children.items():
            self.records[name]["seconds"] = child.seconds()
        return [
            records.line(self.folder, one, self.records[name])
            for name, one in self.runs.items()
        ]

    def stop(self) -> None:
        """Stop the processes that go."""
        if self.children:
            children.stop(self.children.values())
            self.records |= {name: {"state": "waiting"} for name in self.children}
            records.write(self.folder, self.records)
            self.children.clear()

    def _path(self, one: Planned) -> Path:
        return workdir.run_path(self.folder, one.name)

    def _in(self, *states: str) -> list[str]:
        return [name for name in self.runs if self.records[name]["state"] in states]

    def _reap(self) -> list[str]:
        """Note which processes ended and how; return their runs' names.

        Raises UserError when one was refused before any run ended well.
        """
        ended, refused = [], ""
        for name, child in list(self.children.items()):
            code = child.process.poll()
            if code is None:
                continue
            del self.children[name]
            self.slots.append(child.slot)
            ended.append(name)
            one, path = self.runs[name], self._path(self.runs[name])
            state = (
                "diverged" if code == EXIT_DIVERGED else records.state(path, one, {})
            )
            record = {"seconds": round(child.seconds(), 1), "exit": code}
            if state == "done":
                record |= {"state": "done", "loss": records.final_loss(path)}
                self._measure([one])
            else:
                record["state"] = "diverged" if state == "diverged" else "failed"
                record["why"] = _why(path, child, code)
            self.records[name] = record
            if code == EXIT_MISTAKE:
                refused = name
        if ended:
            records.write(self.folder, self.records)
        if refused and not self._in("done", "diverged"):
            raise UserError(
                f"{self.told(self.records[refused]['why'])} (said {refused}; "
                f"{len(self._in('waiting'))} of {len(self.runs)} runs were not started)"
            )
        return ended

    def _start(self) -> list[str]:
        """Start what may go and block what cannot; return the names of both."""
        changed = records.block(self.runs.values(), self.records)
        for name in self._in("waiting"):
            parent = self.runs[name].parent
            if self.slots and (not parent or self.records[parent]["state"] == "done"):
                self._launch(self.runs[name], self.slots.pop(0))
                changed.append(name)
        if changed:
            records.write(self.folder, self.records)
        return changed

    def _launch(self, one: Planned, slot: children.Slot) -> None:
        config, path = workdir.config_of(self.folder, one), self._path(one)
        file = f"{one.name}.json"
        Run(self.folder / "configs").write(file, json.dumps({"config": config}) + "\n")
        with contextlib.suppress(OSError):  # of an earlier try: it shall say why itself
            (path / "FAILED").unlink()
        self.children[one.name] = child = children.start(
            [
                *self.train,
                f"--config={self.folder / 'configs' / file}",
                f"--workdir={path}",
            ],
            log=self.folder / "logs" / f"{one.name}.log",
            slot=slot,
        )
        self.records[one.name] = {"state": "running", "pid": child.process.pid}

    def _measure(self, runs: Sequence[Planned]) -> None:
        """Take what the runs that are done took for what the others will."""
        self.measured += workdir.finished(self.folder, runs)
        if self.measured:
            self.rates = costs.rates(self.measured, dtype=self.dtype, mfu=1.0)

    def _left(self) -> float | None:
        """Return the estimated seconds until all have ended, None where none can be."""
        left = 0.0
        for name in self._in("waiting", "running"):
            one = self.runs[name]
            if not one.steps:
                return None
            whole = outlook.seconds(one, self.rates)
            if name in self.children:
                own = one.steps - one.branch_step
                done = max(0, progress.last_step(self._path(one)) - one.branch_step)
                whole *= 1 - min(1.0, done / own)
            left += whole
        return left / self.parallel

    def _collect(self, say: Callable[[str], None]) -> None:
        """Write the table of all runs so far."""
        try:
            if found := rows.collect(self.folder).rows:
                rows.write(self.folder, found)
        except UserError as error:
            say(f"the table of runs was not written: {error}")


def _why(path: Path, child: children.Child, code: int) -> str:
    """Return what stopped a run, in a line."""
    if code < 0:
        return f"ended by signal {-code}"
    said = records.reason(path) or child.last_words().removeprefix("fm: ")
    return said[:MAX_WHY] or f"exit status {code}, no output"


@contextlib.contextmanager
def _stop_asked() -> Iterator[threading.Event]:
    """Yield what is set when a signal asks to stop while the block runs.

    An exception in between could lose a process that was just started.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(number, frame):
        asked.set()

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
