"""The weights of a run as plain params, whatever part of them its checkpoint holds.

A run that was fine-tuned keeps what trained; the rest is the run's that it began from.
"""

import dataclasses
from pathlib import Path

import jax

from fm_jax import config as configs
from fm_jax import configfile, meshes, sharding
from fm_jax.checkpoints import Checkpoints, abstract_of
from fm_jax.config import Config
from fm_jax.errors import UserError
from fm_jax.finetune import answers as asked
from fm_jax.finetune import tuning as tunings
from fm_jax.finetune.answers import Answers
from fm_jax.finetune.tuning import Tuning
from fm_jax.models.config import ModelConfig
from fm_jax.runs import Run
from fm_jax.sharding import Layout


def read(path: Path, step: int, *, layout: Layout | None = None) -> dict:
    """Return the params of a run's step, its average where it keeps one, in float32.

    layout: of the mesh that they are restored onto; None: the first device. Raises
    UserError when there is no such step, or the run needs the weights of another one
    which is not where it was.
    """
    run = Run(path)
    record = configfile.read_run(run)
    config = configs.check(record["config"])
    layout = layout or _first_device()
    tuning = tuning_of(config, record)
    part = "ema" if config.train.ema_decay else "params"
    places = sharding.tree_shardings(tuning.axes, tuning.abstract, layout)
    with layout.active():
        saved = Checkpoints(run.checkpoints)
        try:
            held = {part: abstract_of(tuning.abstract, places)}
            trained = saved.restore(step, held)[part]
        finally:
            saved.close()
        if not has_frozen(tuning):
            return trained
        base, base_step = base_of(run, record)
        params = fitted(read(base, base_step, layout=layout), tuning.model, trained)
        model = tuning.model
        whole = sharding.tree_shardings(model.axes, model.abstract, layout)

        def merged(params, trained):
            # Whole, but for kernels that training saw in eight bits.
            _, frozen = tuning.split(params, jax.random.key(0), exact=True)
            return tuning.merged(trained, frozen)

        return jax.jit(merged, out_shardings=whole)(params, trained)


def tuning_of(config: Config, record: dict) -> Tuning:
    """Return what trained of a run, by its config.json."""
    model = asked.model(model_config(record), Answers.from_record(record))
    return tunings.plan(model, config.finetune, config.lora)


def model_config(record: dict) -> ModelConfig:
    """Return the resolved model of a run's config.json, without younger keys."""
    there = record["resolved"]["model"]
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    values = {name: _tupled(value) for name, value in there.items() if name in known}
    return configs.read_section("model", ModelConfig, values)


def has_frozen(tuning: Tuning) -> bool:
    """Return whether a run of this tuning needs another one's weights."""
    return bool(jax.tree.leaves(tuning.frozen_abstract))


def base_of(run: Run, record: dict) -> tuple[Path, int]:
    """Return the run that a run's frozen weights are of, and their step.

    It is looked for where it was, and beside the run. Raises UserError when it is not
    there, or another run is.
    """
    init = record["resolved"]["init"]
    there = Path(init["path"])
    for path in (there, run.path.absolute().parent / there.name):
        if Run(path).exists():
            found = configfile.read_run(Run(path))["resolved"]["run_id"]
            if found == init["run_id"]:
                return path, init["step"]
    raise UserError(
        f"the run that {run.path} was fine-tuned from must be where it was, for "
        "what did not train, or is a reference, is read there; got no run "
        f"{init['run_id']} at {there}. Move it back, or beside {run.path}."
    )


def fitted(params: dict, model, ours: dict) -> dict:
    """Return a base's params as `model` takes them: its own head for answers is left.

    ours: what the model has beyond a base, by its name at the top.
    """
    kept = {name: leaf for name, leaf in params.items() if name in model.abstract}
    new = {name: ours[name] for name in model.abstract if name not in kept}
    return kept | new


def _first_device() -> Layout:
    sizes = meshes.sizes("ddp", {}, 1)
    return sharding.layout(meshes.make(sizes, devices=jax.devices()[:1]))


def _tupled(value):
    if isinstance(value, list | tuple):
        return tuple(_tupled(one) for one in value)
    return value
