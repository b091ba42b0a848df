"""Runs as columns of one length, read from a table or a folder, with their record."""

import dataclasses
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from fm_jax.errors import UserError, unknown
from fm_jax.tables import cells as tables
from fm_jax.tables import results, schema
from fm_jax.tables import rows as gathered
from fm_jax.tables.cells import Cells

FLOPS = ("auto", "6nd", "exact")
DUPLICATES = ("refuse", "keep", "drop")
NEEDED = ("params", "tokens", "loss")
GIVEN = (*NEEDED, "flops", "budget", "group", "run", "is_final", "seed", "replicate")
APART = ("run", "group", "seed", "replicate")  # rows that differ here are no duplicates
FEW_FLOPS = 1e9  # of the largest run, which no run of this century has
LEAST_BUDGET = 1e9  # FLOPs; a smaller number in `group` is a label
FLOPS_OFF = 0.05  # of 6*params*tokens, above which the record says so
CONDITION = re.compile(r"\s*(.+?)\s*(!=|>=|<=|=|>|<)\s*(.*?)\s*", re.DOTALL)
BUDGET = re.compile(r"(?:isoflops?[_-]?)?(\d+(?:\.\d*)?(?:e[+-]?\d+)?)")


@dataclasses.dataclass(frozen=True)
class Points:
    """Runs as columns of one length (float64 unless said).

    `flops` are 6*params*tokens unless the table gives them. Rows of one `cluster`
    (str) are to be resampled together: a trunk with its branches, the checkpoints of a
    run, a `group`; all different where nothing says otherwise. `run` (str) says which
    curve a row is of, `is_final` (bool) whether its schedule ended there, `budget` the
    isoFLOP budget it was planned for, NaN where none. `extra` has every other numeric
    column, NaN where empty. `record` says where the rows are from and what was left
    out: path, sha256, format, rows_read, rows, excluded, mapping, count, counts (those
    that can be chosen), flops, curves, columns, diverged, failed (names of runs),
    running, unstarted (numbers of runs), notes.
    """

    params: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray
    flops: np.ndarray
    cluster: np.ndarray
    is_final: np.ndarray
    run: np.ndarray
    budget: np.ndarray
    extra: dict[str, np.ndarray]
    record: dict[str, Any]

    def __len__(self) -> int:
        return len(self.params)


def read(
    path: str | Path,
    *,
    count: str = "total",
    flops: str = "auto",
    mapping: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    curves: bool = False,
    duplicates: str = "refuse",
) -> Points:
    """Return the rows of a table, or of all runs below a folder.

    A table (.csv, .parquet, .jsonl) must have the columns params, tokens and loss (nats
    per token); `mapping` ("params=N,tokens=D") takes others for them. Where parameters
    are counted in several ways, as params_COUNT, `count` chooses one. `flops` are
    the column of that name where there is one, else 6*params*tokens ("auto"), or the
    one ("exact": also flops_exact of a run table) or the other ("6nd") in any case.
    `exclude` leaves rows out by conditions ("outlier=1", "loss>6"). Unless `curves`,
    rows where a schedule had not ended are left out. `duplicates` decides on rows of
    the same params, tokens and loss. Raises UserError for what is missing, what cannot
    be, and for nothing left.
    """
    _check_options(count=count, flops=flops, duplicates=duplicates)
    path = Path(path).expanduser()
    cells = tables.read(path)
    renamed = _rename(cells, mapping)
    if cells.own:
        for found in set(cells.texts("format")):
            gathered.check_format(found, path)
    counted = _count_params(cells, count, renamed=renamed)
    cells.need(*NEEDED)
    rows = results.of(cells, curves=curves)
    flops_from = _count_flops(cells, flops)
    rows, excluded = _excluded(cells, rows, exclude)
    _check_numbers(cells, rows)
    if not cells.own:
        rows = _distinct(cells, rows, duplicates)
    budget, group = _budgets(cells, rows)
    run = cells.labels("run_id" if cells.own else "run", rows)
    values = {name: cells.floats(name)[rows] for name in (*NEEDED, "flops")}
    if not cells.own:  # which is known to be in units
        _note_units(cells, values)
    _note_flops(cells, values)
    used = {*NEEDED, "flops", "budget", "budget_flops", "group", "run", "is_final"}
    used |= set(renamed.values()) - renamed.keys()
    return Points(
        **values,
        cluster=results.trunks(cells)[rows] if cells.own else _clusters(group, run),
        is_final=cells.truths("is_final")[rows],
        run=run,
        budget=budget,
        extra={
            name: cells.floats(name)[rows]
            for name in cells.columns
            if name not in used and cells.is_numeric(name)
        },
        record={
            "path": str(path),
            "sha256": cells.sha256,
            "format": schema.FORMAT if cells.own else None,
            "rows_read": cells.rows_read,
            "rows": len(rows),
            "excluded": excluded,
            "mapping": renamed,
            "count": counted,
            "counts": _counts(cells, rows),
            "flops": flops_from,
            "curves": curves,
            "columns": cells.names,
            **cells.states,
            "notes": cells.notes,
        },
    )


# ---- what is chosen


def _check_options(**chosen: str) -> None:
    known = {"count": schema.COUNTS, "flops": FLOPS, "duplicates": DUPLICATES}
    for name, value in chosen.items():
        if value not in known[name]:
            raise unknown(name, value, known[name])


def _split(given: str | Iterable[str], name: str, form: str) -> list[tuple[str, ...]]:
    """Return the parts of conditions, given one by one or with commas between."""
    found = []
    for text in [given] if isinstance(given, str) else given:
        if not text.strip():
            continue
        pieces = [CONDITION.fullmatch(piece) for piece in text.split(",")]
        if not all(pieces):  # then the comma may be part of a value
            pieces = [CONDITION.fullmatch(text)]
        if not all(pieces):
            raise UserError(f"{name} must be {form}; got {text!r}.")
        found += [piece.groups() for piece in pieces]
    return found


def _rename(cells: Cells, mapping: str | Iterable[str]) -> dict[str, str]:
    """Take columns for others, as `mapping` says; return it by our names."""
    renamed = {}
    for ours, sign, theirs in _split(mapping, "a mapping", "params=COLUMN"):
        if sign != "=" or ours in renamed:
            raise UserError(
                f"a mapping must be NAME=COLUMN, once a name; got {ours}{sign}{theirs}."
            )
        if ours not in GIVEN and ours not in schema.COLUMNS:
            raise unknown("a mapped name", ours, {*GIVEN, *schema.COLUMNS})
        if theirs not in cells.columns:
            raise unknown(f"a mapped column of {cells.path}", theirs, cells.columns)
        renamed[ours] = theirs
    columns = dict(cells.columns)
    for ours, theirs in renamed.items():
        cells.take(ours, columns[theirs])
    return renamed


def _count_params(cells: Cells, count: str, renamed: dict[str, str]) -> str:
    """Choose the column `params`; return how it counts."""
    counted = f"params_{count}"
    if "params" not in renamed:
        is_only = "params" not in cells.columns and counted in cells.columns
        if cells.own or count != "total" or is_only:
            cells.need(counted)
            cells.take("params", cells.columns[counted])
            return count
    if count != "total":
        raise UserError(
            "count must be total where params is mapped, for the column says what it "
            f"counts; got {count}."
        )
    return "as given"


def _counts(cells: Cells, rows: np.ndarray) -> list[str]:
    """Return the counts of parameters that every row has."""
    return [
        count
        for count in schema.COUNTS
        if f"params_{count}" in cells.columns
        and np.isfinite(cells.floats(f"params_{count}")[rows]).all()
    ]


def _count_flops(cells: Cells, flops: str) -> str:
    """Choose or calculate the column `flops`; return where it is from."""
    if flops == "exact":
        name = "flops_exact" if cells.own else "flops"
        cells.need(name)
        cells.take("flops", cells.columns[name])
        return "exact" if cells.own else "column"
    if flops == "auto" and "flops" in cells.columns:
        return "column"
    with np.errstate(all="ignore"):  # what cannot be is told when all is there
        cells.take("flops", 6 * cells.floats("params") * cells.floats("tokens"))
    return "6ND"


def _excluded(
    cells: Cells, rows: np.ndarray, exclude: str | Iterable[str]
) -> tuple[np.ndarray, dict[str, int]]:
    """Return the rows that no condition meets, and how many each one left out."""
    counts = {}
    for name, sign, value in _split(exclude, "exclude", "COLUMN=VALUE, !=, > or <"):
        condition = f"{name}{sign}{value}"
        if name not in cells.columns:
            raise unknown(f"exclude's column in {cells.path}", name, cells.columns)
        met = cells.meets(name, sign, value)[rows]
        counts[condition] = counts.get(condition, 0) + int(met.sum())
        rows = rows[~met]
        if not counts[condition]:
            cells.notes.append(f"exclude {condition} met no row that was left")
    if not len(rows):
        raise UserError(
            f"exclude must leave rows of {cells.path}; got none left after "
            f"{', '.join(counts)}."
        )
    return rows, counts


# ---- what cannot be, and what is derived


def _check_numbers(cells: Cells, rows: np.ndarray) -> None:
    """Raise UserError for cells that are no numbers and for units that cannot be."""
    for name in (*NEEDED, "flops"):
        values = cells.floats(name)[rows]
        cells.demand(name, rows, np.isfinite(values), "a number")
    params, tokens = cells.floats("params")[rows], cells.floats("tokens")[rows]
    loss, flops = cells.floats("loss")[rows], cells.floats("flops")[rows]
    cells.demand("loss", rows, loss > 0, "above 0 nats per token")
    cells.demand("params", rows, params >= 1, "at least 1 (not in millions)")
    enough = tokens > 0 if cells.own else tokens >= params / 1000
    cells.demand("tokens", rows, enough, "at least params / 1000 (not in billions)")
    cells.demand("flops", rows, flops > 0, "above 0")


def _distinct(cells: Cells, rows: np.ndarray, duplicates: str) -> np.ndarray:
    """Return rows without, or refuse, those that say the same once more."""
    columns = [cells.floats(name)[rows].tolist() for name in NEEDED]
    for name in APART:
        if name in cells.columns:
            texts = cells.texts(name)
            columns.append([texts[i] for i in rows])
    keys = list(zip(*columns, strict=True))
    if len(set(keys)) == len(keys):
        return rows
    first: dict[tuple, int] = {}
    pairs = zip(keys, rows.tolist(), strict=True)
    again = [i for key, i in pairs if first.setdefault(key, i) != i]
    if duplicates == "refuse":
        raise UserError(
            f"{cells.path} must have each result once; got the params, tokens and loss "
            f"of earlier rows again at {cells.at(again)}. Mend it, or say "
            "--duplicates=drop or --duplicates=keep."
        )
    done = {"drop": "left out", "keep": "kept"}[duplicates]
    cells.notes.append(f"{len(again)} duplicate rows {done}")
    return rows if duplicates == "keep" else rows[~np.isin(rows, again)]


def _budgets(cells: Cells, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows' budgets [float] and group labels [str] that are none."""
    budget, labels = _budgets_of_groups(cells, rows), cells.labels("", rows)
    if budget is None:
        budget = np.full(len(rows), math.nan)
        labels = cells.labels("group", rows)
    for name in ("budget", "budget_flops"):
        if name in cells.columns:
            budget = cells.floats(name)[rows]
            fine = ~cells.strange(name)[rows] & ((budget > 0) | np.isnan(budget))
            cells.demand(name, rows, fine, "a number above 0, or empty")
            break
    return budget, labels


def _budgets_of_groups(cells: Cells, rows: np.ndarray) -> np.ndarray | None:
    """Return the budgets that groups are called by; None where they are labels."""
    if "group" not in cells.columns:
        return None
    groups = cells.texts("group")
    texts = [groups[row].strip().lower() for row in rows]
    found = [BUDGET.fullmatch(text) for text in texts]
    if not all(f or t in tables.NOTHING for f, t in zip(found, texts, strict=True)):
        return None
    budget = np.array([float(f[1]) if f else math.nan for f in found])
    return None if (budget < LEAST_BUDGET).any() else budget


def _clusters(group: np.ndarray, run: np.ndarray) -> np.ndarray:
    """Return the coarser labels that tell rows apart: groups, else runs."""
    return group if 1 < len(set(group)) < len(group) else run


def _note_flops(cells: Cells, values: dict[str, np.ndarray]) -> None:
    """Note FLOPs that are counted in another way than 6*params*tokens."""
    ratio = values["flops"] / (6 * values["params"] * values["tokens"])
    if abs(ratio - 1).max() > FLOPS_OFF:
        cells.notes.append(
            f"flops are {ratio.min():.3g} to {ratio.max():.3g} times 6*params*tokens"
        )


def _note_units(cells: Cells, values: dict[str, np.ndarray]) -> None:
    """Note numbers so small that they may be in other units."""
    if values["flops"].max() < FEW_FLOPS:
        cells.notes.append("flops are below 1e9: are params and tokens in millions?")
    elif values["params"].max() < 1000:
        cells.notes.append("params are below 1000: are they in millions?")
