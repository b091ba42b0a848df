"""Weights & Biases, in the process of its own that a tracker has."""

import os
from typing import Any

from fm_jax.trackers import rows as metrics

EXITS = {"finished": 0, "failed": 1, "preempted": 75}


def open_run(told: dict[str, Any]) -> "Wandb":
    """Return the W&B run, gone on with where there is one; told: see `named.told`."""
    return Wandb(told)


class Wandb:
    """Logs rows over the metric `step`, and of the machine and the code nothing.

    W&B takes no point back: steps that a run takes again are there twice.
    """

    def __init__(self, told: dict[str, Any]):
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self._end_all = wandb.teardown
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "fm_jax",
            id=told["id"],
            name=told["name"],
            config=told["config"],
            allow_val_change=True,
            resume="allow",
            dir=os.environ.get("WANDB_DIR") or told["path"],
            settings=wandb.Settings(
                console="off",
                disable_git=True,
                save_code=False,
                x_disable_meta=True,
                x_disable_stats=True,
                x_disable_machine_info=True,
                x_save_requirements=False,
            ),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def rows(self, rows: list[tuple[float, dict[str, Any]]]) -> None:
        """Log each row at its step; pairs of a time and a row."""
        for _, row in rows:
            if found := metrics.scalars(row):
                self._run.log(found | {"step": row["step"]})

    def went_on_from(self, step: int) -> None:
        """Note from which step the run went on last."""
        self._run.summary["went_on_from"] = step

    def close(self, status: str) -> None:
        """Finish the run with its status, when all is uploaded."""
        if status == "preempted":
            self._run.mark_preempting()
        self._run.finish(exit_code=EXITS[status])
        self._end_all(EXITS[status])
