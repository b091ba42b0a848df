"""Whether a run lives, and how it ended, as its folder tells.

Ages are by this machine's clock, of the times that the disk gives files: where that is
ahead they are 0, and a disk that is more than LOST_SECONDS behind shows every run as
lost. Imports no jax.
"""

import contextlib
import time
from pathlib import Path

from fm_jax import events, jsonfiles
from fm_jax.errors import DivergedError, StoppedError, UserError
from fm_jax.watch import EXIT_HUNG

LOST_SECONDS = 30.0  # several times watch.TELL, and what a shared disk may lag behind
MOST_SAID = 2000  # bytes of what a small file says
INTERRUPTED = (128 + 2, 128 + 15)  # exit statuses: SIGINT, SIGTERM
AT_ONCE = "interrupted; the same command goes on from the last save"


def read(path: Path) -> tuple[str, float | None, str]:
    """Return the state of a run, the seconds since its last sign of life, and why.

    The states are those of `status.Status`. Of several processes the one that has been
    silent longest counts, and a why names it. Raises OSError, and UserError on an exit
    status that is none.
    """
    if not (path / "config.json").exists():
        return "waiting", None, ""
    statuses, ends = _statuses(path / "exits")
    signs = _signs(path)
    going = {name: sign for name, sign in signs.items() if name not in statuses}
    name, sign = min((going or signs).items(), key=lambda item: item[1])
    is_silent = not going or _age(sign) >= LOST_SECONDS
    who = f"process {name} of {len(signs)}" if len(signs) > 1 else "its process"
    if found := _end(path, statuses):
        state, why = found
        if state == "failed" and going and is_silent and len(signs) > 1:
            why = f"{who} fell silent; {why}"  # which the others fail of
        return state, _age(max([*signs.values(), *ends])), why
    if is_silent:
        return "lost", _age(sign), f"{who} was killed, or its machine is gone"
    return "running", _age(sign), ""


def _end(path: Path, statuses: dict[str, int]) -> tuple[str, str] | None:
    """Return the state that a run ended in, and why; None where nothing says so."""
    if (path / "DONE").exists():
        return "done", ""
    if said := _said(path / "FAILED"):
        return _of_failure(said)
    return _of_statuses(statuses, path) if any(statuses.values()) else None


def _signs(path: Path) -> dict[str, float]:
    """Return when each process of a run gave its last sign of life.

    What process 0 writes of steps is one too: where nobody watches it is the only one.
    """
    alive = [(file.name, file) for file in (path / "alive").glob("*")]
    written = [("0", path / name) for name in (events.FILE, "metrics.jsonl")]
    signs = {"0": (path / "config.json").stat().st_mtime}
    for name, file in (*written, *alive):
        with contextlib.suppress(FileNotFoundError):  # it ended meanwhile
            when = file.stat().st_mtime
            signs[name] = max(when, signs.get(name, when))
    return signs


def _statuses(folder: Path) -> tuple[dict[str, int], list[float]]:
    """Return the exit status of each process that ended, and when each did."""
    found, times = {}, []
    for file in folder.glob("*"):
        said = _said(file)
        if not said:
            continue  # it is being written
        if not said.isdecimal() or len(said) > 3:
            raise UserError(f"{file} must hold an exit status; got {said[:40]!r}.")
        found[file.name] = int(said)
        times.append(file.stat().st_mtime)
    return found, times


def _of_failure(said: str) -> tuple[str, str]:
    """Return the state of a run that FAILED says this of, and why."""
    if said.startswith("KeyboardInterrupt"):
        return "stopped", AT_ONCE
    return ("diverged" if said.startswith("DivergedError") else "failed"), said


def _of_statuses(statuses: dict[str, int], path: Path) -> tuple[str, str]:
    """Return the state that exit statuses tell of, the gravest one's, and why."""
    found = []
    for name, status in statuses.items():
        who = f"process {name}: " if len(statuses) > 1 else ""
        if status == DivergedError.exit_status:
            found.append((0, "diverged", f"{who}exit status {status}"))
        elif status == StoppedError.exit_status:
            found.append((2, "stopped", ""))
        elif status in INTERRUPTED:
            found.append((2, "stopped", who + AT_ONCE))
        elif status:
            said = _said(path / f"stacks-{name}.txt") if status == EXIT_HUNG else ""
            found.append((1, "failed", f"{who}{said or f'exit status {status}'}"))
    return min(found)[1:]


def _said(file: Path) -> str:
    """Return the first line of a small file, "" where there is none."""
    with contextlib.suppress(FileNotFoundError), jsonfiles.opened(file) as stream:
        text = stream.read(MOST_SAID).decode(errors="replace")
        return text.partition("\n")[0].strip()
    return ""


def _age(when: float) -> float:
    return max(0.0, time.time() - when)
