"""Checkpoints through Orbax: asynchronous, sharded, restored on any mesh.

A checkpoint holds `params`, `ema` (where kept) and `optimizer` apart, so that the
weights alone can be read, and a digest of each leaf, for Orbax itself does not see a
flipped bit. Only this file knows Orbax.
"""

import contextlib
import errno
import json
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from fm_jax import digests
from fm_jax.cluster import together
from fm_jax.errors import DamagedError, UserError, reason

METADATA = "_CHECKPOINT_METADATA"  # a step's file of what Orbax keeps beside arrays
DIGESTS = "digests"  # in it: path to digest
# What Orbax and what it reads with raise where files are cut short, gone or not theirs.
READ_ERRORS = (ValueError, KeyError, OSError, TypeError)
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
        self._saving: threading.Thread | None = None
        self._error: Exception | None = None
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
        `has_failed` becomes true as soon as this one fails.
        """
        self.wait()
        # Before Orbax copies: the digests are of what is on the devices.
        told = {DIGESTS: digests.of(parts)}
        try:
            # A copy: Orbax puts the metrics into the dict that it is given.
            begun = self._orbax.save_checkpointables_async(
                step, dict(parts), force=True, metrics=metrics, custom_metadata=told
            )
        except Exception as error:
            raise _explained(error, self.path) from error
        self._saving = threading.Thread(target=self._await, args=(begun,), daemon=True)
        self._saving.start()

    def _await(self, begun: Any) -> None:
        # A save whose result nobody takes keeps its thread and three open files.
        try:
            begun.result()
        except Exception as error:
            self._error = error

    @property
    def has_failed(self) -> bool:
        """Whether the last save has failed; `wait` says why, once."""
        return self._error is not None

    def wait(self) -> None:
        """Return when the last save is whole on disk."""
        if self._saving is not None:
            self._saving.join()
        error, self._error, self._saving = self._error, None, None
        if error is not None:
            with contextlib.suppress(Exception):  # it tells each thread once
                self._orbax.wait()
            raise _explained(error, self.path) from error

    def restore(self, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
        """Return the named parts of `step`, placed as the abstract leaves say.

        Raises UserError where there is no such step, and DamagedError where its files
        cannot be read or what they hold is not what was saved. Steps that were saved
        before there were digests are taken as they are read.
        """
        if step not in self.steps():
            raise UserError(
                f"a step to read must be one of the saved steps {self.steps()} of "
                f"{self.path.parent}; got {step}."
            )
        before, found, error = self.digests(step), {}, None
        try:
            found = self._orbax.load_checkpointables(step, abstract)
        except READ_ERRORS as caught:
            error = caught
        # What one process cannot read the others could not add up with it.
        if together.any_of(error is not None):
            why = reason(error) if error else "another process cannot read its part"
            raise DamagedError(self.path / str(step), why) from error
        if others := digests.changed(before, digests.of(found)):
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            raise DamagedError(
                self.path / str(step), f"{others[0]}{more} is not what was saved"
            )
        return found

    def digests(self, step: int) -> dict[str, int]:
        """Return the digests of a step by path; {} where it was saved without.

        Raises DamagedError where they cannot be read.
        """
        try:
            told = self._orbax.checkpointables_metadata(step).custom_metadata
        except READ_ERRORS as error:
            raise DamagedError(self.path / str(step), reason(error)) from error
        return (told or {}).get(DIGESTS, {})

    def sign(self, step: int, found: dict[str, int]) -> None:
        """Give a saved step other digests: its arrays were written by other means."""
        file = self.path / str(step) / METADATA
        told = json.loads(file.read_text())
        told["custom_metadata"] = {DIGESTS: found}
        beside = file.with_name(f".{METADATA}.writing")
        beside.write_text(json.dumps(told))
        os.replace(beside, file)

    def newest(
        self, read: Callable[[int], Any], say: Callable[[str], None]
    ) -> tuple[int, Any]:
        """Return the newest step that `read` can read, and what it returns.

        Damaged steps are told to `say` and left as they are. Raises DamagedError, of
        the newest, where all are. All processes call this; process 0 says which steps
        there are.
        """
        first = None
        for step in reversed(together.on_main(self.steps)):
            try:
                return step, read(step)
            except DamagedError as error:
                first = first or error
                say(f"WARNING: {error}")
        raise first

    def check(self, step: int) -> bool:
        """Read all of `step` on one device; return whether it has digests.

        Raises DamagedError as `restore` does.
        """
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        try:
            parts = self._orbax.checkpointables_metadata(step).metadata
            abstract = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), parts
            )
        except READ_ERRORS as error:
            raise DamagedError(self.path / str(step), reason(error)) from error
        self.restore(step, abstract)
        return bool(self.digests(step))

    def set_aside(self, after: int) -> list[Path]:
        """Move the steps after one beside the checkpoints; return where they are now.

        They are damaged, and their numbers are needed again. All processes call this.
        """
        folder = self.path.parent / "damaged"

        def move(step):
            folder.mkdir(exist_ok=True)
            place = folder / f"{step}-{len(list(folder.glob(f'{step}-*')))}"
            return str((self.path / str(step)).rename(place))

        moved = together.on_main(lambda: [move(s) for s in self.steps() if s > after])
        self._orbax.reload()
        return [Path(place) for place in moved]

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
