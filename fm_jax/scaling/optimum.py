"""The optimum of a compute, or any run, as a law and its draws see it."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from fm_jax.scaling import checks, frontier


def row(
    law, theta: np.ndarray, draws: np.ndarray, flops: float, *, largest: float
) -> dict[str, Any]:
    """Return the best run of a compute as fit.json has it, the same as predict's.

    `ci` has the 95 % intervals of its numbers and `flat` the range of params that are
    nearly as good; `extrapolation` is how far `flops` is beyond the `largest` run, both
    as 6ND. Where a law reads more than params and tokens there is none.
    """
    made: dict[str, Any] = {"flops": flops, "extrapolation": flops / largest}
    if set(law.columns) != {"params", "tokens"}:
        return made | {"skipped": f"the law {law.name} reads {', '.join(law.columns)}"}
    found = amounts(law, np.vstack([theta, draws]), {"flops": flops}, {})
    del found["flops"]
    made |= {name: float(column[0]) for name, column in found.items()}
    made["ci"] = {name: checks.interval(c[1:]) for name, c in found.items()}
    made["draws_without"] = int(np.sum(~np.isfinite(found["params"][1:])))
    low, high = frontier.flat_range(law, theta, flops)
    return made | {"flat": [float(low), float(high)]}


def amounts(
    law, ensemble: np.ndarray, asked: Mapping, columns: Mapping
) -> dict[str, np.ndarray]:
    """Return flops, params, tokens, tokens_per_param and loss [R] under `ensemble`.

    `asked` has one of flops, params and tokens, of an optimum, or two of all four, of
    any run; `columns` what else the law reads. Of an optimum each theta [P] of the
    ensemble has its own amounts; the loss is that of the one run that the first says,
    the fit's own, for that is what would be trained. NaN where there is no optimum.
    """
    flops, params = asked.get("flops"), asked.get("params")
    tokens, ratio = asked.get("tokens"), asked.get("tokens_per_param")
    if len(asked) == 1:
        if flops:
            params, tokens = frontier.optimum(law, ensemble, flops, columns=columns)
        elif params:
            tokens = frontier.tokens_of(law, ensemble, params, columns=columns)
        else:
            params = frontier.params_of(law, ensemble, tokens, columns=columns)
    elif flops and ratio:
        params = math.sqrt(flops / 6 / ratio)
        tokens = flops / 6 / params
    elif flops:
        params = params or flops / 6 / tokens
        tokens = flops / 6 / params
    else:
        params = params or tokens / ratio
        tokens = tokens or params * ratio
    params, tokens = (np.broadcast_to(x, len(ensemble)) for x in (params, tokens))
    with np.errstate(all="ignore"):
        whole = np.full(len(ensemble), flops) if flops else 6 * params * tokens
        ratios = tokens / params
    return {
        "flops": whole,
        "params": params,
        "tokens": tokens,
        "tokens_per_param": ratios,
        "loss": loss(
            law, ensemble, params=params[0], tokens=tokens[0], columns=columns
        ),
    }


def loss(
    law, theta: np.ndarray, *, params: float, tokens: float, columns: Mapping
) -> np.ndarray:
    """Return the loss of one run under theta [..., P], nats per token."""
    at = {"params": params, "tokens": tokens, **columns}
    at = {name: np.array([value]) for name, value in at.items()}
    with np.errstate(all="ignore"):
        return law.loss(theta, at)[..., 0]
