"""What a run reads: batches to train on and held-out ones, and how many tokens."""

from collections.abc import Iterable, Iterator

import numpy as np

from fm_jax import sharding
from fm_jax.data import batches, prefetch
from fm_jax.data.windows import Windows
from fm_jax.prepare import opened
from fm_jax.prepare.opened import Data
from fm_jax.train.compose import Parts


def row_tokens(data: Data) -> float:
    """Return the tokens of a training row on average; the rest of it is padding.

    Of a mixture by its first weights. Rows that are cut from a stream count as full:
    of an epoch only the last is not.
    """
    windows = data.train.windows
    if windows[0].packing == "split":
        return windows[0].length
    _, weights = data.mixture(1).weights[0]
    summed = sum(w * x.mean_targets for w, x in zip(weights, windows, strict=True))
    return summed / sum(weights)


def tokens(data: Data, num_steps: int, batch_size: int) -> float:
    """Return the tokens of the first steps, as many as their rows have on average."""
    windows = data.train.windows
    if windows[0].packing == "split":
        return float(num_steps * batch_size * windows[0].length)
    return float(data.tokens_by_store(num_steps, batch_size).sum())


def train_batches(parts: Parts, data: Data, start: int) -> Iterator:
    """Return this process's batches from step `start` on, read ahead."""
    config = parts.config
    rows = sharding.local_rows(config.train.batch_size, parts.layout)
    plan = opened.train_plan(data, config, num_steps=parts.num_steps, rows=rows)
    return prefetch.prefetch(plan, start)


def held_out(
    windows: tuple[Windows, ...],
    rows: int,
    layout: sharding.Layout,
    *,
    max_batches: int = 0,
) -> Iterable:
    """Return batches of held-out windows, on the mesh one at a time."""
    held = sharding.local_rows(rows, layout)
    plan = batches.EvalBatches(windows, rows, held, max_batches)
    return (sharding.put_batch(b, rows, layout) for b in prefetch.prefetch(plan))


def held_out_bayes(data: Data, rows: int, *, max_batches: int = 0) -> list | None:
    """Return the least nats of each batch that `held_out` gives, where it is known."""
    if data.eval_bayes is None:
        return None
    # One more window, of no nats: what the index of padding, -1, finds.
    nats = np.append(data.eval_bayes, 0.0)
    plan = batches.EvalBatches(data.eval.windows, rows, np.arange(rows), max_batches)
    return [nats[plan.indices(i)[1]].sum() for i in range(len(plan))]
