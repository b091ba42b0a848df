"""A sweep's folder: its plan, written once and gone on with, and what its runs took."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from fm_jax import configfile, jsonfiles, machine
from fm_jax.errors import UserError
from fm_jax.runs import Run
from fm_jax.sweeps import costs, plans
from fm_jax.sweeps.plans import Planned
from fm_jax.sweeps.sweep import Sweep

FORMAT = 1
PLAN, RUNS = "sweep.json", "sweep.jsonl"
FOLDERS = ("configs", "logs", "runs")
OWN_NAMES = (".lock", *FOLDERS, RUNS)  # what a cut-off start leaves
# Of a line of sweep.jsonl, what names folders and what a run is known again by.
LINE = {"name": str, "hash": str}
NAME = re.compile(r"\d{1,9}-[A-Za-z0-9][A-Za-z0-9.+-]{0,99}")
NUM_SHOWN = 6  # differences in the message about another sweep's folder


def run_path(folder: Path, name: str) -> Path:
    """Return the run folder of a planned run."""
    return folder / "runs" / name


def write(sweep: Sweep, folder: Path) -> list[Planned]:
    """Write sweep.json and sweep.jsonl into `folder`, make FOLDERS; return the runs.

    A folder with a plan is gone on with when every run of it is in this plan too.
    Raises UserError when it is not, or the folder holds something else.
    """
    runs = planned(sweep, folder)
    record = {"format": FORMAT, "sweep": sweep.raw, "versions": machine.versions()}
    for name in FOLDERS:
        try:
            (folder / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{folder / name} must be a folder or free to be one; got "
                f"{error.strerror}. Move it, or choose another --workdir."
            ) from error
    ordered = sorted(runs, key=lambda one: one.index)
    lines = [json.dumps(vars(one)) + "\n" for one in ordered]
    # The names before the plan that lets them stand.
    Run(folder).write(RUNS, "".join(lines))
    Run(folder).write(PLAN, json.dumps(record, indent=1) + "\n")
    return runs


def planned(sweep: Sweep, folder: Path) -> list[Planned]:
    """Return the plan of a sweep with the names that it has, or would get, in `folder`.

    Raises UserError as `write` does; writes nothing.
    """
    if not (folder / PLAN).exists():
        _check_free(folder)
        return plans.plan(sweep)
    old, records = read(folder)
    runs = plans.plan(sweep, earlier=records)
    here = {one.hash for one in runs}
    lost = [record["name"] for record in records if record["hash"] not in here]
    if lost:
        raise UserError(
            f"--workdir must be this sweep's; got {folder}, of whose {len(records)} "
            f"runs {len(lost)} are not planned here, as {lost[0]} "
            f"({_changed(old['sweep'], sweep.raw)}). Choose another --workdir."
        )
    return runs


def read(folder: Path) -> tuple[dict, list[dict]]:
    """Return sweep.json and the records of sweep.jsonl of a sweep's folder.

    Raises UserError when there is none.
    """
    if not (folder / PLAN).exists():
        raise UserError(
            f"--workdir must be a sweep's folder with {PLAN}; got {folder}. "
            "fm sweep --config=... --workdir=... makes one."
        )
    plan = configfile.read_json(folder / PLAN)
    jsonfiles.check(plan, {"sweep": dict}, f"{folder / PLAN}")
    records = list(Run(folder).rows(RUNS, form=LINE))
    for record in records:
        if not NAME.fullmatch(record["name"]):
            raise UserError(
                f"{folder / RUNS} must name runs as 000-n1.2e6-d3e7-s0, their folders; "
                f"got {record['name'][:40]!r}. Choose another --workdir."
            )
    return plan, records


def finished(folder: Path, runs: Sequence[Planned]) -> list[costs.Measured]:
    """Return what the runs of `folder` that came to their end took."""
    found = []
    for one in runs:
        run = Run(run_path(folder, one.name))
        if run.done_step() == one.steps:
            per_token = one.flops_exact / one.tokens
            found.append(costs.measured(run.path, one.params["total"], per_token))
    return [one for one in found if one is not None]


def _check_free(folder: Path) -> None:
    """Raise UserError when a folder without a plan holds something else."""
    if not folder.exists():
        return
    if folder.is_dir() and all(
        file.name in OWN_NAMES or file.name.endswith(".writing")
        for file in folder.iterdir()
    ):
        return
    raise UserError(
        f"--workdir must be a sweep or an empty folder; got {folder}, which holds "
        "something else. Choose another folder."
    )


def _changed(old: dict, new: dict) -> str:
    """Return in words how two sweeps differ in what their runs follow from."""
    shown = [
        f"{key}: {was!r} there, {now!r} here"
        for key, (was, now) in configfile.difference(old, new).items()
        if key == "base.init.from"
        or not configfile.may_change(key.removeprefix("base."))
    ]
    if len(shown) > NUM_SHOWN:
        shown[NUM_SHOWN:] = [f"and {len(shown) - NUM_SHOWN} more"]
    return "; ".join(shown) or "the same config, planned by another version"
