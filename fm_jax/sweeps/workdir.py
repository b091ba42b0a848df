"""A sweep's folder: its plan, written once and gone on with, and what its runs took."""

import json
from collections.abc import Sequence
from pathlib import Path

from fm_jax import configfile, jsonfiles, machine
from fm_jax.errors import UserError
from fm_jax.runs import Run
from fm_jax.sweeps import costs, lines, plans, variants
from fm_jax.sweeps.plans import Planned
from fm_jax.sweeps.sweep import Sweep
from fm_jax.sweeps.variants import Variants
from fm_jax.tables.rows import SWEEP_FILE

FORMAT = 1
PLAN = "sweep.json"
FOLDERS = ("configs", "logs", "runs")
OWN_NAMES = (".lock", *FOLDERS, SWEEP_FILE)  # what a cut-off start leaves
NUM_SHOWN = 6  # differences in the message about another sweep's folder


def run_path(folder: Path, name: str) -> Path:
    """Return the run folder of a planned run."""
    return folder / "runs" / name


def config_of(folder: Path, one: Planned) -> dict:
    """Return the config of a planned run, which begins where its parent lies here."""
    config = {section: dict(keys) for section, keys in one.config.items()}
    if one.parent:
        config["init"]["from"] = f"{run_path(folder, one.parent)}@{one.branch_step}"
    return config


def write(asked: Sweep | Variants, folder: Path) -> list[Planned]:
    """Write sweep.json and sweep.jsonl into `folder`, make FOLDERS; return the runs.

    A folder with a plan is gone on with when every run of it is in this plan too.
    Raises UserError when it is not, or the folder holds something else.
    """
    runs = planned(asked, folder)
    make(folder)
    write_plan(asked, folder, runs)
    return runs


def make(folder: Path) -> None:
    """Make a sweep's folder and FOLDERS in it; raises UserError where it cannot."""
    for name in FOLDERS:
        try:
            (folder / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{folder / name} must be a folder or free to be one; got "
                f"{error.strerror}. Move it, or choose another --workdir."
            ) from error


def write_plan(asked: Sweep | Variants, folder: Path, runs: Sequence[Planned]) -> None:
    """Write sweep.json and sweep.jsonl."""
    record = {"format": FORMAT, "sweep": asked.raw, "versions": machine.versions()}
    # The names before the plan that lets them stand.
    lines.write(folder, runs)
    Run(folder).write(PLAN, json.dumps(record, indent=1) + "\n")


def planned(
    asked: Sweep | Variants, folder: Path, *, must_be_free: bool = True
) -> list[Planned]:
    """Return the plan of a sweep with the names that it has, or would get, in `folder`.

    Raises UserError as `write` does; writes nothing. must_be_free: a new folder may
    hold nothing else.
    """
    plan = variants.plan if isinstance(asked, Variants) else plans.plan
    old = {"sweep": asked.raw}  # of a file that came alone nothing else is known
    if (folder / PLAN).exists():
        old, records = read(folder)
    elif must_be_free or not (folder / SWEEP_FILE).exists():
        if must_be_free:
            _check_free(folder)
        return plan(asked)
    else:
        records = list(lines.rows(folder))
    runs = plan(asked, earlier=records)
    here = {one.hash for one in runs}
    lost = [record["name"] for record in records if record["hash"] not in here]
    if lost:
        raise UserError(
            f"--workdir or --out must be this sweep's; got {folder}, of whose "
            f"{len(records)} runs {len(lost)} are not planned here, as {lost[0]} "
            f"({_changed(old['sweep'], asked.raw)}). Choose another."
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
    return plan, list(lines.rows(folder))


def finished(folder: Path, runs: Sequence[Planned]) -> list[costs.Measured]:
    """Return what the runs of `folder` that came to their end took."""
    found = []
    for one in runs:
        run = Run(run_path(folder, one.name))
        if one.tokens and one.is_done(run):
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
    if shown or old.keys() == {"base"}:
        return "; ".join(shown) or "the same config with other values"
    return "the same config, planned by another version"
