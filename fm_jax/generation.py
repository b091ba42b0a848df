"""Text from a model: rules of sampling, one prefill, and a compiled decode loop."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.sharding import constrain

BUCKET = 64  # prompts are padded to multiples of this: one program serves many lengths


def generate(
    model: Any,
    params: dict,
    prompts: list[list[int]],
    *,
    num_tokens: int,
    end_id: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
) -> list[list[int]]:
    """Return up to `num_tokens` new ids for each prompt, ended before `end_id`.

    model is a `models.zoo.Model`. Prompts may differ in length: they are padded on the
    left, where nothing sees the padding. Temperature 0 takes the likeliest id. Row r of
    a seed draws the same numbers whatever the other rows are.
    """
    longest = max(len(prompt) for prompt in prompts)
    width = -(-longest // BUCKET) * BUCKET
    tokens_BT = np.zeros((len(prompts), width), np.int32)
    segments_BT = np.zeros_like(tokens_BT)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, width - len(prompt) :] = prompt
        segments_BT[row, width - len(prompt) :] = 1
    positions_BT = np.maximum(np.cumsum(segments_BT, axis=1) - 1, 0)
    keys_B = jax.vmap(lambda r: jax.random.fold_in(jax.random.key(seed), r))(
        jnp.arange(len(prompts))
    )
    out_BT = _decode(
        model,
        params,
        tokens_BT,
        positions_BT,
        segments_BT,
        keys_B,
        jnp.float32(temperature),
        jnp.int32(top_k),
        jnp.float32(top_p),
        end_id=end_id,
        num_tokens=num_tokens,
        rule="greedy"
        if temperature == 0
        else "filtered"
        if top_k or top_p < 1
        else "plain",
    )
    rows = []
    for row in np.asarray(out_BT):
        ends = np.flatnonzero(row == end_id)
        rows.append(row[: ends[0]].tolist() if len(ends) else row.tolist())
    return rows


@functools.partial(
    jax.jit, static_argnums=0, static_argnames=("end_id", "num_tokens", "rule")
)
def _decode(
    model,
    params,
    tokens_BT,
    positions_BT,
    segments_BT,
    keys_B,
    temperature,
    top_k,
    top_p,
    *,
    end_id,
    num_tokens,
    rule,
):
    batch, width = tokens_BT.shape
    cache = model.empty_cache(batch, width + num_tokens)
    x_BTD, cache = model.hidden(params, tokens_BT, positions_BT, segments_BT, cache)
    logits_BV = model.logits(params, x_BTD[:, -1:])[:, 0]
    lengths_B = positions_BT[:, -1] + 1

    def pick(logits_BV, step):
        if rule == "greedy":
            return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        logits_BV = logits_BV / temperature
        if rule == "filtered":
            logits_BV = keep_likely(logits_BV, top_k, top_p)
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys_B, step)
        return jax.vmap(jax.random.categorical)(keys, logits_BV).astype(jnp.int32)

    def unfinished(carry):
        step, _, _, done_B, _ = carry
        return (step < num_tokens) & ~jnp.all(done_B)

    def advance(carry):
        step, logits_BV, cache, done_B, out_BT = carry
        token_B = jnp.where(done_B, end_id, pick(logits_BV, step))
        out_BT = out_BT.at[:, step].set(token_B)
        position_B1 = (lengths_B + step)[:, None]
        x_B1D, cache = model.hidden(
            params, token_B[:, None], position_B1, jnp.ones_like(position_B1), cache
        )
        logits_BV = model.logits(params, x_B1D)[:, 0]
        return step + 1, logits_BV, cache, done_B | (token_B == end_id), out_BT

    out_BT = jnp.full((batch, num_tokens), end_id, jnp.int32)
    start = (jnp.int32(0), logits_BV, cache, jnp.zeros(batch, bool), out_BT)
    out_BT = jax.lax.while_loop(unfinished, advance, start)[4]
    return constrain(out_BT, None, None)  # every process gets all texts


def keep_likely(logits_BV: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """Return logits with all but the likeliest ids at -inf.

    Kept are the `top_k` likeliest (0: all) among which the smallest set whose
    probability reaches `top_p` (arXiv 1904.09751); the likeliest always stays.
    """
    sorted_BV = -jnp.sort(-logits_BV, axis=-1)
    rank_V = jnp.arange(logits_BV.shape[-1])
    in_k_V = jnp.where(top_k > 0, rank_V < top_k, True)
    probs_BV = jax.nn.softmax(jnp.where(in_k_V, sorted_BV, -jnp.inf), axis=-1)
    before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
    in_p_BV = (in_k_V & (before_BV < top_p)) | (rank_V == 0)
    least_B1 = jnp.min(jnp.where(in_p_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
