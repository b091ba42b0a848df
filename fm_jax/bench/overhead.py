"""What a step costs the host beside the device's work: its own seconds, not the wall's.

Of the host's thread the seconds of CPU count, so that neither the device, which is
waited for between two steps, nor another process is taken for overhead.
"""

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from fm_jax.train.compose import Parts

WARM_UP = 3


def host_seconds(
    parts: Parts,
    state: Any,
    batches: Iterable[dict[str, np.ndarray]],
    *,
    step_fn: Callable | None = None,
) -> float:
    """Return the host's seconds for a step: batch put, step begun, its numbers read.

    batches: on the host, more than WARM_UP. state: used up. step_fn: the compiled step;
    None compiles it. The median over the batches.
    """
    if step_fn is None:
        with parts.layout.active():
            step_fn = parts.train_step.lower(
                parts.abstract, parts.abstract_batch(parts.config.train.batch_size)
            ).compile()
    seconds = []
    for batch in batches:
        jax.block_until_ready(state)
        began = time.thread_time()
        state, numbers = step_fn(state, parts.put(batch))
        begun = time.thread_time() - began
        jax.block_until_ready(numbers)
        began = time.thread_time()
        for value in numbers.values():
            float(np.asarray(value))
        seconds.append(begun + time.thread_time() - began)
    return statistics.median(seconds[WARM_UP:])
