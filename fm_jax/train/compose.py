"""The one place where config becomes parts: data, mesh, model, optimizer, programs."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fm_jax import checkpoints, meshes, optimizers, sharding
from fm_jax import config as configs
from fm_jax.accelerators import Chip
from fm_jax.compiled import estimates
from fm_jax.corpora import sources
from fm_jax.corpora.chains import Chain
from fm_jax.data import batches, store
from fm_jax.data.examples import Windows
from fm_jax.errors import UserError
from fm_jax.models import counts, zoo
from fm_jax.tokenizers import all as tokenizers
from fm_jax.tokenizers.all import Tokenizer
from fm_jax.train import step as steps


@dataclasses.dataclass(frozen=True)
class Data:
    """The tokenizer, the windows of both splits, and what wrote them where known."""

    tokenizer: Tokenizer
    train: Windows
    eval: Windows
    chain: Chain | None = None

    @functools.cached_property
    def eval_bayes(self) -> np.ndarray | None:
        """Summed nats of each held-out window under what wrote it, float64; or None."""
        if self.chain is None:
            return None
        every = np.arange(len(self.eval))
        sums = []
        for some in np.array_split(every, -(-every.size * self.eval.length // 2**20)):
            rows = self.eval.rows(some)
            names = ("tokens", "targets", "loss_weights")
            sums.append(self.chain.bayes_nll(*(rows[n] for n in names)).sum(1))
        return np.concatenate(sums)


def open_data(
    config: configs.Config, say: Callable[[str], None], *, may_build: bool = True
) -> Data:
    """Return the data of a config, building what the cache does not have.

    Raises UserError on data that cannot be trained on, see sources and store; also on
    what is not in the cache, unless it may be built.
    """
    data = config.data
    cache = Path(data.cache_dir).expanduser()
    source = sources.make(
        source=data.source,
        paths=data.paths,
        eval_paths=data.eval_paths,
        eval_fraction=data.eval_fraction,
        name=data.name,
        tfds_dir=data.tfds_dir,
        split=data.split,
        eval_split=data.eval_split,
        text_field=data.text_field,
        on_bad_text=data.on_bad_text,
        synthetic=dataclasses.asdict(config.synthetic),
    )
    identities = {split: source.identity(split) for split in sources.SPLITS}
    tokenizer = _tokenizer(data, cache, source, identities["train"], say, may_build)
    windows = {}
    for split in sources.SPLITS:
        found = store.find_or_build(
            cache,
            functools.partial(source.documents, split),
            tokenizer,
            identity=identities[split],
            say=say,
            may_build=may_build,
        )
        windows[split] = Windows(found, tokenizer, data.max_length, data.mask_documents)
    chain = source.chain if data.source == "synthetic" else None
    return Data(tokenizer, windows["train"], windows["eval"], chain)


def _tokenizer(
    data, cache: Path, source, identity: dict, say, may_build: bool
) -> Tokenizer:
    if data.tokenizer == "bytes":
        return tokenizers.ByteTokenizer()
    if data.tokenizer == "symbols":
        return tokenizers.SymbolTokenizer(source.chain.num_symbols)
    if data.tokenizer != "bpe":
        return tokenizers.load(
            Path(data.tokenizer).expanduser(), end_token=data.end_token
        )
    return tokenizers.find_or_train_bpe(
        cache,
        functools.partial(source.documents, "train"),
        vocab_size=data.vocab_size,
        identity=identity,
        say=say,
        may_build=may_build,
    )


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
    model: zoo.Model
    num_steps: int
    rate: Callable
    decay_mask: dict
    init: Callable
    train_step: Callable
    eval_step: Callable
    abstract: steps.TrainState

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a step, over all devices and micro-batches."""
        return self.config.train.batch_size * self.config.data.max_length

    @property
    def flops_per_token(self) -> float:
        """Training FLOPs per token, causal attention halved."""
        return counts.flops_per_token(self.config.model, self.config.data.max_length)

    def put(self, batch: dict) -> dict:
        """Return this process's rows of a training batch on the mesh."""
        return sharding.put_batch(batch, self.config.train.batch_size, self.layout)

    def abstract_batch(self, rows: int) -> dict:
        """Return the shapes, dtypes and places of a batch of `rows` rows."""
        length = self.config.data.max_length
        kinds = {"loss_weights": "float32"}
        names = (
            "tokens",
            "targets",
            "loss_weights",
            "positions",
            "segment_ids",
            "target_bytes",
        )
        return {
            name: jax.ShapeDtypeStruct(
                (rows, length),
                kinds.get(name, "int32"),
                sharding=sharding.batch_sharding(self.layout),
            )
            for name in names
        }

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

    def state_parts(self, state: steps.TrainState) -> dict[str, Any]:
        """Return the state as a checkpoint's named parts."""
        parts = {
            "params": state.params,
            "optimizer": {"step": state.step, "state": state.opt_state},
        }
        return parts if state.ema is None else parts | {"ema": state.ema}

    def state_of(self, parts: dict[str, Any]) -> steps.TrainState:
        """Return the state of a checkpoint's named parts."""
        optimizer = parts["optimizer"]
        return steps.TrainState(
            optimizer["step"], parts["params"], optimizer["state"], parts.get("ema")
        )


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
    config: configs.Config, layout: sharding.Layout, *, corpus_tokens: int
) -> Parts:
    """Return the parts of a resolved config. Nothing is allocated or compiled.

    Raises UserError when mesh and model do not fit each other.
    """
    train = config.train
    model = zoo.build(config.model)
    num_steps = configs.resolve_steps(
        train,
        tokens_per_step=train.batch_size * config.data.max_length,
        corpus_tokens=corpus_tokens,
        num_params=counts.params(config.model).total,
    )
    optimizer = dataclasses.asdict(config.optimizer)
    rate = optimizers.schedule(
        peak=optimizer.pop("learning_rate"),
        num_steps=num_steps,
        **dataclasses.asdict(config.schedule),
    )
    mask = optimizers.decay_mask(model.abstract, optimizer.pop("decay_rules"))
    tx = optimizers.make(rate, mask, **optimizer)
    create = steps.create(model, tx, ema_decay=train.ema_decay)
    shapes = jax.eval_shape(create, jax.random.key(0))
    places = steps.state_shardings(shapes, model, layout)
    whole = layout.sharding()
    train_step = steps.make_train_step(
        model,
        tx,
        rate,
        accumulation=train.accumulation,
        z_loss=train.z_loss,
        loss_chunk=train.loss_chunk,
        ema_decay=train.ema_decay,
    )
    return Parts(
        config=config,
        layout=layout,
        model=model,
        num_steps=num_steps,
        rate=rate,
        decay_mask=mask,
        init=jax.jit(create, out_shardings=places),
        train_step=jax.jit(train_step, donate_argnums=0, out_shardings=(places, whole)),
        eval_step=jax.jit(
            steps.make_eval_step(model, loss_chunk=train.loss_chunk),
            out_shardings=whole,
        ),
        abstract=checkpoints.abstract_of(shapes, places),
    )


def train_batches(parts: Parts, data: Data, start: int) -> Iterator:
    """Return this process's batches from step `start` on, read ahead."""
    config = parts.config
    plan = batches.TrainBatches(
        data.train,
        config.train.batch_size,
        config.train.seed,
        parts.num_steps,
        sharding.local_rows(config.train.batch_size, parts.layout),
    )
    return batches.prefetch(plan, start)


def eval_batches(parts: Parts, data: Data, max_batches: int) -> Iterable:
    """Return the held-out batches, on the mesh one at a time."""
    return held_out(
        data.eval, parts.config.eval.batch_size, parts.layout, max_batches=max_batches
    )


def held_out(
    windows: Windows, rows: int, layout: sharding.Layout, *, max_batches: int = 0
) -> Iterable:
    """Return batches of held-out windows, on the mesh one at a time."""
    held = sharding.local_rows(rows, layout)
    plan = batches.EvalBatches(windows, rows, held, max_batches)
    return (sharding.put_batch(b, rows, layout) for b in batches.prefetch(plan))


def held_out_bayes(data: Data, rows: int, *, max_batches: int = 0) -> list | None:
    """Return the least nats of each batch that `held_out` gives, where it is known."""
    if data.eval_bayes is None:
        return None
    # One more window, of no nats: what the index of padding, -1, finds.
    nats = np.append(data.eval_bayes, 0.0)
    plan = batches.EvalBatches(data.eval, rows, np.arange(rows), max_batches)
    return [nats[plan.indices(i)].sum() for i in range(len(plan))]


def use_compile_cache(folder: str) -> None:
    """Keep compiled programs in `folder`, private to the user; "" keeps none.

    A folder that jax was already given by its environment is left alone.
    """
    if not folder or jax.config.jax_compilation_cache_dir:
        return
    path = Path(folder).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise UserError(
            f"train.compile_cache must be a writable folder; got {path} "
            f"({error.strerror}). Set it to '' for none."
        ) from error
    jax.config.update("jax_compilation_cache_dir", os.fspath(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
