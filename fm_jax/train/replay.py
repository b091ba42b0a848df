"""One step of a run made again, from the checkpoint before it."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from fm_jax import config as configs
from fm_jax import configfile
from fm_jax.checkpoints import Checkpoints
from fm_jax.errors import UserError
from fm_jax.prepare import opened
from fm_jax.prepare.opened import Data
from fm_jax.runs import Run
from fm_jax.train import aims, autopsy, beginning, compose, feeds, opening
from fm_jax.train.compose import Parts
from fm_jax.train.rewinding import left_out
from fm_jax.train.step import TrainState


@dataclasses.dataclass(frozen=True)
class Replayed:
    """A step's metrics now, those that the run wrote, and where the rest lies."""

    numbers: dict[str, float]
    written: dict[str, float]
    folder: Path
    start: int

    @property
    def changed(self) -> list[str]:
        """The names of metrics that are not, bit for bit, what the run wrote."""
        names = self.numbers.keys() & self.written.keys()
        return sorted(n for n in names if self.numbers[n] != self.written[n])


def replay(path: Path, step: int, say: Callable[[str], None]) -> Replayed:
    """Make a step of a run again, and write what it trained on and its norms.

    They go to replays/step-N in the run's folder: of its parameters and moments before
    the step, and of its gradient. Steps between the checkpoint and this one are made
    again too. On the devices and with the mesh of the run all numbers are the same.

    Raises UserError where there is no such step or no checkpoint before it, and where
    the data is no longer what it was.
    """
    run = Run(path)
    record = configfile.read_run(run)
    config = configs.check(record["config"])
    if not 1 <= step <= record["resolved"]["steps"]:
        raise UserError(
            f"--step must be from 1 to {record['resolved']['steps']}, the steps of "
            f"{path}; got {step}."
        )
    compose.use_compile_cache(config.train.compile_cache)
    layout = compose.open_layout(config)
    data = opened.open_data(config, say)
    opening.refuse_other_data(run, record["data"], opening.data_record(data))
    parts = compose.build(
        compose.resolve(config, data.tokenizer),
        layout,
        corpus_tokens=data.train.num_targets,
        row_tokens=feeds.row_tokens(data),
        train_names=data.train.names,
        eval_names=data.eval.names,
        answers=aims.answers_of(data),
    )
    with layout.active():
        return _replay(run, record, parts, data, step, say)


def _replay(run, record, parts: Parts, data: Data, step: int, say) -> Replayed:
    if compose.needs_base(parts):
        raise UserError(
            "fm replay makes the steps of runs again that train all of their model; "
            f"got {run.path}, which keeps another's weights."
        )
    state, start = _state_before(run, record, parts, step)
    say(f"from step {start:,}: {step - start:,} steps")
    batches = feeds.train_batches(parts, data, start)
    passed_over = set(left_out(run))
    for number in range(start + 1, step):
        batch = parts.put(next(batches))
        if number in passed_over:
            state = parts.leave_out(state)
        else:
            state, _ = parts.train_step(state, batch)
    batch = parts.put(next(batches))
    gradient, _, _ = parts.gradient(state, batch)
    norms = autopsy.norms(state, gradient)
    del gradient
    _, metrics = parts.train_step(state, batch)
    numbers = {name: float(np.asarray(x)) for name, x in metrics.items()}
    found = {"from_step": start, "metrics": numbers} | norms
    place = run.path / "replays"
    folder = autopsy.write(place, step, "made again", data, parts.config, found)
    return Replayed(numbers, _written(run, step), folder, start)


def _state_before(run: Run, record, parts: Parts, step) -> tuple[TrainState, int]:
    """Return the newest state of a run before a step, and its own step."""
    if run.checkpoints.is_dir():
        saved = Checkpoints(run.checkpoints)
        try:
            before = [found for found in saved.steps() if found < step]
            if before:
                return beginning.restored(parts, saved, before[-1], None), before[-1]
        finally:
            saved.close()
    if record["resolved"]["init"]:
        raise UserError(
            f"a run that began from another must have a checkpoint before step {step}; "
            f"got none in {run.path}. Set checkpoint.keep_every in training."
        )
    return parts.init(jax.random.key(parts.config.train.seed)), 0


def _written(run: Run, step: int) -> dict[str, float]:
    """Return the metrics that the run wrote of a step."""
    found = {}
    for row in run.rows():
        if row["step"] == step:
            found |= row
    return found
