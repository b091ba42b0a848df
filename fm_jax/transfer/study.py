"""A study: one base, several methods of fine-tuning, each at several rates and seeds.

Every run is a real one in a folder of its own; what is done is not done again. A seed
gives all methods the same draw of data, the same order of it and the same first head.
The question, and the method lp_ft, are of Kumar et al. (arXiv 2202.10054).
"""

import contextlib
import copy
import dataclasses
import io
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fm_jax import configfile, durations
from fm_jax.errors import DivergedError, UserError
from fm_jax.runs import Run

METHODS = ("probe", "full", "bias", "lora", "lp_ft")
WITHOUT_RATE = ("probe",)  # its dial is the regularisation: it tries a path of them
KINDS = ("accuracy", "loss", "drift")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planned:
    """A run of a study: where it lies and the config that it is made from."""

    method: str
    rate: float | None
    seed: int
    folder: Path
    raw: dict

    @property
    def name(self) -> str:
        """What a person calls it."""
        rate = "" if self.rate is None else f", rate {self.rate:g}"
        return f"{self.method}{rate}, seed {self.seed}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """What a run came to, `{"valid": ...}` by held-out file; a loss is in nats.

    The drift is how far features moved from the base's, relative to their size; it has
    no file where the run says nothing of it.
    """

    method: str
    rate: float | None
    seed: int
    accuracy: dict[str, float]
    loss: dict[str, float]
    drift: dict[str, float]


def plan(
    raw: dict,
    folder: Path,
    *,
    methods: Sequence[str],
    rates: Sequence[float],
    seeds: Sequence[int],
    data_of: Callable[[int], Mapping] = lambda seed: {},
) -> list[Planned]:
    """Return the runs of a study, seed by seed, so that half of them are a study too.

    raw: the config of all of them. data_of: a seed's own keys of the data section.
    """
    found = []
    for seed in seeds:
        for method in methods:
            for rate in (None,) if method in WITHOUT_RATE else rates:
                made = copy.deepcopy(raw)
                made["finetune"]["method"] = method
                made["train"]["seed"] = seed
                # The last evaluation is all that is read.
                made["eval"]["every"] = made["checkpoint"]["every"] = 0
                made["data"] |= data_of(seed)
                if rate is not None:
                    made["optimizer"]["learning_rate"] = rate
                parts = method, *(() if rate is None else (f"rate_{rate:g}",))
                place = Path(folder, *parts, f"seed_{seed}")
                found.append(
                    Planned(method=method, rate=rate, seed=seed, folder=place, raw=made)
                )
    return found


def run(
    planned: Sequence[Planned],
    *,
    names: Sequence[str],
    train: Callable[[dict, Path], object],
    say: Callable[[str], None],
) -> list[Found]:
    """Make the runs that are not done; return what all came to but the diverged.

    train(raw, folder) makes one; what it prints is left to its log. names: of the
    held-out files. Raises UserError where a folder holds a run of another config.
    """
    waiting = [one for one in planned if not _is_over(one)]
    if len(waiting) < len(planned):
        say(f"{len(planned) - len(waiting)} of {len(planned)} runs were done before")
    began = time.monotonic()
    for number, one in enumerate(waiting, 1):
        started = time.monotonic()
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                train(one.raw, one.folder)
            came = _shown(read(one, names))
        except DivergedError as error:
            came = f"diverged ({error})"
        now = time.monotonic()
        left = (now - began) / number * (len(waiting) - number)
        say(
            f"[{number}/{len(waiting)}] {one.name}: {came}; {now - started:.1f} s, "
            f"left about {durations.clock(left)}"
        )
    return [read(one, names) for one in planned if Run(one.folder).is_done()]


def read(planned: Planned, names: Sequence[str]) -> Found:
    """Return what a finished run says of each held-out file.

    Raises UserError where it lacks the accuracy or the loss of one.
    """
    last: dict[str, float] = {}
    for row in Run(planned.folder).rows():
        last |= {n: x for n, x in row.items() if n.startswith(("final/", "eval/"))}
    numbers = {
        kind: {n: x for n in names if (x := _of(last, kind, n, names)) is not None}
        for kind in KINDS
    }
    for kind in ("accuracy", "loss"):
        if missing := [name for name in names if name not in numbers[kind]]:
            raise UserError(
                f"a run of the study must have final/{kind}/{missing[0]}; got none in "
                f"{planned.folder}. Remove that folder to make it again."
            )
    return Found(method=planned.method, rate=planned.rate, seed=planned.seed, **numbers)


def choose(found: Sequence[Found], name: str) -> dict[str, dict[int, Found]]:
    """Return each method's run of each seed, of the rate that is best on file `name`.

    That is the highest accuracy there, of equal ones the lowest loss there, then the
    lowest rate: no other file is looked at.
    """
    chosen: dict[str, dict[int, Found]] = {}
    for one in found:
        of_method = chosen.setdefault(one.method, {})
        if one.seed not in of_method or _merit(one, name) > _merit(
            of_method[one.seed], name
        ):
            of_method[one.seed] = one
    return chosen


def _merit(found: Found, name: str) -> tuple[float, float, float]:
    return found.accuracy[name], -found.loss[name], -(found.rate or 0.0)


def _of(last: Mapping, kind: str, name: str, names: Sequence[str]) -> float | None:
    """Return a metric of one held-out file: of the only one it has no name."""
    keys = [f"{kind}/{name}", *([kind] if len(names) == 1 else [])]
    for key in keys:
        for split in ("final", "eval"):
            if f"{split}/{key}" in last:
                return last[f"{split}/{key}"]
    return None


def _is_over(planned: Planned) -> bool:
    """Return whether a run came to its end, or diverged: it would again."""
    run = Run(planned.folder)
    if not run.exists():
        return False
    there = configfile.read_run(run)["config"]
    changed = {
        key: pair
        for key, pair in configfile.difference(there, planned.raw).items()
        if not configfile.may_change(key)
        or key in (*configfile.DURATION_KEYS, "init.from")
    }
    if changed:
        shown = "; ".join(
            f"{key}: {old!r} there, {new!r} here" for key, (old, new) in changed.items()
        )
        raise UserError(
            f"--out must hold the runs of this study alone; got {planned.folder}, made "
            f"with other values: {shown}. Choose another --out."
        )
    return run.is_done() or _diverged(run)


def _diverged(run: Run) -> bool:
    file = run.path / "FAILED"
    return file.exists() and file.read_text().startswith(DivergedError.__name__)


def _shown(found: Found) -> str:
    return ", ".join(f"{name} {x:.1%}" for name, x in found.accuracy.items())
