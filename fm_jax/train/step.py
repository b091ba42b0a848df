"""The train state and the two pure functions over it: one update, one evaluation."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fm_jax import objectives, sharding
from fm_jax.finetune.tuning import Tuning
from fm_jax.models import routing
from fm_jax.models.zoo import Model
from fm_jax.train import gradients

LN2 = math.log(2)
VOTES = "votes"  # in a batch of several processes: who of them was asked to stop
# Sums with a meaning of their own; a step's other sums become metrics, over `weight`.
SUMS = ("nll", "weight", "correct", "bytes", "experts")


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """Everything that a step changes, and `frozen`, which it only reads.

    `params` are those that train, and `ema` an averaged copy of them, or None.
    """

    step: jax.Array
    params: dict
    opt_state: Any
    ema: dict | None
    frozen: dict = dataclasses.field(default_factory=dict)

    def weights(self) -> tuple[dict, dict]:
        """Return what is evaluated: the average where one is kept, and the frozen."""
        return (self.params if self.ema is None else self.ema), self.frozen


def begin(
    tuning: Tuning, tx: optax.GradientTransformation, *, ema_decay: float
) -> Callable[[dict, jax.Array], TrainState]:
    """Return the function of a model's params and an rng that makes the first state.

    The rng draws what the params do not have: adapters.
    """

    def make(params, rng):
        params, frozen = tuning.split(params, rng)
        ema = jax.tree.map(jnp.copy, params) if ema_decay else None
        return TrainState(jnp.int32(0), params, tx.init(params), ema, frozen)

    return make


def state_shardings(
    abstract: TrainState, tuning: Tuning, layout: sharding.Layout
) -> TrainState:
    """Return where each leaf of the state lives: all by the params' logical axes."""
    params = sharding.tree_shardings(tuning.axes, tuning.abstract, layout)
    whole = layout.sharding()
    return TrainState(
        step=whole,
        params=params,
        opt_state=sharding.like_params(
            abstract.opt_state, tuning.abstract, params, whole
        ),
        ema=None if abstract.ema is None else params,
        frozen=sharding.tree_shardings(
            tuning.frozen_axes, tuning.frozen_abstract, layout
        ),
    )


def loss_sums(
    model: Model,
    *,
    z_loss: float,
    loss_chunk: int,
    num_components: int = 1,
    expert_losses: Mapping[str, float] | None = None,
    is_text: bool = True,
) -> Callable:
    """Return f(params, batch) -> (summed loss in nats, sums), over weighted targets.

    Sums: `nll`, `weight`, `correct` and, where targets stand for text, `bytes`. Of
    several components (K) also `component_nll`, `component_weight` and the like, `[K]`,
    by what `components` `[B]` in the batch says of each row.

    expert_losses: the weights of `objectives.expert_losses`, whose value over the whole
    batch given is added to the loss of every target; of a model with experts the sums
    then have them, times `weight`, and as `experts` the numbers of their load. None,
    as in evaluation, leaves all of it out.
    """
    config = model.config
    is_mixed = num_components > 1

    def sums_of(params, batch):
        batch = sharding.cut_rows(batch)
        x_BTD, numbers = model.hidden(
            params, batch["tokens"], batch["positions"], batch["segment_ids"]
        )
        total, sums = objectives.cross_entropy(
            x_BTD,
            model.head(params),
            batch["targets"],
            batch["loss_weights"],
            softcap=config.logits_softcap,
            z_loss=z_loss,
            chunk=loss_chunk,
            dtype=jnp.dtype(config.dtype),
            bias_V=model.head_bias(params),
            by_row=is_mixed,
        )
        if numbers and expert_losses is not None:
            total, sums = objectives.add_experts(total, sums, numbers, expert_losses)
        counted_BT = batch["target_bytes"] * (batch["loss_weights"] > 0)
        if is_text:
            sums |= {"bytes": jnp.sum(counted_BT).astype(jnp.float32)}
        if is_mixed:
            by_row = {
                "component_nll": sums.pop("row_nll"),
                "component_weight": jnp.sum(batch["loss_weights"], axis=1),
                "component_correct": sums.pop("row_correct"),
            }
            if is_text:
                by_row_B = jnp.sum(counted_BT, axis=1)
                by_row["component_bytes"] = by_row_B.astype(jnp.float32)
            components_B = batch["components"]
            sums |= objectives.by_component(by_row, components_B, num_components)
        return total, sums

    return sums_of


def make_train_step(
    tuning: Tuning,
    sums_of: Callable,
    tx: optax.GradientTransformation,
    rate: Callable,
    *,
    accumulation: int,
    ema_decay: float,
    balance_rate: float = 0.0,
    names: Sequence[str] = (),
    dropout_seed: int | None = None,
) -> Callable:
    """Return f(state, batch) -> (state, metrics).

    sums_of: the objective, as `loss_sums` gives one: f(params, batch) -> (summed loss,
    sums), over the params that `tuning` joins; see `gradients.make` for its gradient.

    balance_rate: by which the step moves the balance of experts, which nothing else
    moves, by the load of its whole batch; where they are frozen it stays.

    names: of the components of a mixture. Of several, metrics have the loss and the
    tokens of each in this step, which the batch's `components` tell apart; the loss is
    0 where there are no tokens: see `present`. dropout_seed: None where there is none.

    Where the loss or the norm of the gradient is not finite, nothing but the counts of
    steps changes. `votes` in a batch are no data: their sum is among the metrics.
    """

    gradient = gradients.make(
        tuning, sums_of, accumulation=accumulation, dropout_seed=dropout_seed
    )

    def train_step(state, batch):
        batch = dict(batch)
        votes = batch.pop(VOTES, None)
        grads, sums, weight = gradient(state, batch)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        if "experts" in sums:
            load_LE = sums["experts"]["load"]
            params = _rebalanced(params, state.params, load_LE, balance_rate)
        ema = state.ema
        if ema is not None:
            ema = optax.incremental_update(params, ema, 1 - ema_decay)
        metrics = {
            "train/loss": sums["nll"] / weight,
            "train/accuracy": sums["correct"] / weight,
            "train/tokens": sums["weight"],
            "grads/norm": optax.tree.norm(grads),
            "optimizer/learning_rate": rate(state.step),
        }
        is_finite = jnp.isfinite(metrics["train/loss"] + metrics["grads/norm"])
        if votes is not None:
            metrics[VOTES] = jnp.sum(votes)
        if "bytes" in sums:
            size = jnp.maximum(sums["bytes"], 1)
            metrics["train/bits_per_byte"] = sums["nll"] / LN2 / size
        if "experts" in sums:
            metrics |= routing.metrics(sums["experts"])
        for name, value in sums.items():
            if name not in SUMS and not name.startswith("component_"):
                metrics[f"train/{name}"] = value / weight
        if len(names) > 1:
            metrics |= _metrics_by_component(sums, names)
        made = TrainState(state.step + 1, params, opt_state, ema)
        kept = dataclasses.replace(state, frozen={})
        made = jax.tree.map(functools.partial(_if, is_finite), made, kept)
        return dataclasses.replace(made, frozen=state.frozen), metrics

    return train_step


def leave_out(state: TrainState) -> TrainState:
    """Return the state after a step that changes nothing but counts."""
    kept = dataclasses.replace(state, frozen={})
    kept = jax.tree.map(lambda x: x + 1 if _is_count(x) else x, kept)
    return dataclasses.replace(kept, frozen=state.frozen)


def make_eval_step(tuning: Tuning, sums_of: Callable) -> Callable:
    """Return f((params, frozen), batch) -> sums, as `loss_sums` and its like give."""
    return lambda weights, batch: sums_of(tuning.join(*weights), batch)[1]


def present(metrics: dict[str, float]) -> dict[str, float]:
    """Return a step's metrics without the losses of components it had no tokens of."""
    absent = {
        name.replace("train/tokens/", "train/loss/", 1)
        for name, value in metrics.items()
        if name.startswith("train/tokens/") and value == 0
    }
    return {name: value for name, value in metrics.items() if name not in absent}


def _if(is_finite, new, old):
    """Return new, or old unless all is finite: counts go on, schedules go by them."""
    return new if _is_count(new) else jnp.where(is_finite, new, old)


def _is_count(x):
    return jnp.issubdtype(x.dtype, jnp.integer)


def _rebalanced(params, before, load_LE, rate):
    """Return params whose balance is that before the step, moved by the load alone.

    Of layers whose balance is not among them nothing moves.
    """
    mlp = before.get("blocks", {}).get("mlp", {})
    if "balance" not in mlp:
        return params
    balance_LE = mlp["balance"]
    balance_LE = routing.rebalanced(balance_LE, load_LE[-len(balance_LE) :], rate)
    mlp = params["blocks"]["mlp"] | {"balance": balance_LE}
    return params | {"blocks": params["blocks"] | {"mlp": mlp}}


def _metrics_by_component(sums, names):
    losses_K = sums["component_nll"] / jnp.maximum(sums["component_weight"], 1e-9)
    metrics = {}
    for k, name in enumerate(names):
        metrics[f"train/loss/{name}"] = losses_K[k]
        metrics[f"train/tokens/{name}"] = sums["component_weight"][k]
    return metrics
