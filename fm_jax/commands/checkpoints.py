"""The command that reads checkpoints as a storage keeps them."""

from pathlib import Path

from fm_jax import machine
from fm_jax.commands.command import Command
from fm_jax.errors import DamagedError, UserError, reason

EXIT_DAMAGED = 1


def verify(flags, raw, argv) -> int:
    """Read all checkpoints of runs and say which are what was saved."""
    from fm_jax.runs import Run

    if not flags.positional:
        raise UserError("fm checkpoint verify must be given run folders; got none.")
    runs = [Run(Path(path)) for path in flags.positional]
    for run in runs:
        run.read_config()
        if not run.checkpoints.is_dir():
            raise UserError(
                f"a run must have a checkpoint to read; got none in {run.path}."
            )
    machine.tune_allocator()
    from fm_jax.checkpoints import Checkpoints

    status = 0
    for run in runs:
        saved = Checkpoints(run.checkpoints)
        for step in saved.steps():
            try:
                known = saved.check(step)
            except DamagedError as error:
                print(f"step {step} DAMAGED: {reason(error)}", flush=True)
                status = EXIT_DAMAGED
            else:
                print(f"step {step} {'good' if known else 'read'}", flush=True)
        saved.close()
    return status


COMMANDS = {
    "checkpoint verify": Command(
        verify,
        "read every checkpoint of a run, against the digests of what was saved",
        "fm checkpoint verify runs/quickstart-1a2b3c4d",
        {},
        positional="RUN [RUN...]   run folders",
    ),
}
