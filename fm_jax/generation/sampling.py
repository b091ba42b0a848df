"""The rules by which the next id is chosen: pure functions over logits of rows.

No rule sorts the vocabulary: a threshold is searched for bit by bit, which takes as
many passes as a number has bits and a thirtieth of a sort's time on a CPU.
Legend beside the usual dims: Q blocks of the vocabulary, W ids in a block.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.generation.request import Request


class Rules(NamedTuple):
    """The rules of each row, [B]; see `Request`."""

    temperature_B: jax.Array
    top_k_B: jax.Array
    top_p_B: jax.Array
    min_p_B: jax.Array
    penalty_B: jax.Array
    seed_B: jax.Array
    sample_B: jax.Array


def rules(requests: Sequence[Request | None]) -> Rules:
    """Return the rules of rows as host arrays; a row of none is greedy."""
    found = [request or Request((0,), 1) for request in requests]

    def column(name, dtype):
        return np.array([getattr(request, name) for request in found], dtype)

    return Rules(
        column("temperature", np.float32),
        column("top_k", np.int32),
        column("top_p", np.float32),
        column("min_p", np.float32),
        column("repetition_penalty", np.float32),
        column("seed", np.uint32),
        column("sample", np.uint32),
    )


def pick(
    logits_BV: jax.Array, rules: Rules, steps_B: jax.Array, *, is_greedy: bool
) -> jax.Array:
    """Return the next id of each row, int32 [B], from penalised float32 logits.

    steps_B: how many new ids a row has already. `is_greedy` promises that all rows are.
    """
    likeliest_B = likeliest(logits_BV)
    if is_greedy:
        return likeliest_B
    is_drawn_B = rules.temperature_B > 0
    heat_B = jnp.where(is_drawn_B, rules.temperature_B, 1.0)
    logits_BV = logits_BV / heat_B[:, None]
    weights_BV = weights(logits_BV, rules.top_k_B, rules.top_p_B, rules.min_p_B)
    drawn_B = draw(weights_BV, uniform(rules.seed_B, rules.sample_B, steps_B))
    return jnp.where(is_drawn_B, drawn_B, likeliest_B)


def likeliest(logits_BV: jax.Array) -> jax.Array:
    """Return the first of the likeliest ids of each row, int32 [B].

    As argmax does, in two passes that a CPU takes several numbers at a time.
    """
    vocab = logits_BV.shape[-1]
    most_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    ids_V = jnp.arange(vocab, dtype=jnp.int32)
    return jnp.min(jnp.where(logits_BV >= most_B1, ids_V, vocab - 1), axis=-1)


def penalised(
    logits_BV: jax.Array, seen_BV: jax.Array, penalty_B: jax.Array
) -> jax.Array:
    """Return logits of which those of seen ids are brought down by a factor.

    CTRL's rule (arXiv 1909.05858): a logit above 0 is divided by it, one below
    multiplied.
    """
    by_B1 = penalty_B[:, None]
    less_BV = jnp.where(logits_BV > 0, logits_BV / by_B1, logits_BV * by_B1)
    return jnp.where(seen_BV, less_BV, logits_BV)


def weights(
    logits_BV: jax.Array, top_k_B: jax.Array, top_p_B: jax.Array, min_p_B: jax.Array
) -> jax.Array:
    """Return probabilities [B, V] times a constant of each row, 0 where ruled out.

    Kept are the `top_k` likeliest (0: all), among which the smallest set whose share
    reaches `top_p`, among which those with at least `min_p` times the likeliest's
    probability. Ids as likely as the last one kept stay too.
    """
    most_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    # The likeliest's is 1, even where the compiler divides by the temperature and
    # subtracts at once, without rounding between the two.
    is_most_BV = logits_BV >= most_B1
    shares_BV = jnp.where(is_most_BV, 1.0, jnp.exp(logits_BV - most_B1))

    def among_k(shares_BV):
        bits_BV = _ordered_bits(logits_BV)
        wanted_B = jnp.where(top_k_B > 0, top_k_B, logits_BV.shape[-1])
        least_B = _search(
            lambda t_B: jnp.sum(bits_BV >= t_B[:, None], axis=-1) >= wanted_B,
            bits_BV,
        )
        return jnp.where(bits_BV >= least_B[:, None], shares_BV, 0.0)

    def among_p(shares_BV):
        bits_BV = _ordered_bits(shares_BV)

        def mass(t_B):
            return jnp.sum(jnp.where(bits_BV >= t_B[:, None], shares_BV, 0.0), -1)

        wanted_B = top_p_B * jnp.sum(shares_BV, axis=-1)
        least_B = _search(lambda t_B: mass(t_B) >= wanted_B, bits_BV)
        is_kept_BV = (bits_BV >= least_B[:, None]) | (top_p_B >= 1)[:, None]
        return jnp.where(is_kept_BV, shares_BV, 0.0)

    def same(shares_BV):
        return shares_BV

    shares_BV = jax.lax.cond(jnp.any(top_k_B > 0), among_k, same, shares_BV)
    shares_BV = jax.lax.cond(jnp.any(top_p_B < 1), among_p, same, shares_BV)
    return jnp.where(shares_BV >= min_p_B[:, None], shares_BV, 0.0)


def _ordered_bits(x: jax.Array) -> jax.Array:
    """Return int32 in the order of the float32 that they are made of."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _search(holds: Callable, bits_BV: jax.Array) -> jax.Array:
    """Return the largest int32 threshold [B] of which `holds` is true, by halving.

    holds: true of a row's least value, and false of all above a threshold once it is.
    """

    def halve(_, bounds):
        low_B, high_B = bounds
        # Upwards, and without the overflow of their sum.
        middle_B = (low_B >> 1) + (high_B >> 1) + ((low_B | high_B) & 1)
        is_true_B = holds(middle_B)
        low_B = jnp.where(is_true_B, middle_B, low_B)
        return low_B, jnp.where(is_true_B, high_B, middle_B - 1)

    start = jnp.min(bits_BV, axis=-1), jnp.max(bits_BV, axis=-1)
    return jax.lax.fori_loop(0, 32, halve, start)[0]


def uniform(seed_B: jax.Array, sample_B: jax.Array, steps_B: jax.Array) -> jax.Array:
    """Return a number in [0, 1) for each row, from these three alone."""

    def one(seed, sample, step):
        rng = jax.random.fold_in(jax.random.key(seed), sample)
        return jax.random.uniform(jax.random.fold_in(rng, step))

    return jax.vmap(one)(seed_B, sample_B, steps_B)


def draw(weights_BV: jax.Array, uniform_B: jax.Array) -> jax.Array:
    """Return the id of each row at which the running sum of weights passes its number.

    One number a row, not one for each id, and sums of blocks first: a running sum over
    a whole vocabulary is slow. An id of weight 0 is never drawn, whatever the rounding.
    """
    batch, vocab = weights_BV.shape
    width = 1 << max(vocab.bit_length() // 2, 1)
    padded_BV = jnp.pad(weights_BV, ((0, 0), (0, -vocab % width)))
    weights_BQW = padded_BV.reshape(batch, -1, width)
    sums_BQ = jnp.sum(weights_BQW, axis=-1)
    running_BQ = jnp.cumsum(sums_BQ, axis=-1)
    target_B = uniform_B * running_BQ[:, -1]
    block_B = _first_past(running_BQ, sums_BQ, target_B)
    rows_B = jnp.arange(batch)
    before_B = running_BQ[rows_B, block_B] - sums_BQ[rows_B, block_B]
    weights_BW = weights_BQW[rows_B, block_B]
    running_BW = jnp.cumsum(weights_BW, axis=-1)
    return block_B * width + _first_past(running_BW, weights_BW, target_B - before_B)


def _first_past(running_BQ, weights_BQ, target_B):
    """Return the first index of positive weight past the target; else the last such."""
    is_there_BQ = weights_BQ > 0
    is_past_BQ = is_there_BQ & (running_BQ > target_B[:, None])
    last_B = weights_BQ.shape[-1] - 1 - jnp.argmax(is_there_BQ[:, ::-1], axis=-1)
    first_B = jnp.argmax(is_past_BQ, axis=-1)
    return jnp.where(jnp.any(is_past_BQ, axis=-1), first_B, last_B).astype(jnp.int32)


def log_probabilities(
    logits_BV: jax.Array, ids_B: jax.Array, num_top: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return those of chosen ids [B], the likeliest ids [B, n] and theirs [B, n]."""
    whole_B1 = jax.nn.logsumexp(logits_BV, axis=-1, keepdims=True)
    chosen_B1 = jnp.take_along_axis(logits_BV, ids_B[:, None], axis=-1) - whole_B1
    top_Bn, ids_Bn = jax.lax.top_k(logits_BV, num_top)
    return chosen_B1[:, 0], ids_Bn.astype(jnp.int32), top_Bn - whole_B1
