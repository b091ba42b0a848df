"""Cells: a table as it was read, from a file of any kind or from a folder of runs."""

import csv
import dataclasses
import hashlib
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fm_jax.errors import UserError
from fm_jax.tables import rows, schema

ALIASES = {  # suggested where a column is missing, never taken
    "params": "n num_params n_params nparams parameters params_total model_size size",
    "tokens": "d num_tokens n_tokens ntokens train_tokens training_tokens data",
    "loss": "l val_loss eval_loss valid_loss validation_loss test_loss final_loss",
    "flops": "c compute num_flops n_flops train_flops training_flops",
}
NOTHING = ("", "none", "nan", "null")  # what a label says where there is none
COMPARE = {
    ">": np.greater,
    "<": np.less,
    ">=": np.greater_equal,
    "<=": np.less_equal,
}


@dataclasses.dataclass
class Cells:
    """Text, numbers, truths or None by column, and what became of the runs they tell.

    `places` says where each row stands, `names` how the table calls its columns.
    """

    path: Path
    columns: dict[str, Sequence]
    places: list[str]
    sha256: str
    rows_read: int
    states: dict[str, Any] = dataclasses.field(
        default_factory=lambda: {
            "diverged": [],
            "failed": [],
            "running": 0,
            "unstarted": 0,
        }
    )

    def __post_init__(self):
        self.names = list(self.columns)
        self.notes: list[str] = []
        self._read: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._texts: dict[str, list[str]] = {}

    @property
    def own(self) -> bool:
        """Whether this is a run table (schema.py), in whatever kind of file."""
        return {"format", "run_id", "status", "step"} <= self.columns.keys()

    def take(self, name: str, column: Sequence) -> None:
        """Put a column in the place of the one of that name, if any."""
        self.columns[name] = column
        self._read.pop(name, None)
        self._texts.pop(name, None)

    def need(self, *names: str) -> None:
        """Raise UserError unless columns are there; say which may be meant."""
        missing = [name for name in names if name not in self.columns]
        if missing:
            found = ", ".join(map(_shown, self.names[:20])) or "none"
            likely = ",".join(f"{name}={self._likely(name)}" for name in missing)
            raise UserError(
                f"{self.path} must have the columns {', '.join(names)}; got {found}. "
                f"Say which is meant: --map={likely}"
            )

    def _likely(self, name: str) -> str:
        alike = [name, *ALIASES.get(name, "").split()]
        return next((c for c in self.names if c.lower() in alike), "COLUMN")

    def floats(self, name: str) -> np.ndarray:
        """Return a column as numbers: NaN where empty or no number."""
        if name not in self._read:
            self._read[name] = _numbers(self.columns[name])
        return self._read[name][0]

    def strange(self, name: str) -> np.ndarray:
        """Return where a column holds something that is no number."""
        self.floats(name)
        return self._read[name][1]

    def is_numeric(self, name: str) -> bool:
        """Return whether a column is one of numbers; a run table knows its own."""
        if name in schema.WRITTEN and self.own:
            return schema.WRITTEN[name][0] in (int, float)
        return not self.strange(name).any() and not np.isnan(self.floats(name)).all()

    def texts(self, name: str) -> list[str]:
        """Return a column as text: "" where empty."""
        if name not in self._texts:
            self._texts[name] = [_text(cell) for cell in self.columns[name]]
        return self._texts[name]

    def labels(self, name: str, chosen: np.ndarray) -> np.ndarray:
        """Return labels [str] of rows, different ones where there is none."""
        made = [f"row {i + 1}" for i in chosen]
        if name in self.columns:
            texts = self.texts(name)
            said = (texts[i] for i in chosen)
            pairs = zip(said, made, strict=True)
            made = [own if text.lower() in NOTHING else text for text, own in pairs]
        return np.array(made, dtype=np.str_)

    def meets(self, name: str, sign: str, value: str) -> np.ndarray:
        """Return which rows [bool] meet a condition; no empty cell is above or below.

        Raises UserError where a column of numbers is to be compared with another thing.
        """
        column, (number,) = self.floats(name), _numbers([value])[0]
        if sign in COMPARE:
            met, wrong = COMPARE[sign](column, number), math.isnan(number)
        else:
            same = np.array(self.texts(name), dtype=np.str_) == value
            same |= column == number
            met = same if sign == "=" else ~same
            wrong = value and math.isnan(number) and not same.any()
            wrong = wrong and self.is_numeric(name)
        if wrong:
            raise UserError(
                f"exclude must compare {name} with a number; got {value!r}."
            )
        return met

    def truths(self, name: str) -> np.ndarray:
        """Return a column of true and false [bool]: False where empty, else as said.

        All are true where there is no such column.
        """
        if name not in self.columns:
            return np.ones(len(self.places), bool)
        texts = np.array([text.lower() for text in self.texts(name)], dtype=np.str_)
        yes = np.isin(texts, ("true", "1", "1.0"))
        known = yes | np.isin(texts, ("false", "0", "0.0", ""))
        self.demand(name, np.arange(len(texts)), known, "true or false")
        return yes

    def demand(
        self, name: str, chosen: np.ndarray, holds: np.ndarray, demand: str
    ) -> None:
        """Raise UserError that names the first of `chosen` where a demand fails."""
        wrong = chosen[~np.asarray(holds, bool)]  # of no rows a list is of floats
        if len(wrong):
            cell = _text(self.columns[name][wrong[0]])
            raise UserError(
                f"{name} must be {demand}; got {_shown(cell) if cell else 'nothing'} "
                f"at {self.at(wrong)} of {self.path}. Mend the table, or exclude rows."
            )

    def at(self, chosen: Sequence[int]) -> str:
        """Return where rows stand, the first few of them."""
        more = f" and {len(chosen) - 3} more" if len(chosen) > 3 else ""
        return ", ".join(self.places[i] for i in chosen[:3]) + more


def read(path: Path) -> Cells:
    """Read a .csv, .jsonl or .parquet file, or all runs below a folder.

    Raises UserError for a file of another kind, one that cannot be read, one without
    rows, and a folder without runs.
    """
    if path.is_dir():
        return _of_folder(path)
    readers = {".csv": _of_csv, ".jsonl": _of_jsonl, ".parquet": _of_parquet}
    if path.suffix.lower() not in readers:
        raise UserError(
            f"a table must be {', '.join(readers)} or a folder of runs; got {path}"
            f"{'' if path.exists() else ', which is not there'}."
        )
    raw = rows.read_bytes(path)
    names, columns, places = readers[path.suffix.lower()](raw, path)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(
            f"{path} must name each column once; got {_shown(twice[0])} twice."
        )
    if not places:
        raise UserError(f"{path} must have rows; got none.")
    cells = dict(zip(names, columns, strict=True))
    return Cells(path, cells, places, hashlib.sha256(raw).hexdigest(), len(places))


def _of_folder(path: Path) -> Cells:
    found = rows.collect(path)
    if not (found.rows or found.failed or found.begun or found.unstarted):
        raise UserError(
            f"{path} must hold runs; got none with {schema.FILE} below it. "
            "A table is given as a file."
        )
    return Cells(
        path,
        {name: [row[name] for row in found.rows] for name in schema.WRITTEN},
        [f"step {row['step']} of {row['name']}" for row in found.rows],
        found.sha256,
        found.rows_read,
        {
            "diverged": [],
            "failed": found.failed,
            "running": found.begun,
            "unstarted": found.unstarted,
        },
    )


def _of_csv(raw: bytes, path: Path) -> tuple[list[str], list, list[str]]:
    text = io.StringIO(rows.text_of(raw, path), newline="")
    reader = csv.reader(text, strict=True)
    lines, places = [], []
    try:
        for line in reader:
            if line:
                lines.append(line)
                places.append(f"line {reader.line_num}")
    except csv.Error as error:
        raise UserError(
            f"{path} must be a table in CSV; got {error} in line {reader.line_num}."
        ) from error
    if not lines:
        raise UserError(f"{path} must have a line of names and rows; got nothing.")
    names = [name.strip() for name in lines[0]]
    if len(names) == 1 and (sign := re.search(r"[;\t]", names[0])):
        raise UserError(
            f"{path} must have commas between its cells; got {sign[0]!r}. "
            "Save it with commas."
        )
    for line, place in zip(lines, places, strict=True):
        if len(line) != len(names):
            raise UserError(
                f"{path} must have the {len(names)} cells of its first line in each; "
                f"got {len(line)} in {place}."
            )
    columns = list(zip(*lines[1:], strict=True)) or [()] * len(names)
    return names, columns, places[1:]


def _of_jsonl(raw: bytes, path: Path) -> tuple[list[str], list, list[str]]:
    found = list(rows.objects(raw, path))
    names = list(dict.fromkeys(name for _, row in found for name in row))
    columns = [[row.get(name) for _, row in found] for name in names]  # None: no cell
    return names, columns, [f"line {number}" for number, _ in found]


def _of_parquet(raw: bytes, path: Path) -> tuple[list[str], list, list[str]]:
    pyarrow, parquet = rows.arrow(path)
    try:
        found = parquet.read_table(pyarrow.BufferReader(raw))
        names, columns = found.column_names, [c.to_pylist() for c in found.columns]
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} must be a Parquet file; got {reason}") from error
    return names, columns, [f"row {i + 1}" for i in range(found.num_rows)]


def _numbers(column: Sequence) -> tuple[np.ndarray, np.ndarray]:
    """Return a column as float64, and where it holds something else."""
    if isinstance(column, np.ndarray):
        return column, np.zeros(len(column), bool)
    if len(column) > 1 and column.count(column[0]) == len(column):  # many are constant
        value, strange = _numbers(column[:1])
        return np.repeat(value, len(column)), np.repeat(strange, len(column))
    for cells in (column, [None if cell == "" else cell for cell in column]):
        try:
            values = np.array(cells, dtype=np.float64)
        except (ValueError, TypeError, OverflowError):
            continue
        if values.ndim == 1:
            return values, np.zeros(len(values), bool)
    pairs = [_number(cell) for cell in column]
    return np.array([v for v, _ in pairs]), np.array([s for _, s in pairs])


def _number(cell: Any) -> tuple[float, bool]:
    """Return a cell as a number, NaN where it is none, and whether it is something."""
    try:
        return float(cell), False
    except OverflowError:
        return math.inf, False
    except (ValueError, TypeError):
        return math.nan, bool(_text(cell))


def _text(cell: Any) -> str:
    if isinstance(cell, str):
        return cell.strip()
    if cell is None:
        return ""
    return str(cell).lower() if isinstance(cell, bool) else str(cell)


def _shown(text: str) -> str:
    short = text if len(text) <= 40 else text[:37] + "..."
    return short if short.isprintable() and short == short.strip() else repr(short)
