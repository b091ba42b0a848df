"""Checkpoints through Orbax: asynchronous, sharded, restored on any mesh.

A checkpoint holds `params`, `ema` (where kept) and `optimizer` apart, so that the
weights alone can be read. Only this file knows Orbax.
"""

import errno
import logging
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from fm_jax.errors import UserError

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FULL_DISK_WORDS = ("No space left", "quota exceeded", "File too large")


class Checkpoints:
    """The checkpoints of one run, by step; the run itself `writes`, others read.

    Kept are the latest `keep`, the `keep_best` with the lowest eval/loss, and every
    multiple of `keep_every`.
    """

    def __init__(
        self,
        path: Path,
        *,
        writes: bool = False,
        keep: int = 1,
        keep_best: int = 0,
        keep_every: int = 0,
    ):
        policies = ocp.training.preservation_policies
        kept = [policies.LatestN(keep)]
        if keep_best:
            kept.append(
                policies.BestN(
                    get_metric_fn=lambda metrics: metrics["eval/loss"],
                    reverse=True,
                    n=keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        if keep_every:
            kept.append(policies.EveryNSteps(keep_every))
        # What Orbax would log of a failed save is raised here too, and said once.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self.path = path.absolute()
        self._orbax = ocp.training.Checkpointer(
            self.path,
            preservation_policy=policies.AnyPreservationPolicy(kept),
            # A reader must not take a save that is under way for a broken one.
            cleanup_tmp_directories=writes,
        )

    def steps(self) -> list[int]:
        """Return the steps that were saved whole, ascending."""
        return sorted(c.step for c in self._orbax.checkpoints)

    def save(self, step: int, parts: dict[str, Any], metrics: dict | None) -> None:
        """Begin to save `parts` (name to pytree) as `step`; returns before it ends.

        Raises UserError when this save or the one before it found no room on disk.
        """
        self.wait()
        try:
            # A copy: Orbax puts the metrics into the dict that it is given.
            self._orbax.save_checkpointables_async(
                step, dict(parts), force=True, metrics=metrics
            )
        except Exception as error:
            raise _explained(error, self.path) from error

    def wait(self) -> None:
        """Return when the last save is whole on disk."""
        try:
            self._orbax.wait()
        except Exception as error:
            raise _explained(error, self.path) from error

    def restore(self, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
        """Return the named parts of `step`, placed as the abstract leaves say."""
        if step not in self.steps():
            raise UserError(
                f"a step to read must be one of the saved steps {self.steps()} of "
                f"{self.path.parent}; got {step}."
            )
        return self._orbax.load_checkpointables(step, abstract)

    def best(self) -> int | None:
        """Return the step with the lowest eval/loss, or None if none was measured."""
        measured = {
            c.step: c.metrics["eval/loss"]
            for c in self._orbax.checkpoints
            if c.metrics and "eval/loss" in c.metrics
        }
        return min(measured, key=measured.get) if measured else None

    def close(self) -> None:
        """Wait for the last save and let go."""
        self.wait()
        self._orbax.close()


def choose(saved: Checkpoints, step: str, path: Path, thing: str = "--step") -> int:
    """Return the saved step that `step` names: a number, `latest` or `best`.

    Raises UserError, in which `thing` was given, when there is none.
    """
    steps = saved.steps()
    if not steps:
        raise UserError(f"a run must have a checkpoint to read; got none in {path}.")
    if step == "latest":
        return steps[-1]
    if step == "best":
        best = saved.best()
        if best is None:
            raise UserError(
                f"{thing}=best needs checkpoints with an evaluation; got "
                f"none in {path}. Set checkpoint.keep_best in training."
            )
        return best
    if not step.isdecimal():
        raise UserError(f"{thing} must be a number, latest or best; got {step!r}.")
    if int(step) not in steps:
        raise UserError(f"{thing} must be one of the saved steps {steps}; got {step}.")
    return int(step)


def abstract_of(tree: Any, shardings: Any) -> Any:
    """Return shapes and dtypes of `tree` with the places they shall be restored to."""
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        tree,
        shardings,
    )


def size_bytes(abstract: Any) -> int:
    """Return the bytes that a tree takes on disk, uncompressed."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract))


def _explained(error: Exception, path: Path) -> Exception:
    """Return the user's error for a full disk, else the error as it is."""
    chain, seen = error, []
    while chain is not None and chain not in seen:  # an error may be its own cause
        seen.append(chain)
        chain = chain.__cause__ or chain.__context__
    for one in seen:
        if getattr(one, "errno", None) in FULL_DISK or any(
            word in str(one) for word in FULL_DISK_WORDS
        ):
            return UserError(
                f"the disk must have room for a checkpoint; got none under {path}. The "
                "last good checkpoint stays. Free space or lower checkpoint.keep, then "
                "give the same command."
            )
    return error
