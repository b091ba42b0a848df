"""Preference objectives: a chosen and a rejected response, by their log-probabilities.

Legend beside the usual dims: S segments of a row; P pairs of a row, S = 2P, of which
segments 2p + 1 and 2p + 2 are the chosen and the rejected one.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from fm_jax import objectives, sharding
from fm_jax.models.zoo import Model

# Of ORPO: the nearest to a probability of 1 that has odds, in nats for a token.
NEAREST = 1e-6


def dpo(
    policy: jax.Array, reference: jax.Array, num_tokens: jax.Array, *, beta: float
) -> tuple[jax.Array, jax.Array]:
    """Return each pair's loss and margin in nats (DPO, arXiv 2305.18290, eq. 7).

    policy, reference: log-probabilities of whole responses, `[..., 2]`, the chosen one
    first; num_tokens: how many tokens they have. The margin is that of the implicit
    rewards, `beta * log(policy / reference)`; the loss `-log sigmoid(margin)`.
    """
    del num_tokens
    margin = beta * _gap(policy - reference)
    return jax.nn.softplus(-margin), margin


def ipo(
    policy: jax.Array, reference: jax.Array, num_tokens: jax.Array, *, beta: float
) -> tuple[jax.Array, jax.Array]:
    """Return each pair's loss and margin (IPO, arXiv 2310.12036, eq. 17); see `dpo`.

    The loss is the squared distance of the log-ratios' gap from 1 / (2 beta). As the
    paper writes it, log-probabilities are of whole responses; here, as its authors have
    told the writers of TRL (huggingface.co/blog/pref-tuning), each is a mean over its
    response's tokens. Otherwise the one distance for all pairs would hold long
    responses much nearer to the reference, token by token, than short ones.
    """
    margin = beta * _gap(_mean(policy - reference, num_tokens))
    return ((margin - 0.5) / beta) ** 2, margin


def orpo(
    policy: jax.Array, reference: jax.Array, num_tokens: jax.Array, *, beta: float
) -> tuple[jax.Array, jax.Array]:
    """Return each pair's loss and margin (ORPO, arXiv 2403.07691, eq. 6); see `dpo`.

    The loss is the chosen response's nats a token, and beta (the paper's lambda) times
    `-log sigmoid` of the log-ratio of the odds, p / (1 - p), where log p is a mean over
    tokens. The margin is beta times that log-ratio. There is no reference.
    """
    del reference
    mean = _mean(policy, num_tokens)
    below = jnp.minimum(mean, -NEAREST)
    ratio = _gap(below - jnp.log(-jnp.expm1(below)))
    return -mean[..., 0] + beta * jax.nn.softplus(-ratio), beta * ratio


KINDS = {"dpo": dpo, "ipo": ipo, "orpo": orpo}
REFERENCE_FREE = ("orpo",)


def sums_of(
    model: Model,
    *,
    kind: str,
    beta: float,
    num_segments: int,
    loss_chunk: int,
    without: Callable[[dict], dict] | None = None,
    num_components: int = 1,
    expert_losses: Mapping[str, float] | None = None,
) -> Callable:
    """Return f(params, batch) -> (summed loss, sums), over pairs.

    Sums: `nll`, which is the loss; `weight`, how many pairs; `correct`, how many have a
    positive margin; and, to be divided by `weight`, `margin`, `chosen_logp` and
    `rejected_logp` (nats of whole responses). Of several components (K) `component_nll`
    and the like, `[K]`, of the first three.

    num_segments: even, at least as many as any row has. Targets with a loss weight are
    those of responses; a pair counts where both of its segments have one.

    without: makes of params those of the reference, which the step then asks; None: the
    batch has the reference's log-probabilities as `reference`, `[B, T]`, that add up
    over each segment. expert_losses: as in `train.step.loss_sums`.
    """
    assert num_segments % 2 == 0, num_segments
    how = {"num_segments": num_segments, "loss_chunk": loss_chunk}

    def reference_of(params, batch):
        if kind in REFERENCE_FREE:
            return None
        if without is None:
            return _pairs(by_segment(batch["reference"], batch, num_segments))
        base = jax.lax.stop_gradient(without(params))
        return _pairs(response_logps(model, base, batch, **how)[0])

    def sums_of(params, batch):
        pieces = sharding.cut_rows(batch)
        logps_BS, numbers = response_logps(model, params, pieces, **how)
        policy_BP2 = _pairs(logps_BS)
        tokens_BP2 = _pairs(by_segment(pieces["loss_weights"], pieces, num_segments))
        reference_BP2 = reference_of(params, pieces)
        losses_BP, margins_BP = KINDS[kind](
            policy_BP2, reference_BP2, tokens_BP2, beta=beta
        )
        is_pair_BP = jnp.all(tokens_BP2 > 0, axis=-1)
        values = {
            "nll": losses_BP,
            "weight": is_pair_BP,
            "correct": margins_BP > 0,
            "margin": margins_BP,
            "chosen_logp": policy_BP2[..., 0],
            "rejected_logp": policy_BP2[..., 1],
        }
        by_row = {
            name: jnp.sum(jnp.where(is_pair_BP, x_BP, 0), axis=1, dtype=jnp.float32)
            for name, x_BP in values.items()
        }
        sums = {name: jnp.sum(x_B) for name, x_B in by_row.items()}
        total = sums["nll"]
        if numbers and expert_losses is not None:
            total, sums = objectives.add_experts(total, sums, numbers, expert_losses)
        if num_components > 1:
            apart = {f"component_{n}": by_row[n] for n in ("nll", "weight", "correct")}
            components_B = batch["components"]
            sums |= objectives.by_component(apart, components_B, num_components)
        return total, sums

    return sums_of


def response_logps(
    model: Model, params: dict, batch: dict, *, num_segments: int, loss_chunk: int
) -> tuple[jax.Array, dict]:
    """Return segments' responses' log-probabilities, `[B, S]`, and experts' numbers.

    batch: rows as `sharding.cut_rows` gives them. Of a segment without weighted targets
    it is 0.
    """
    x_BTD, numbers = model.hidden(
        params, batch["tokens"], batch["positions"], batch["segment_ids"]
    )
    nll_BT = objectives.token_nll(
        x_BTD,
        model.head(params),
        batch["targets"],
        softcap=model.config.logits_softcap,
        chunk=loss_chunk,
        dtype=jnp.dtype(model.config.dtype),
        bias_V=model.head_bias(params),
    )
    logps_BT = -batch["loss_weights"] * nll_BT
    return by_segment(logps_BT, batch, num_segments), numbers


def by_segment(x_BT: jax.Array, batch: dict, num_segments: int) -> jax.Array:
    """Return `[B, S]` sums over segments 1 to S, of rows that `cut_rows` has cut."""
    numbers_S = 1 + jnp.arange(num_segments)
    is_of_BTS = batch["segment_ids"][..., None] == numbers_S
    sums_BS = jnp.sum(jnp.where(is_of_BTS, x_BT[..., None], 0), axis=1)
    return sharding.sum_pieces(sharding.constrain(sums_BS, "batch", None))


def _pairs(x_BS):
    return x_BS.reshape(x_BS.shape[0], -1, 2)


def _gap(x):
    return x[..., 0] - x[..., 1]


def _mean(x, num_tokens):
    return x / jnp.where(num_tokens > 0, num_tokens, 1)
