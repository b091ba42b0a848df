"""What a step that went wrong trained on, and what the state was like there."""

import collections
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax import trees
from fm_jax.config import Config
from fm_jax.events import Events
from fm_jax.prepare import opened, show
from fm_jax.prepare.opened import Data
from fm_jax.runs import Run
from fm_jax.train.step import TrainState

SIGMAS, WINDOW, LEAST = 6.0, 128, 32
HIGH = 2.0  # times the best loss
MOST = 8  # odd steps that one start keeps


class Spikes:
    """Tells losses that are far above the last ones: `SIGMAS` of the last `WINDOW`.

    A start begins without any; the first `LEAST` losses are never a spike.
    """

    def __init__(self):
        self.losses: collections.deque[float] = collections.deque(maxlen=WINDOW)

    def is_one(self, loss: float) -> bool:
        """Return whether a loss is a spike, and count it among the last where not."""
        if (count := len(self.losses)) >= LEAST:
            mean = math.fsum(self.losses) / count
            variance = math.fsum((x - mean) ** 2 for x in self.losses) / count
            if loss > mean + SIGMAS * math.sqrt(variance):
                return True
        self.losses.append(loss)
        return False


class Oddities:
    """The steps of a run that went wrong: told, and kept in its folder `odd`.

    steps: those that are still to be kept, and why each is thought so.
    """

    def __init__(
        self,
        run: Run,
        data: Data,
        config: Config,
        events: Events,
        say: Callable[[str], None],
    ):
        self.steps: dict[int, str] = {}
        self._run, self._data, self._config = run, data, config
        self._events, self._say = events, say
        self._spikes, self._left = Spikes(), MOST
        self._best, self._high = math.inf, 0

    def add(self, step: int, why: str) -> None:
        """Note a step that went wrong."""
        self.steps[step] = why

    def look(self, step: int, loss: float) -> None:
        """Note a step whose loss is a spike; say it once where losses stay high."""
        self._best = min(self._best, loss)
        self._high = self._high + 1 if loss > HIGH * self._best else 0
        if self._high == WINDOW:
            self._say(
                f"WARNING: the loss is over {HIGH:g} times its best, {self._best:.4g}, "
                f"for {WINDOW} steps: this run may have diverged"
            )
        if self._spikes.is_one(loss):
            usual = math.fsum(self._spikes.losses) / len(self._spikes.losses)
            self.add(step, f"its loss {loss:.4g} is a spike over {usual:.4g}")

    def dissect(self, now: int, state: TrainState) -> None:
        """Keep the batches of what was noted, and the norms of the state after `now`.

        All processes call this together, and one writes.
        """
        for step, why in self.steps.items():
            self._events.add("odd", step, why=why)
            self._say(f"WARNING: step {step}: {why}")
            self._left -= 1
            if self._left < 0:
                continue
            found = {"norms_after_step": now, "last_losses": list(self._spikes.losses)}
            found |= norms(state)
            if self._run.writes:
                folder = self._run.path / "odd"
                place = write(folder, step, why, self._data, self._config, found)
                self._say(
                    f"  its batch and the norms of the state are in {place}; fm replay "
                    f"--run={self._run.path} --step={step} makes it again"
                )
        self.steps.clear()


def write(
    folder: Path,
    step: int,
    why: str,
    data: Data,
    config: Config,
    numbers: dict[str, Any],
) -> Path:
    """Write what a step trained on, decoded, and `numbers`; return the step's folder.

    batch.txt has the documents of each row, batch.npz the arrays, numbers.json the
    rest.
    """
    place = folder / f"step-{step}"
    place.mkdir(parents=True, exist_ok=True)
    rows = np.arange(config.train.batch_size)
    plan = opened.train_plan(data, config, num_steps=step, rows=rows)
    told = {"names": data.train.names, "labels": data.labels}
    # Steps are counted from 1 where they are done, and from 0 where they are read.
    lines = show.lines(plan, data.tokenizer, step - 1, rows=rows, **told)
    (place / "batch.txt").write_text("".join(f"{line}\n" for line in lines))
    np.savez(place / "batch.npz", **plan[step - 1])
    found = {"step": step, "why": why} | numbers
    (place / "numbers.json").write_text(json.dumps(_finite(found), indent=1) + "\n")
    return place


def norms(state: TrainState, gradient: Any = None) -> dict[str, Any]:
    """Return the 2-norm of each leaf by path; of stacked layers that of each layer.

    Of the parameters that train, of the optimizer's moments and of a gradient.
    """
    trees_of = {"params": state.params, "optimizer": state.opt_state}
    if gradient is not None:
        trees_of["gradient"] = gradient
    found = jax.tree.map(np.asarray, _norms(trees_of))
    return {
        name: {path: x.tolist() for path, x in trees.leaves_by_path(tree).items()}
        for name, tree in found.items()
    }


@jax.jit
def _norms(tree: Any) -> Any:
    def norm(path, x):
        x = x.astype(jnp.float32)
        is_stacked = "blocks" in trees.path_name(path).split("/") and x.ndim
        over = tuple(range(1 if is_stacked else 0, x.ndim))
        return jnp.sqrt(jnp.sum(jnp.square(x), axis=over))

    return jax.tree_util.tree_map_with_path(norm, tree)


def _finite(value: Any) -> Any:
    """Return what JSON can hold: numbers that are not finite become their names."""
    of: dict[type, Callable] = {
        dict: lambda x: {k: _finite(v) for k, v in x.items()},
        list: lambda x: [_finite(v) for v in x],
        float: lambda x: x if math.isfinite(x) else str(x),
    }
    return of.get(type(value), lambda x: x)(value)
