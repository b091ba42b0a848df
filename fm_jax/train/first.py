"""The state that a run's steps go on from: its own, another's, or a new one."""

import json
from typing import Any

import jax

from fm_jax.checkpoints import Checkpoints
from fm_jax.cluster import together
from fm_jax.train import aims, beginning, tuned
from fm_jax.train.beginning import Beginning
from fm_jax.train.step import TrainState


def state(
    trainer: Any, saved: Checkpoints, begins: Beginning | None, *, goes_on: bool
) -> tuple[TrainState, int, bool]:
    """Return the state to go on from, its step, and if the run itself had come there.

    trainer: a `trainer.Trainer`, whose data and drift follow from first weights.
    """
    run, parts, clock = trainer.run, trainer.parts, trainer.clock
    found = together.on_main(saved.steps) if goes_on else []
    if not found:
        run.rewind(0)
    params = None
    if begins and not begins.with_optimizer:
        with clock.phase("restore"):
            params, lines = beginning.first_params(parts, begins)
        for line in lines:
            trainer.say(line)
        _look_back(trainer, params, begins)
    if found:
        with clock.phase("restore"):
            step, made = saved.newest(
                lambda step: beginning.restored(parts, saved, step, params),
                trainer.say,
            )
            for place in saved.set_aside(step) if step < found[-1] else ():
                trainer.say(f"  what is there of it is now {place}")
        run.rewind(step)
        trainer.say(f"Going on from step {step:,} of {run.path}")
        return made, step, True
    if params is not None:
        if parts.config.finetune.method in tuned.PROBED:
            with clock.phase("probe"):
                params, line, record = tuned.probed(parts, trainer.data, params)
            trainer.say(line)
            run.write("probe.json", json.dumps(record, indent=1) + "\n")
        return beginning.first_state(parts, params), 0, False
    if begins:
        with clock.phase("restore"):
            made = beginning.same_state(parts, begins)
        trainer.say(
            f"Beginning with the state of step {begins.step:,} of {begins.path}"
        )
        return made, begins.start, False
    key = jax.random.key(parts.config.train.seed)
    init = trainer.compiled(parts.init, key)
    with clock.phase("init"):
        return jax.block_until_ready(init(key)), 0, False


def _look_back(trainer: Any, params: dict, begins: Beginning) -> None:
    """Keep what the first weights say of the examples, where it is asked for."""
    parts, clock = trainer.parts, trainer.clock
    if aims.needs_reference(parts.config):
        with clock.phase("reference"):
            trainer.data = tuned.with_references(
                parts, trainer.data, params, begins, trainer.say
            )
    with clock.phase("drift"):
        trainer.drift = tuned.drift(parts, trainer.data, params)
