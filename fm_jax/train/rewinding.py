"""A run that diverged goes back to its last checkpoint and leaves batches out."""

import json
from typing import Any

from fm_jax import jsonfiles
from fm_jax.checkpoints import Checkpoints
from fm_jax.cluster import together
from fm_jax.errors import UserError, reason
from fm_jax.runs import Run

FILE = "left_out.json"


def left_out(run: Run) -> list[int]:
    """Return the steps that a run leaves out, as it went back before them."""
    file = run.path / FILE
    if not file.exists():
        return []
    try:
        found = jsonfiles.parse(jsonfiles.text(file))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} must be JSON; got {reason(error)}.") from error
    jsonfiles.check(found, [int], str(file))
    return found


def goes_back(trainer: Any, step: int, saved: Checkpoints) -> bool:
    """Return whether the steps from the last checkpoint to `step` are to be left out.

    They are, where the `trainer.Trainer` may still go back and has a checkpoint; the
    run's folder keeps them, so that each start leaves them out.
    """
    with trainer.clock.phase("checkpoint"):
        saved.wait()
    before = [found for found in together.on_main(saved.steps) if found < step]
    if not trainer.num_rewinds or not before:
        return False
    trainer.num_rewinds -= 1
    trainer.left_out = sorted({*trainer.left_out, *range(before[-1] + 1, step + 1)})
    trainer.run.write(FILE, json.dumps(trainer.left_out) + "\n")
    trainer.events.add("rewind", step)
    trainer.progress.close()
    trainer.say(
        f"WARNING: diverged at step {step}: going back to step {before[-1]}, and "
        "leaving out the batches since"
    )
    return True
