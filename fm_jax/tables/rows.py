"""The rows that runs leave below a folder: gathered, and written as one table."""

import csv
import dataclasses
import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fm_jax import jsonfiles
from fm_jax.errors import UserError
from fm_jax.runs import Run
from fm_jax.tables import schema

SWEEP_FILE = "sweep.jsonl"  # above runs/: what a sweep planned, a run a line
# Of a line of it, what is read here.
PLAN = {
    "name": str,
    "parent": (None, str),
    "budget_flops": (None, float),
    "replicate": (None, int),
    "role?": str,
}


@dataclasses.dataclass(frozen=True)
class Collected:
    """The rows of all runs below a folder, each with the columns schema.WRITTEN.

    `rows_read` counts those too that a later one replaced; `sha256` is of their bytes.
    Of the runs that did not come to their end, `failed` (names) stopped, `begun` have
    no row yet, and `unstarted` are planned and have no folder yet.
    """

    rows: list[dict[str, Any]]
    rows_read: int
    sha256: str
    failed: list[str]
    begun: int
    unstarted: int


def collect(folder: Path) -> Collected:
    """Read `table.jsonl` of every run below a folder, and what their sweep planned.

    A run that stopped because it diverged has the status diverged, whatever its last
    row says. Raises UserError for rows that cannot be read, for a newer format and for
    a run_id in two folders.
    """
    runs, sweeps = _below(folder)
    homes = {run: run.resolve().parent.parent for run in runs}
    plans = {home: _plans(home) for home in {*sweeps, *homes.values()}}
    by_run, rows_read, digest = {}, 0, hashlib.sha256()
    places, failed, begun = {}, [], 0
    for run in runs:
        raw = read_bytes(run / schema.FILE) if (run / schema.FILE).exists() else b""
        digest.update(raw)
        read = [row for _, row in objects(raw, run / schema.FILE)]
        rows_read += len(read)
        plan = plans[homes[run]].get(run.name, {})
        kept = _last_of_each(read, run / schema.FILE, name=run.name, plan=plan)
        by_run[run] = kept
        for run_id in {row["run_id"] for row in kept}:
            if places.setdefault(run_id, run) != run:
                raise UserError(
                    f"a run_id must be of one folder; got {run_id!r} in "
                    f"{places[run_id]} and in {run}. Move one of them elsewhere."
                )
        reason = _why_failed(run)
        status = kept[-1]["status"] if kept else ""
        if reason.startswith("DivergedError") and status == "running":
            kept[-1]["status"] = "diverged"
        elif reason and status != "diverged":
            failed.append(run.name)
        elif not kept and not Run(run).is_done():  # a fine-tuned one leaves no rows
            begun += 1
    _name_parents(by_run, {run: plans[homes[run]] for run in runs})
    rows = [row for kept in by_run.values() for row in kept]
    planned = sum(len(plans[sweep]) for sweep in sweeps)
    started = sum(run.name in plans[homes[run]] for run in runs if homes[run] in sweeps)
    unstarted = planned - started
    return Collected(rows, rows_read, digest.hexdigest(), failed, begun, unstarted)


def write(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as table.csv and table.parquet, each at once or not at all.

    The columns are schema.WRITTEN; what a row lacks is null. Raises ValueError for a
    column that is not among them and UserError where the folder cannot be written.
    """
    for each in rows:
        if strange := sorted(each.keys() - schema.WRITTEN.keys()):
            raise ValueError(f"a row must have columns of the run table; got {strange}")
    empty = dict.fromkeys(schema.WRITTEN)
    rows = [{**empty, **each} for each in rows]
    text = io.StringIO()
    lines = csv.DictWriter(text, list(schema.WRITTEN), lineterminator="\n")
    lines.writeheader()
    for each in rows:  # true and false as JSON has them
        truths = {n: str(v).lower() for n, v in each.items() if isinstance(v, bool)}
        lines.writerow({**each, **truths})
    _replace(folder / "table.csv", text.getvalue().encode())
    pyarrow, parquet = arrow(folder / "table.parquet")
    kinds = {int: "int64", float: "float64", str: "string", bool: "bool"}
    typed = pyarrow.schema(
        [
            (n, pyarrow.type_for_alias(kinds[kind]))
            for n, (kind, _) in schema.WRITTEN.items()
        ]
    )
    binary = io.BytesIO()
    try:
        parquet.write_table(pyarrow.Table.from_pylist(rows, schema=typed), binary)
    except (pyarrow.ArrowException, TypeError, OverflowError) as error:
        raise UserError(
            f"{folder} must have rows of the run table's types; got {error}."
        ) from error
    _replace(folder / "table.parquet", binary.getvalue())


def arrow(file: Path) -> tuple[Any, Any]:
    """Return pyarrow and its parquet; raises UserError where it is not installed."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(
            f"{file} must be read and written with pyarrow; got none installed. "
            "pip install pyarrow, or use the table as .csv."
        ) from error
    return pyarrow, parquet


def check_format(found: Any, file: Path) -> None:
    """Raise UserError for a run table of a format that is not known here."""
    if str(found) != str(schema.FORMAT):  # a cell of a .csv is text
        raise UserError(
            f"{file} must have format {schema.FORMAT} of the run table; got {found}. "
            "Read it with the fm_jax that wrote it."
        )


def read_bytes(file: Path) -> bytes:
    """Return the bytes of a file; raises UserError when it cannot be read."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{file} must be readable; got {error.strerror}.") from error


def objects(raw: bytes, file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield line number and object of each line of JSON; a torn last one is left out.

    Raises UserError for another line that is not an object, and for what is not UTF-8.
    """
    lines = text_of(raw, file).split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found = jsonfiles.parse(line)
        except ValueError as error:
            if number == len(lines):  # no newline ends it: its writer was stopped
                return
            raise UserError(
                f"{file} must be JSON in each line; got {error} in line {number}."
            ) from error
        if not isinstance(found, dict):
            raise UserError(
                f"{file} must have an object in each line; got {line[:40]!r} in line "
                f"{number}."
            )
        yield number, found


def text_of(raw: bytes, file: Path) -> str:
    """Return bytes as text, a byte order mark left out; raises UserError."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UserError(
            f"{file} must be UTF-8; got byte {raw[error.start]:#x} in line {line}. "
            "Save it as UTF-8."
        ) from error


def _below(folder: Path) -> tuple[list[Path], set[Path]]:
    """Return the run folders at or below a folder, by name, and the sweeps' folders."""
    runs, sweeps = [], set()
    for here, folders, files in os.walk(folder):
        if schema.FILE in files or {"config.json", "log.txt"} <= set(files):
            runs.append(Path(here))
            folders.clear()
        elif SWEEP_FILE in files:
            sweeps.add(Path(here).resolve())
    return sorted(runs), sweeps


def _why_failed(run: Path) -> str:
    """Return what a run said as it stopped; "" where it goes on or came to its end."""
    try:
        return (run / "FAILED").read_text(errors="replace")
    except FileNotFoundError:
        return ""


def _plans(sweep: Path) -> dict[str, dict[str, Any]]:
    """Return what a sweep plans, by the names of its runs; {} where there is none."""
    file = sweep / SWEEP_FILE
    if not file.exists():
        return {}
    plans = {}
    for number, plan in objects(read_bytes(file), file):
        if missing := {"name", "budget_flops", "parent", "replicate"} - plan.keys():
            raise UserError(
                f"{file} must be written by a sweep; got a line {number} without "
                f"{', '.join(sorted(missing))}."
            )
        jsonfiles.check(plan, PLAN, f"line {number} of {file}")
        plans[plan["name"]] = plan
    return plans


def _last_of_each(
    read: list[dict], file: Path, *, name: str, plan: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return the last row of each (run_id, step), in the order they were written."""
    rows = {}
    for each in read:
        check_format(each.get("format"), file)
        types = {name: schema.COLUMNS[name][0] for name in schema.NEVER_NULL}
        missing = [n for n, kind in types.items() if not isinstance(each.get(n), kind)]
        if wrong := missing or sorted(each.keys() - schema.COLUMNS.keys()):
            raise UserError(
                f"{file} must have the columns of the run table; got a row "
                f"{'without' if missing else 'with'} {wrong[0]}."
            )
        made = {**dict.fromkeys(schema.WRITTEN), **each}
        made["name"] = name
        if plan:
            made["budget_flops"] = plan["budget_flops"]
            made["replicate"] = plan["replicate"]
            if plan.get("role") == "trunk":  # its rate never fell
                made["is_final"] = False
        key = made["run_id"], made["step"]
        rows.pop(key, None)  # the later one stands where it was written
        rows[key] = made
    return list(rows.values())


def _name_parents(
    by_run: dict[Path, list[dict[str, Any]]], plans: dict[Path, dict[str, Any]]
) -> None:
    """Put the run_id of the planned parent where a row does not say its parent.

    A plan names a parent by its folder, beside the run's own.
    """
    for run, kept in by_run.items():
        if run.name not in plans[run] or not plans[run][run.name]["parent"]:
            continue
        parent = plans[run][run.name]["parent"]
        of_parent = by_run.get(run.parent / parent) or [{"run_id": parent}]
        for row in kept:
            row["parent_id"] = row["parent_id"] or of_parent[-1]["run_id"]


def _replace(file: Path, content: bytes) -> None:
    beside = file.with_name(f".{file.name}.writing")
    try:
        beside.write_bytes(content)
        os.replace(beside, file)
    except OSError as error:
        raise UserError(
            f"{file} must be writable and its disk have room; got {error.strerror}."
        ) from error
