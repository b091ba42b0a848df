"""How likely a model finds held-out text: loss, bits per byte, accuracy."""

import math
from collections.abc import Callable, Iterable

import numpy as np

LN2 = math.log(2)


def evaluate(eval_step: Callable, params: dict, batches: Iterable) -> dict[str, float]:
    """Return metrics of `params` over batches that are already on the mesh.

    eval_step(params, batch) gives sums `nll` (nats), `weight`, `correct`, `bytes`. Sums
    are added in float64 and divided once. loss is in nats per token.
    """
    totals: dict[str, float] = {}
    for batch in batches:
        for name, value in eval_step(params, batch).items():
            totals[name] = totals.get(name, 0.0) + float(np.asarray(value))
    return {
        "loss": totals["nll"] / totals["weight"],
        "bits_per_byte": totals["nll"] / LN2 / totals["bytes"],
        "accuracy": totals["correct"] / totals["weight"],
        "tokens": totals["weight"],
    }
