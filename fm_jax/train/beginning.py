"""Where a run's first weights come from: its own, another run's, Hugging Face's."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax

from fm_jax import config as configs
from fm_jax import configfile, sharding, trees
from fm_jax.checkpoints import Checkpoints, choose
from fm_jax.errors import UserError
from fm_jax.finetune import weights
from fm_jax.hf import adopt
from fm_jax.models import zoo
from fm_jax.models.config import ModelConfig
from fm_jax.runs import Run
from fm_jax.tokenizers.protocol import Tokenizer
from fm_jax.train.compose import Parts
from fm_jax.train.step import TrainState

# What the optimizer's state follows from; its numbers may differ.
OPTIMIZER_KEYS = (
    "optimizer.name",
    "optimizer.mu_dtype",
    "optimizer.nu_dtype",
    "finetune.method",
    "finetune.rules",
    "finetune.last_layers",
    "finetune.layer_decay",
    "finetune.unfreeze_every",
)
# What the next batch follows from, and how many tokens came before it; weights may
# change later, by data.weights_at.
NEXT_BATCH_KEYS = (
    "train.batch_size",
    "train.seed",
    "data.max_length",
    "data.packing",
    "data.weights",
)


@dataclasses.dataclass(frozen=True)
class Beginning:
    """A step of another run. `tokens` is what the weights had seen by then.

    Where this run goes on as that one, `with_optimizer`, it begins after `step` and
    with the batch that comes next; else at 0.
    """

    path: Path
    run_id: str
    step: int
    tokens: float
    with_optimizer: bool

    @property
    def start(self) -> int:
        """The step that this run counts on from."""
        return self.step if self.with_optimizer else 0

    def record(self) -> dict:
        """Return what config.json keeps of it."""
        return dataclasses.asdict(self) | {"path": str(self.path)}


def find(
    config: configs.Config,
    tokenizer: Tokenizer,
    *,
    say: Callable[[str], None],
    again: dict | None = None,
) -> Beginning | None:
    """Return what `init.from` names, or None where it is empty.

    A checkpoint folder of Hugging Face's is made a run first, in the cache. again: what
    the record of a run that goes on says of its beginning, which must be the same one;
    its step is taken.

    Raises UserError when there is no such run or step, its ids mean other text, its
    weights have other shapes, or its optimizer's state is another kind. Before a device
    holds anything; all processes of a run call it together.
    """
    given = config.init.from_
    if not given:
        return None
    name, _, step = given.rpartition("@")
    if not name or "/" in step:
        name, step = given, "latest"
    cache = Path(config.data.cache_dir).expanduser()
    run = Run(adopt.as_run(Path(name).expanduser(), cache, say))
    try:
        record = configfile.read_run(run)
    except UserError as error:
        raise UserError(
            f"config.init.from must be RUN[@STEP] or a Hugging Face folder; {error}"
        ) from error
    configs.check(record["config"])  # which may be a stranger's
    resolved = record["resolved"]
    if again:
        step = str(again["step"])
        if resolved["run_id"] != again["run_id"]:
            raise UserError(
                f"config.init.from must be the run that this one began from, "
                f"{again['run_id']}; got {run.path}, which is {resolved['run_id']}."
            )
    if record["data"]["tokenizer"] != tokenizer.fingerprint:
        raise UserError(
            f"config.init.from must be a run with this tokenizer; got {run.path}, "
            f"whose ids mean other text. Set --config.data.tokenizer={run.path}/"
            "tokenizer.json, or --config.init.model=True."
        )
    _check_shapes(run, weights.model_config(record), config.model)
    if not run.checkpoints.is_dir():
        raise UserError(
            f"config.init.from must have a checkpoint; got none in {run.path}."
        )
    saved = Checkpoints(run.checkpoints)
    try:
        chosen = choose(saved, step, run.path, "config.init.from's step")
    finally:
        saved.close()
    if config.init.optimizer:
        _check_optimizer(run, record["config"], config.raw, chosen)
    theirs = record["config"]
    per_step = resolved.get(  # older records have none, and rows without padding
        "tokens_per_step", theirs["train"]["batch_size"] * theirs["data"]["max_length"]
    )
    return Beginning(
        path=run.path.absolute(),
        run_id=resolved["run_id"],
        step=chosen,
        tokens=tokens_at(chosen, lambda step: step * per_step, resolved["init"]),
        with_optimizer=config.init.optimizer,
    )


def tokens_at(step: int, seen: Callable[[int], float], init: dict | None) -> float:
    """Return the tokens that a run has seen by `step`, those before its start too.

    seen: the tokens of the first so many steps. init: what its config.json keeps of its
    own beginning.
    """
    if init is None or not init["with_optimizer"]:
        return float(seen(step))
    return init["tokens"] + seen(step) - seen(init["step"])


def _check_shapes(run: Run, there: ModelConfig, here: ModelConfig) -> None:
    old = trees.leaves_by_path(zoo.build(there).abstract)
    new = trees.leaves_by_path(zoo.build(here).abstract)
    for name in sorted(old.keys() | new.keys()):
        a, b = (
            tuple(tree[name].shape) if name in tree else None for tree in (old, new)
        )
        if a != b:
            raise UserError(
                f"the model must have the shapes of config.init.from={run.path}; got "
                f"{name} of {b or 'no weights'} here and {a or 'no weights'} there. "
                "Set --config.init.model=True to take that run's model."
            )


def _check_optimizer(run: Run, there: dict, here: dict, step: int) -> None:
    old, new = configfile.flat(there), configfile.flat(here)
    kinds = {key: (old[key], new[key]) for key in OPTIMIZER_KEYS}
    for key in ("optimizer.clip_norm", "train.ema_decay"):
        kinds[f"{key} > 0"] = bool(old[key]), bool(new[key])
    for key in NEXT_BATCH_KEYS:
        kinds[key] = old[key], new[key]
    kinds[f"data.weights_at before step {step}"] = tuple(
        tuple(change for change in keys["data.weights_at"] if change[0] < step)
        for keys in (old, new)
    )
    for key, (a, b) in kinds.items():
        if a != b:
            raise UserError(
                f"{key} must be that of config.init.from={run.path} when the run goes "
                f"on with its optimizer; got {b!r} here and {a!r} there. Set --config."
                "init.optimizer=False for its weights alone."
            )


def first_params(parts: Parts, beginning: Beginning) -> tuple[dict, list[str]]:
    """Return the params that a run begins with, on the mesh, and lines of their source.

    They are the weights that the other run evaluates: its average where it keeps one.
    What it does not have is drawn; what this model has no place for is left.
    """
    params = weights.read(beginning.path, beginning.step, layout=parts.layout)
    model, key = parts.model, jax.random.key(parts.config.train.seed)
    new = sorted(name for name in model.abstract if name not in params)
    left = sorted(name for name in params if name not in model.abstract)
    loaded = {name: params[name] for name in params if name not in left}
    if new:  # of the whole only what is new is computed
        places = sharding.tree_shardings(model.axes, model.abstract, parts.layout)
        draw = jax.jit(
            lambda rng: {name: model.init(rng)[name] for name in new},
            out_shardings={name: places[name] for name in new},
        )
        params = loaded | draw(key)
    leaves = jax.tree.leaves(loaded)
    count = sum(leaf.size for leaf in leaves)
    said = [
        f"Beginning with the weights of step {beginning.step:,} of {beginning.path}: "
        f"{len(leaves)} arrays, {count:,} parameters",
        *([f"  new here: {', '.join(new)}"] if new else []),
        *([f"  left there: {', '.join(left)}"] if left else []),
    ]
    return {name: params[name] for name in model.abstract}, said


def first_state(parts: Parts, params: dict) -> TrainState:
    """Return the state before the first step, of params on the mesh."""
    # Of the run's seed, and apart from what drew the params.
    rng = jax.random.fold_in(jax.random.key(parts.config.train.seed), 1)
    return parts.begin(params, rng)


def same_state(parts: Parts, beginning: Beginning) -> TrainState:
    """Return the state of the run that this one goes on as, its optimizer's too."""
    saved = Checkpoints(beginning.path / "checkpoints")
    try:
        return restored(parts, saved, beginning.step, None)
    finally:
        saved.close()


def restored(
    parts: Parts, saved: Checkpoints, step: int, params: dict | None
) -> TrainState:
    """Return the state of a checkpoint; params: the first ones, where some are frozen.

    Nothing of them is kept but what is frozen.
    """
    held = saved.restore(step, parts.state_parts(parts.abstract))
    frozen: dict = parts.abstract.frozen
    if params is not None and weights.has_frozen(parts.tuning):
        frozen = first_state(parts, params).frozen
    return parts.state_of(held, frozen)
