"""A run read back: its config, its tokenizer, its weights."""

import dataclasses
from pathlib import Path

import jax

from fm_jax import config as configs
from fm_jax import configfile, meshes, sharding
from fm_jax.checkpoints import Checkpoints, abstract_of
from fm_jax.errors import UserError
from fm_jax.evaluation import likelihood
from fm_jax.models import zoo
from fm_jax.models.zoo import Model
from fm_jax.prepare import opened
from fm_jax.runs import Run
from fm_jax.tokenizers import load as tokenizers
from fm_jax.tokenizers.protocol import Tokenizer
from fm_jax.train import compose
from fm_jax.train.step import make_eval_step


@dataclasses.dataclass(frozen=True)
class Restored:
    """The weights of one step of a run, on a mesh of all devices.

    `params` are the averaged weights where the run keeps an average.
    """

    config: configs.Config
    tokenizer: Tokenizer
    model: Model
    params: dict
    step: int


def load(path: Path, step: str = "latest") -> Restored:
    """Return the weights of a run's step: a number, `latest`, or `best` (eval/loss).

    Raises UserError when there is no such run or step.
    """
    run = Run(path)
    record = configfile.read_run(run)
    config = configs.check(record["config"])
    tokenizer = tokenizers.load(
        path / "tokenizer.json",
        end_token=config.data.end_token,
        end_id=record["data"].get("end_id", -1),  # older records have none
    )
    config = compose.resolve(config, tokenizer)
    if not run.checkpoints.is_dir():
        raise UserError(f"a run must have a checkpoint to read; got none in {path}.")
    compose.use_compile_cache(config.train.compile_cache)
    model = zoo.build(config.model)
    # The run's own mesh may not exist here: every device gets a whole copy.
    layout = _copies()
    places = sharding.tree_shardings(model.axes, model.abstract, layout)
    with layout.active():
        saved = Checkpoints(run.checkpoints)
        chosen = choose(saved, step, path)
        part = "ema" if record["config"]["train"]["ema_decay"] else "params"
        params = saved.restore(chosen, {part: abstract_of(model.abstract, places)})
        saved.close()
    return Restored(config, tokenizer, model, params[part], chosen)


def evaluate(path: Path, step: str = "latest") -> dict[str, float]:
    """Return the metrics of a run's step over all its held-out text.

    Raises UserError also when the run's data is no longer what it was trained with.
    """
    held = load(path, step)
    data = opened.open_data(held.config, lambda line: None)
    if Run(path).read_config()["data"]["eval_store"] != data.eval.name:
        raise UserError(
            f"the held-out text must be what {path} was trained with; got "
            "another. Restore the files."
        )
    layout = _copies()
    count = layout.mesh.size
    rows = -(-held.config.eval.batch_size // count) * count
    loss_chunk, names = held.config.train.loss_chunk, data.eval.names
    with layout.active():
        return likelihood.evaluate(
            jax.jit(make_eval_step(held.model, loss_chunk=loss_chunk, names=names)),
            held.params,
            compose.held_out(data.eval.windows, rows, layout),
            bayes=compose.held_out_bayes(data, rows),
            names=names,
        )


def _copies() -> sharding.Layout:
    """Return the layout in which every device has whole weights and its own rows."""
    return sharding.layout(meshes.make(meshes.sizes("ddp", {}, jax.device_count())))


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
    if not step.isdigit():
        raise UserError(f"{thing} must be a number, latest or best; got {step!r}.")
    if int(step) not in steps:
        raise UserError(f"{thing} must be one of the saved steps {steps}; got {step}.")
    return int(step)
