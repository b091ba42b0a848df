"""A user's own law: the Python file that says it, read and tried."""

import dataclasses
import importlib.util
import inspect
import pathlib
from collections.abc import Callable, Mapping

import numpy as np

from fm_jax.errors import UserError

# How a parameter is fitted: a positive one as its logarithm, one of zero or more as it
# is (so that it can reach zero), one of either sign as it is.
SCALES = ("log", "linear", "signed")


@dataclasses.dataclass(frozen=True)
class LawFile:
    """What a file defines: NAMES, loss, and perhaps COLUMNS, SCALES and START."""

    path: pathlib.Path
    names: tuple[str, ...]
    loss: Callable  # (theta, *columns) -> loss, where theta has a row for each name
    columns: tuple[str, ...]
    scales: Mapping[str, str]
    start: np.ndarray | None  # [S, P]


def read(path: pathlib.Path) -> LawFile:
    """Return what a law's file defines; raise UserError for whatever is wrong with it.

    NAMES is a tuple of parameter names; `loss(theta, params, tokens)` gets an array for
    each name, all of which broadcast against the columns. COLUMNS names what loss takes
    after theta, SCALES gives parameters a scale of SCALES (log unless said), and START
    is one or more guesses with a value for each name.
    """
    module = _run(path)
    names = getattr(module, "NAMES", None)
    listed = isinstance(names, tuple | list) and len(names) > 0
    if not listed or not all(isinstance(n, str) and n.isidentifier() for n in names):
        demand, way_out = (
            "define NAMES, a tuple of names",
            'NAMES = ("E", "A", "alpha")',
        )
        raise _refused(path, demand, names, f"For example {way_out}.")
    if len(set(names)) < len(names):
        raise _refused(path, "name each parameter once", names, "Rename one of NAMES.")
    columns = getattr(module, "COLUMNS", ("params", "tokens"))
    if not isinstance(columns, tuple | list) or not all(
        isinstance(column, str) for column in columns
    ):
        way_out = 'For example COLUMNS = ("params", "tokens", "unique_tokens").'
        raise _refused(path, "give COLUMNS as a tuple of names", columns, way_out)
    example = f"Write def loss({', '.join(['theta', *columns])})."
    loss = getattr(module, "loss", None)
    if not callable(loss):
        raise _refused(path, "define a function loss", loss, example)
    try:
        inspect.signature(loss).bind("theta", *columns)
    except TypeError as error:
        found = f"loss{inspect.signature(loss)}"
        demand = "take theta and the COLUMNS in loss"
        raise _refused(path, demand, found, example) from error
    scales = getattr(module, "SCALES", {})
    known = isinstance(scales, dict) and set(scales) <= set(names)
    if not known or not all(scale in SCALES for scale in scales.values()):
        demand = "give SCALES as a dict of some of NAMES"
        raise _refused(path, demand, scales, f"Each is one of {', '.join(SCALES)}.")
    start = _start(path, names, scales, getattr(module, "START", None))
    found = LawFile(path, tuple(names), loss, tuple(columns), scales, start)
    _try(found)
    return found


def _refused(path: pathlib.Path, demand: str, got: object, way_out: str) -> UserError:
    """Return the error of one line that a file's mistake ends in."""
    got = " ".join((got if isinstance(got, str) else repr(got)).split())
    return UserError(f"law file {path} must {demand}; got {got}. {way_out}")


def _run(path: pathlib.Path) -> object:
    """Return the module of a file that was run."""
    if not path.is_file():
        raise _refused(path, "exist", "no such file", "Check the path.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
        raise _refused(path, "run", found, "Mend the file.") from error
    return module


def _start(
    path: pathlib.Path, names: tuple, scales: Mapping[str, str], start: object
) -> np.ndarray | None:
    """Return the guesses `[S, P]` of a file, None where it gives none."""
    if start is None:
        return None
    way_out = f"Give a value for each of {', '.join(names)}."
    try:
        guesses = np.atleast_2d(np.asarray(start, np.float64))
    except (TypeError, ValueError, OverflowError) as error:
        raise _refused(path, "give START as numbers", start, way_out) from error
    if guesses.ndim > 2 or guesses.shape[1] != len(names):
        demand = f"give {len(names)} numbers for each guess of START"
        raise _refused(path, demand, start, way_out)
    least = {"log": np.nextafter(0, 1), "linear": 0.0, "signed": -np.inf}
    if not np.isfinite(guesses).all() or any(
        (guesses[:, i] < least[scales.get(name, "log")]).any()
        for i, name in enumerate(names)
    ):
        demand = "give finite values in START, above 0 where the scale is log"
        raise _refused(path, demand, start, 'SCALES = {NAME: "signed"} frees a sign.')
    return guesses


def _try(file: LawFile) -> None:
    """Call the law of a file on a batch of two thetas and three points."""
    guess = np.ones(len(file.names)) if file.start is None else file.start[0]
    theta = np.repeat(guess[:, None, None], 2, axis=1)
    columns = [np.array([1e8, 3e8, 9e8])] * len(file.columns)
    way_out = "Use NumPy functions, which work on arrays."
    try:
        with np.errstate(all="ignore"):
            found = np.asarray(file.loss(theta, *columns))
    except Exception as error:
        got = f"{type(error).__name__}: {error}"
        demand = "work on arrays in loss"
        raise _refused(file.path, demand, got, way_out) from error
    if found.shape != (2, 3) or found.dtype.kind != "f":
        got = f"shape {found.shape} of {found.dtype} for theta (P, 2, 1), columns (3,)"
        demand = "return a float for each theta and point"
        raise _refused(file.path, demand, got, way_out)
