"""Between the first weights and the first step of fine-tuning: what is made once."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax

from fm_jax import sharding
from fm_jax.finetune import features, heads, probe, reference
from fm_jax.finetune.drift import Drift
from fm_jax.models.zoo import Model
from fm_jax.prepare.opened import Data, Split
from fm_jax.sections import Config
from fm_jax.train import feeds
from fm_jax.train.beginning import Beginning
from fm_jax.train.compose import Parts

Say = Callable[[str], None]

DRIFT_BATCHES = 16  # of held-out examples, evenly spread
PROBED = ("probe", "lp_ft")  # ways to fine-tune that begin with a probe


def probed(parts: Parts, data: Data, params: dict) -> tuple[dict, str, dict]:
    """Return params with the head of a linear probe, a line and a record of its choice.

    Features of all training examples are taken once. Of the strengths of
    regularisation the one is chosen that is best on the first file of held-out
    examples, which is to be of the same distribution.
    """
    model = parts.model
    x, y = features.of(model, params, _batches(parts, data.train, 0))
    first = Split(data.eval.names[:1], data.eval.windows[:1])
    held_out = features.of(model, params, _batches(parts, first, 0))
    found = probe.fit(x, y, *held_out, num_classes=len(data.labels))
    places = jax.tree.map(lambda leaf: leaf.sharding, params[heads.NAME])
    head = jax.device_put({"kernel": found.kernel, "bias": found.bias}, places)
    best = next(step for step in found.path if step.l2 == found.l2)
    line = (
        f"probe: {len(x):,} examples, {x.shape[1]} features; l2 {found.l2:.3g} of "
        f"{len(found.path)} by {data.eval.names[0]}: accuracy "
        f"{best.valid_accuracy:.4f}, {best.train_accuracy:.4f} in training"
    )
    record = {"l2": found.l2, "path": [point._asdict() for point in found.path]}
    return params | {heads.NAME: head}, line, record


def drift(parts: Parts, data: Data, params: dict) -> Drift | None:
    """Return what measures how far features move from those of `params`.

    Of classifications alone; params are those before the first step.
    """
    if not data.labels:
        return None
    return Drift.begin(
        parts.model,
        params,
        lambda: _batches(parts, data.eval, DRIFT_BATCHES),
        data.eval.names,
        max_batches=DRIFT_BATCHES,
    )


def with_references(
    parts: Parts, data: Data, params: dict, begins: Beginning, say: Say
) -> Data:
    """Return data whose pairs have what the first weights, `params`, say of them."""
    how = {"layout": parts.layout, "num_segments": data.num_segments, "say": say}
    how |= {"run_id": begins.run_id, "step": begins.step}
    reference = parts.model, params, parts.config
    return dataclasses.replace(
        data,
        train=referenced(data.train, *reference, **how),
        eval=referenced(data.eval, *reference, **how),
    )


def referenced(
    split: Split,
    model: Model,
    params: dict,
    config: Config,
    *,
    layout: sharding.Layout,
    num_segments: int,
    run_id: str,
    step: int,
    say: Say,
) -> Split:
    """Return a split whose pairs have what a reference says of them.

    model, params: the reference, of a run's step. It is computed once, and kept in the
    cache.
    """
    rows = []
    for windows in split.windows:
        logps = reference.logps(
            model,
            params,
            windows,
            layout=layout,
            batch_size=config.eval.batch_size,
            num_segments=num_segments,
            loss_chunk=config.train.loss_chunk,
            folder=Path(config.data.cache_dir).expanduser() / "references",
            run_id=run_id,
            step=step,
            say=say,
        )
        rows.append(windows.with_reference(logps))
    return dataclasses.replace(split, windows=tuple(rows))


def _batches(parts: Parts, split: Split, max_batches: int):
    size = parts.config.eval.batch_size
    return feeds.held_out(split.windows, size, parts.layout, max_batches=max_batches)
