"""The one place where config becomes parts: data, mesh, model, optimizer, programs."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax

from fm_jax import checkpoints, meshes, optimizers, sealed, sharding
from fm_jax import config as configs
from fm_jax.accelerators import Chip
from fm_jax.compiled import estimates
from fm_jax.data.windows import NAMES
from fm_jax.errors import UserError
from fm_jax.finetune import answers as asked
from fm_jax.finetune import flops, weights
from fm_jax.finetune import tuning as tunings
from fm_jax.finetune.answers import Answers
from fm_jax.finetune.tuning import Tuning
from fm_jax.models import attention, counts, zoo
from fm_jax.tokenizers.protocol import Tokenizer
from fm_jax.train import aims, gradients
from fm_jax.train import step as steps

# Of a step, so that a duration of whole steps is not one more by rounding.
SLACK = 1e-12


def resolve(config: configs.Config, tokenizer: Tokenizer) -> configs.Config:
    """Return the config with the vocabulary that the tokenizer needs.

    Raises UserError when the model's vocabulary is smaller than the tokenizer's.
    """
    size, needed = config.model.vocab_size, tokenizer.vocab_size
    if size and size < needed:
        raise UserError(
            "model.vocab_size must hold the tokenizer's ids; got "
            f"{size} for {needed} ids. Set it to 0 to follow the tokenizer."
        )
    model = dataclasses.replace(config.model, vocab_size=size or -(-needed // 64) * 64)
    return dataclasses.replace(config, model=model)


@dataclasses.dataclass(frozen=True)
class Parts:
    """Everything that a run is made of, nothing of it on a device yet."""

    config: configs.Config
    layout: sharding.Layout
    tuning: Tuning
    num_steps: int
    rate: Callable
    decay_mask: dict
    init: Callable  # rng -> state
    begin: Callable  # params, rng -> state
    train_step: Callable
    leave_out: Callable
    gradient: Callable
    eval_step: Callable
    merge: Callable  # state.weights() -> plain params
    abstract: steps.TrainState
    num_answers: int
    train_names: tuple[str, ...]
    row_tokens: float

    @property
    def model(self) -> zoo.Model:
        """The model, whose params `tuning` parts and joins."""
        return self.tuning.model

    @property
    def tokens_per_step(self) -> float:
        """Tokens of a step on average, over all devices and micro-batches."""
        return self.config.train.batch_size * self.row_tokens

    @property
    def flops_per_token(self) -> float:
        """Training FLOPs per token, causal attention halved, less what is frozen."""
        return flops.per_token(
            self.tuning, self.config.data.max_length, self.num_answers
        )

    def attention(self, on: dict | None = None) -> str:
        """Return how the train step attends; on: see attention.way."""
        train, length = self.config.train, self.config.data.max_length
        rows = train.batch_size // train.accumulation
        with self.layout.active():
            return attention.way(self.config.model, rows=rows, length=length, on=on)

    def put(self, batch: dict) -> dict:
        """Return this process's rows of a training batch on the mesh.

        For one device they stay as they are: the program, which puts what it is given
        there, does so in no time that can be told, and the host's is a step's overhead.
        """
        if self.layout.mesh.size == 1:
            return batch
        return sharding.put_batch(batch, self.config.train.batch_size, self.layout)

    def with_vote(self, batch: dict, *, stop: bool) -> dict:
        """Return a batch on the mesh with this process's vote, where there are more."""
        if not sharding.is_shared(self.layout):
            return batch
        return batch | {steps.VOTES: sharding.put_vote(stop, self.layout)}

    def abstract_batch(self, rows: int) -> dict:
        """Return the shapes, dtypes and places of a training batch of `rows` rows."""
        length = self.config.data.max_length
        kinds = {"loss_weights": "float32", "reference": "float32"}
        names = (*NAMES, "reference") if aims.needs_reference(self.config) else NAMES
        place = sharding.batch_sharding(self.layout)
        batch = {
            name: jax.ShapeDtypeStruct(
                (rows, length), kinds.get(name, "int32"), sharding=place
            )
            for name in names
        }
        if len(self.train_names) > 1:
            of_rows = jax.ShapeDtypeStruct((rows,), "int32", sharding=place)
            batch["components"] = of_rows
        if sharding.is_shared(self.layout):
            batch[steps.VOTES] = jax.ShapeDtypeStruct(
                (self.layout.mesh.size,),
                "int32",
                sharding=sharding.vote_sharding(self.layout),
            )
        return batch

    def estimate(
        self,
        compiled: jax.stages.Compiled,
        chip: Chip | None,
        *,
        num_slices: int = 1,
        **how,
    ) -> estimates.Estimate:
        """Return what the compiled train step needs and how fast `chip` can do it.

        num_slices: of the machine, where they are more than the mesh says; how: what
        else `estimates.of_step` takes.
        """
        mesh = self.config.mesh
        return estimates.of_step(
            compiled,
            state=self.abstract,
            batch=self.abstract_batch(self.config.train.batch_size),
            mesh=self.layout.mesh,
            num_slices=max(num_slices, mesh.dcn_data * mesh.dcn_fsdp),
            chip=chip,
            dtype=self.config.model.dtype,
            **how,
        )

    def merged(self, state: steps.TrainState) -> dict:
        """Return plain params of a state, those to evaluate, on the mesh."""
        trained, _ = state.weights()
        has_frozen = weights.has_frozen(self.tuning)
        return self.merge(state.weights()) if has_frozen else trained

    def state_parts(self, state: steps.TrainState) -> dict[str, Any]:
        """Return the state as a checkpoint's named parts, without what is frozen."""
        parts = {
            "params": state.params,
            "optimizer": {"step": state.step, "state": state.opt_state},
        }
        return parts if state.ema is None else parts | {"ema": state.ema}

    def state_of(self, parts: dict[str, Any], frozen: dict) -> steps.TrainState:
        """Return the state of a checkpoint's named parts, and of what is frozen."""
        optimizer, ema = parts["optimizer"], parts.get("ema")
        held = optimizer["step"], parts["params"], optimizer["state"], ema, frozen
        return steps.TrainState(*held)


def open_layout(config: configs.Config, devices: list | None = None) -> sharding.Layout:
    """Return the layout of a config over all devices, or over `devices`.

    Raises UserError when the mesh does not match them or its batches do not divide.
    """
    mesh, train, length = config.mesh, config.train, config.data.max_length
    devices = jax.devices() if devices is None else devices
    given = {axis: getattr(mesh, axis) for axis in meshes.AXES}
    found = meshes.make(
        meshes.sizes(mesh.preset, given, len(devices)),
        dcn={"data": mesh.dcn_data, "fsdp": mesh.dcn_fsdp},
        devices=devices,
    )
    layout = sharding.layout(found, mesh.rules)
    for rows, thing in (
        (
            train.batch_size // train.accumulation,
            "train.batch_size / train.accumulation",
        ),
        (config.eval.batch_size, "eval.batch_size"),
    ):
        sharding.check_batch(rows, length, layout, thing)
    return layout


def build(
    config: configs.Config,
    layout: sharding.Layout,
    *,
    corpus_tokens: int,
    row_tokens: float = 0,
    train_names: tuple[str, ...] = (),
    eval_names: tuple[str, ...] = (),
    answers: Answers | None = None,
) -> Parts:
    """Return the parts of a resolved config. Nothing is allocated or compiled.

    row_tokens: see `row_tokens`; 0: a row has no padding. train_names, eval_names: of
    the stores of each split, where there are several. answers: what the examples ask
    for; None where they are not known: as little as there can be.

    Raises UserError when mesh and model do not fit each other, or what is to train is
    no part of the model.
    """
    train, answers = config.train, answers or aims.least(config)
    model = asked.model(config.model, answers)
    tuning = tunings.plan(model, config.finetune, config.lora)
    row_tokens = row_tokens or config.data.max_length
    num_steps = 0
    if config.finetune.method not in configs.WITHOUT_STEPS:
        num_steps = configs.resolve_steps(
            train,
            tokens_per_step=train.batch_size * row_tokens * (1 + SLACK),
            corpus_tokens=corpus_tokens,
            num_params=counts.params(config.model).total,
        )
    optimizer = dataclasses.asdict(config.optimizer)
    rate = optimizers.schedule(
        peak=optimizer.pop("learning_rate"),
        num_steps=num_steps,
        **dataclasses.asdict(config.schedule),
    )
    mask = optimizers.decay_mask(tuning.abstract, optimizer.pop("decay_rules"))
    tx = optax.identity()  # of no step there is no moment
    if num_steps:
        how = {"multipliers": tuning.multipliers, "gate": tuning.gate}
        tx = optimizers.make(rate, mask, **optimizer, **how)
    begin = steps.begin(tuning, tx, ema_decay=train.ema_decay)

    def create(rng):
        return begin(model.init(rng), jax.random.fold_in(rng, 1))

    shapes = jax.eval_shape(create, jax.random.key(0))
    places = steps.state_shardings(shapes, tuning, layout)
    whole, once = layout.sharding(), _run_once(layout)
    objective = aims.objective(config, model, answers, train_names)
    dropout_seed = train.seed if aims.has_dropout(config) else None
    train_step = steps.make_train_step(
        tuning,
        objective,
        tx,
        rate,
        accumulation=train.accumulation,
        ema_decay=train.ema_decay,
        balance_rate=train.balance_rate,
        names=train_names,
        dropout_seed=dropout_seed,
    )
    gradient = gradients.make(
        tuning, objective, accumulation=train.accumulation, dropout_seed=dropout_seed
    )
    held_out = aims.objective(config, model, answers, eval_names, is_training=False)
    return Parts(
        config=config,
        layout=layout,
        tuning=tuning,
        num_steps=num_steps,
        rate=rate,
        decay_mask=mask,
        init=jax.jit(create, out_shardings=places, compiler_options=once),
        begin=jax.jit(begin, out_shardings=places, compiler_options=once),
        train_step=jax.jit(train_step, donate_argnums=0, out_shardings=(places, whole)),
        leave_out=jax.jit(steps.leave_out, donate_argnums=0, out_shardings=places),
        gradient=jax.jit(gradient, out_shardings=(places.params, whole, whole)),
        eval_step=jax.jit(steps.make_eval_step(tuning, held_out), out_shardings=whole),
        merge=jax.jit(
            lambda weights: tuning.merged(*weights),
            out_shardings=sharding.tree_shardings(model.axes, model.abstract, layout),
        ),
        abstract=checkpoints.abstract_of(shapes, places),
        num_answers=len(answers.labels),
        train_names=train_names,
        row_tokens=row_tokens,
    )


def _run_once(layout: sharding.Layout) -> dict[str, str] | None:
    """Return the compiler's options for a program that runs once.

    On a CPU the rounds of the generator that draws weights cost the compiler seconds;
    asked to optimise little it takes a third of that, and the program is as fast and
    its numbers are the same.
    """
    if layout.mesh.devices.flat[0].platform != "cpu":
        return None
    return {"xla_backend_optimization_level": "1"}


def needs_base(parts: Parts) -> bool:
    """Return whether a run that goes on must have the weights that it began with."""
    is_compared = parts.config.data.examples == "classify"  # features drift from them
    frozen = weights.has_frozen(parts.tuning)
    return frozen or is_compared or aims.needs_reference(parts.config)


def use_compile_cache(folder: str) -> None:
    """Keep compiled programs in `folder`, sealed and private; "" keeps none.

    A folder that jax was already given by its environment is left alone.
    """
    if not folder or jax.config.jax_compilation_cache_dir:
        return
    jax.config.update("jax_compilation_cache_dir", sealed.programs_in(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
