"""The run folder: a run that explains itself through its files. Imports no jax."""

import contextlib
import dataclasses
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from fm_jax import jsonfiles
from fm_jax.errors import UserError, reason

METRICS = "metrics.jsonl"
RECORD = {"config", "changed_from_base", "resolved", "data", "history"}
BEGINNING = {"path": str, "run_id": str, "step": int, "tokens": float,
             "with_optimizer": bool}  # fmt: skip
# Of config.json, what is read before the checks of a config.
FORM = {
    "config": {"*": dict},
    "changed_from_base": {"*": [object]},
    "resolved": {
        "run_id?": str,
        "init?": (None, BEGINNING),
        "model?": dict,
        "tokens_per_step?": float,
    },
    "data": {
        "tokenizer?": str,
        "end_id?": int,
        "begin_id?": (None, int),
        "begin_ids?": [int],
        "end_ids?": [int],
        "labels?": [str],
        "label_ids?": [int],
        "eval_store?": str,
    },
    "history": [dict],
}
ROW = {"step": int}  # of a line of metrics
OWN_NAMES = (".lock", "tokenizer.json", "FAILED")  # what may stand before config.json


class Hearer(Protocol):
    """Who hears what becomes of metrics.jsonl, and keeps nobody waiting."""

    def row(self, row: dict[str, Any]) -> None:
        """Hear of a row that was appended."""

    def rewind(self, step: int, kept: list[dict[str, Any]]) -> None:
        """Hear that the run goes on from `step`, with these rows alone."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A folder with config.json, metrics.jsonl, log.txt, checkpoints/ and DONE.

    FAILED holds the reason where a run stopped otherwise. Every writer here leaves
    either the old file or the new one, and a line of metrics whole or absent. Of
    several processes that train a run one `writes`; for the others nothing happens.
    hearer: hears of each row of metrics.
    """

    path: Path
    writes: bool = True
    hearer: Hearer | None = dataclasses.field(default=None, compare=False)

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    def exists(self) -> bool:
        """Return whether a run was begun here."""
        with _told(self.path):
            return (self.path / "config.json").exists()

    def is_done(self) -> bool:
        """Return whether the run came to its end, which may be step 0."""
        return (self.path / "DONE").exists()

    def done_step(self) -> int:
        """Return the step that the run came to its end at, 0 while it has not."""
        file = self.path / "DONE"
        if not file.exists():
            return 0
        with _told(file):
            said = file.read_text(errors="replace").strip()[:30]
        if not said.isdecimal() or len(said) > 18:
            raise UserError(f"{file} must hold the run's last step; got {said!r}.")
        return int(said)

    def check_free(self) -> None:
        """Raise UserError when the folder holds something that is not a run.

        What a start that was killed early leaves behind is no obstacle.
        """
        with _told(self.path):
            if not self.path.exists() or self.exists():
                return
            strange = not self.path.is_dir() or any(
                file.name not in OWN_NAMES and not file.name.endswith(".writing")
                for file in self.path.iterdir()
            )
        if strange:
            raise UserError(
                f"--workdir must be a run or an empty folder; got {self.path}, which "
                "holds something else. Choose another folder."
            )

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from writing this run while the block runs.

        Raises UserError when one does, which names it. The lock ends with its process,
        however that ends; `alive/0` says when it was last seen.
        """
        import fcntl

        if not self.writes:
            yield
            return
        with _told(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = open(self.path / ".lock", "a+")  # noqa: SIM115, held by the block
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                lock.seek(0)
                who = lock.read(200).strip()
                raise UserError(
                    f"--workdir must not be in use; got {self.path}, which another "
                    f"process is training{who and f' ({who})'}. Wait for it, or choose "
                    "another --workdir."
                ) from error
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            lock.flush()
            yield

    def begin(self) -> None:
        """Make the folder, and take away what said how far an earlier start came."""
        if not self.writes:
            return
        with _told(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            # Of each process; this time there may be fewer.
            told = [*self.path.glob("alive/*"), *self.path.glob("exits/*")]
            for file in (self.path / "DONE", self.path / "FAILED", *told):
                file.unlink(missing_ok=True)

    def write(self, name: str, text: str) -> None:
        """Write a file of the folder at once or not at all."""
        if not self.writes:
            return
        beside = self.path / f".{name}.writing"
        with _told(self.path / name):
            beside.write_text(text, encoding="utf-8")
            os.replace(beside, self.path / name)

    def leave_status(self, index: int, status: int) -> None:
        """Write exits/<index>, with which each process says how it ended.

        What cannot be written there is no matter: the process ends all the same.
        """
        with contextlib.suppress(OSError):
            (self.path / "exits").mkdir(exist_ok=True)
            (self.path / "exits" / str(index)).write_text(f"{status}\n")

    def write_config(self, record: dict[str, Any]) -> None:
        """Write config.json."""
        self.write("config.json", json.dumps(record, indent=1, default=str) + "\n")

    def read_config(self) -> dict[str, Any]:
        """Return config.json; raises UserError when there is none to read."""
        file = self.path / "config.json"
        try:
            record = jsonfiles.parse(jsonfiles.text(file))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise UserError(
                f"a run must be a folder with config.json; got {self.path}. "
                "fm train prints the folder of its run."
            ) from error
        except OSError as error:
            raise UserError(f"{file} must be readable; got {reason(error)}.") from error
        except ValueError as error:
            raise UserError(f"{file} must be JSON; got {error}.") from error
        if not isinstance(record, dict) or not record.keys() >= RECORD:
            raise UserError(
                f"{self.path}/config.json must be written by a run; got one that "
                "something else wrote. Choose the folder of a run."
            )
        jsonfiles.check(record, FORM, str(file))
        return record

    def log(self, line: str) -> None:
        """Append a line to log.txt."""
        self._append("log.txt", line)

    def append(self, row: dict[str, Any], name: str = METRICS) -> None:
        """Append one object as a line."""
        self._append(name, json.dumps(row))
        if self.hearer is not None and name == METRICS:
            self.hearer.row(row)

    def _append(self, name: str, line: str) -> None:
        if not self.writes:
            return
        file = self.path / name
        with _told(file), open(file, "a", encoding="utf-8") as stream:
            stream.write(line + "\n")

    def rows(self, name: str = METRICS, *, form: Any = ROW) -> Iterator[dict[str, Any]]:
        """Yield the objects of a .jsonl file; a torn last line is left out.

        Raises UserError on another line that is no object of that form.
        """
        file = self.path / name
        if not file.exists():
            return
        with _told(file), open(file, "rb") as stream:
            for number, line in enumerate(stream, 1):
                if not line.endswith(b"\n"):
                    return
                where = f"line {number} of {file}"
                try:
                    row = jsonfiles.parse(line)
                except ValueError as error:
                    raise UserError(f"{where} must be JSON; got {error}.") from error
                jsonfiles.check(row, form, where)
                yield row

    def mend(self, name: str) -> None:
        """Cut a last line that was torn, so that the next one stands alone."""
        file = self.path / name
        if not self.writes or not file.exists():
            return
        with _told(file), open(file, "rb+") as stream:
            whole = stream.read().rfind(b"\n") + 1
            stream.truncate(whole)

    def rewind(self, step: int) -> None:
        """Drop what was written after `step` was saved: it is about to be made again.

        Samples and the closing row come after the last save, so they go too.
        """
        for name in (METRICS, "samples.jsonl"):
            kept = []
            if (self.path / name).exists():
                kept = [
                    row
                    for row in self.rows(name)
                    if row["step"] <= step
                    and not any(
                        k == "text" or k.startswith(("final/", "predicted/"))
                        for k in row
                    )
                ]
                self.write(name, "".join(json.dumps(row) + "\n" for row in kept))
            if self.hearer is not None and name == METRICS:
                self.hearer.rewind(step, kept)

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Return the steps and values of one metric."""
        rows = self.rows(form=ROW | {f"{name}?": float})
        pairs = [(row["step"], row[name]) for row in rows if name in row]
        return [step for step, _ in pairs], [value for _, value in pairs]


@contextlib.contextmanager
def _told(file: Path) -> Iterator[None]:
    """Turn a file that cannot be written into the user's error."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{file} must be writable and its disk have room; got {error.strerror}."
        ) from error
