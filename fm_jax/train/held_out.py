"""Held-out metrics along the way: what was asked to stop need not wait for them."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator

from fm_jax.errors import DivergedError
from fm_jax.evaluation import likelihood
from fm_jax.finetune.drift import Drift
from fm_jax.metrics import Clock
from fm_jax.prepare.opened import Data
from fm_jax.train import feeds
from fm_jax.train.compose import Parts
from fm_jax.train.step import TrainState
from fm_jax.watch import COMPILING, Watch

ASK_EVERY = 8  # batches between which several processes ask each other


class AskedError(Exception):
    """An evaluation was left, for a process was asked to stop."""


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Measures states on held-out text.

    is_asked: tells whether any process was asked to stop; all ask it together.
    """

    parts: Parts
    data: Data
    drift: Drift | None
    clock: Clock
    watch: Watch
    is_asked: Callable[[], bool]
    say: Callable[[str], None]

    def measure(
        self, step: int, state: TrainState, max_batches: int, *, is_short: bool = False
    ) -> dict[str, float]:
        """Return held-out metrics; raises DivergedError: an update may show here first.

        max_batches: 0 for all held-out text. Raises AskedError when a process is asked
        to stop meanwhile, unless it is short.
        """
        size = self.parts.config.eval.batch_size
        with self.clock.phase("eval"):
            batches = feeds.held_out(
                self.data.eval.windows, size, self.parts.layout, max_batches=max_batches
            )
            numbers = likelihood.evaluate(
                self.parts.eval_step,
                state.weights(),
                self._watched(batches, is_short=is_short),
                bayes=feeds.held_out_bayes(self.data, size, max_batches=max_batches),
                names=self.data.eval.names,
            )
        if not math.isfinite(numbers["loss"]):
            raise DivergedError("the held-out loss", numbers["loss"], step)
        if self.drift:
            with self.clock.phase("drift"):
                numbers |= self.drift.measure(self.parts.merged(state))
        return numbers

    def row(self, split: str, numbers: dict[str, float]) -> dict[str, float]:
        """Return held-out metrics as a row's; say so where they are too good."""
        if said := likelihood.below_bayes(numbers):
            self.say(f"WARNING: {said}")
        return {f"{split}/{name}": value for name, value in numbers.items()}

    def _watched(self, batches: Iterable, *, is_short: bool) -> Iterator:
        for number, batch in enumerate(batches):
            self.watch.beat(times=1 if number else COMPILING)
            if number % ASK_EVERY == 0 and not is_short and self.is_asked():
                raise AskedError
            yield batch
