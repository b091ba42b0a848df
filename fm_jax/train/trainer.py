"""What a run does once its parts are there: first weights, steps, and the end."""

import contextlib
import sys

import jax

from fm_jax import machine, metrics
from fm_jax.checkpoints import Checkpoints
from fm_jax.cluster import together
from fm_jax.errors import DivergedError, StoppedError
from fm_jax.events import Events
from fm_jax.finetune.drift import Drift
from fm_jax.prepare.opened import Data
from fm_jax.runs import Run
from fm_jax.train import (
    autopsy,
    closing,
    ending,
    feeds,
    first,
    loop,
    opening,
    rewinding,
    rows,
)
from fm_jax.train import step as steps
from fm_jax.train.beginning import Beginning
from fm_jax.train.compose import Parts
from fm_jax.train.held_out import AskedError, HeldOut
from fm_jax.train.progress import Progress
from fm_jax.train.step import VOTES, TrainState
from fm_jax.watch import COMPILING, Watch


class Trainer:
    """What a run holds while its steps go by."""

    def __init__(
        self,
        run: Run,
        parts: Parts,
        data: Data,
        clock: metrics.Clock,
        startup: dict[str, float],
        compiles: metrics.CompileWatch,
        table: rows.Table,
        events: Events,
        watch: Watch,
        num_rewinds: int = 0,
    ):
        self.run, self.parts, self.data = run, parts, data
        self.config = parts.config
        self.clock, self.startup, self.compiles = clock, startup, compiles
        self.table, self.events, self.watch = table, events, watch
        self.num_rewinds = num_rewinds
        self.left_out: list[int] = []  # steps
        self.is_stopping = False  # once it is true all processes know
        self.saving: int | None = None  # a step that may not be whole yet
        self.odd = autopsy.Oddities(run, data, parts.config, events, self.say)
        self.rate = loop.Rate()
        self.held_before, self.step_fn = 0, None
        self.progress: Progress | None = None
        self.drift: Drift | None = None
        self.held_out: HeldOut | None = None
        self.peak = 0.0
        self.flops_per_token = parts.flops_per_token  # too dear to ask for each step

    def train(
        self, begins: Beginning | None, lines: list[str], *, goes_on: bool
    ) -> None:
        parts, config = self.parts, self.config
        for line in lines:
            self.say(line)
        self.run.log("weight decay on: " + ", ".join(opening.decayed(parts)))
        with contextlib.ExitStack() as stack:
            stack.callback(self.compiles.end)
            saved = Checkpoints(
                self.run.checkpoints,
                writes=True,
                keep=config.checkpoint.keep,
                keep_best=config.checkpoint.keep_best,
                keep_every=config.checkpoint.keep_every,
            )
            stack.callback(saved.close)
            stack.callback(self.watch.rest)
            self.watch.beat(times=COMPILING)
            self.left_out = together.on_main(lambda: rewinding.left_out(self.run))
            state, start, is_own = first.state(self, saved, begins, goes_on=goes_on)
            self.held_out = HeldOut(
                parts, self.data, self.drift, self.clock, self.watch,
                self._is_asked, self.say,
            )  # fmt: skip
            while parts.num_steps:
                try:
                    state = self._steps(state, start, saved, stack, is_own=is_own)
                    break
                except DivergedError as error:
                    if not rewinding.goes_back(self, error.step, saved):
                        raise
                state, start, is_own = first.state(self, saved, begins, goes_on=True)
            if not parts.num_steps:
                self._save(0, state, saved, None)
            try:
                final = self.held_out.measure(parts.num_steps, state, max_batches=0)
            except AskedError:
                self._stop(parts.num_steps, saved)
            with self.clock.phase("checkpoint"):
                saved.wait()
            self.watch.is_saved = True
            self.events.add("saved", parts.num_steps)
        ending.sample(self, state)
        ending.finish(self, final)

    def _steps(
        self,
        state: TrainState,
        start: int,
        saved: Checkpoints,
        stack: contextlib.ExitStack,
        *,
        is_own: bool,
    ) -> TrainState:
        """Return the state after all steps."""
        parts = self.parts
        rows = self.config.train.batch_size
        self.step_fn = self.step_fn or self.compiled(
            parts.train_step, parts.abstract, parts.abstract_batch(rows)
        )
        # With the state, and what the compiler has left behind.
        self.held_before = machine.memory_bytes()
        self.say(self.compiles.line())
        if self._is_asked():
            raise StoppedError(start if is_own else None)
        self.watch.beat(times=COMPILING)
        self.events.add("ready", start)
        if is_own and self._evaluates(start) and not self._is_evaluated(start):
            with contextlib.suppress(AskedError):  # the first step sees to it
                self._evaluate_at(start, state)  # as it was left when the run stopped
        self.watch.error = None  # from here on a step ends before all stops
        self.progress = Progress(parts.num_steps, start, is_shown=self.run.writes)
        stack.callback(self.progress.close)
        state = loop.run(
            state,
            loop.guarded(
                self.step_fn,
                "state",
                "batch",
                expected=(parts.abstract, parts.abstract_batch(rows)),
            ),
            feeds.train_batches(parts, self.data, start),
            lambda batch: parts.with_vote(parts.put(batch), stop=self._must(saved)),
            start=start,
            stop=parts.num_steps,
            clock=self.clock,
            overlap=loop.overlaps(self.step_fn),
            left_out=set(self.left_out),
            leave_out=parts.leave_out,
            hooks=loop.Hooks(
                on_metrics=self._on_metrics,
                is_due=lambda step: (
                    not self.peak
                    or self.odd.steps
                    or self._stops(saved)
                    or self._evaluates(step)
                    or self._saves(step)
                ),
                on_step=lambda step, state: self._on_step(step, state, saved),
                on_skip=self._on_skip,
                max_skips=self.config.train.max_skips,
            ),
        )
        self.progress.close()
        return state

    def compiled(self, program: jax.stages.Wrapped, *args) -> jax.stages.Compiled:
        """Return a program compiled for `args`, shapes or arrays."""
        with self.clock.phase("trace"):
            lowered = program.lower(*args)
        with self.clock.phase("compile"):
            return lowered.compile()

    # ---- along the way

    def _evaluates(self, step: int) -> bool:
        every = self.config.eval.every
        return every > 0 and (step % every == 0 or step == self.parts.num_steps)

    def _saves(self, step: int) -> bool:
        every = self.config.checkpoint.every
        return step == self.parts.num_steps or (every > 0 and step % every == 0)

    def _is_asked(self) -> bool:
        """Return whether any process was asked to stop; all must ask together."""
        self.is_stopping |= together.any_of(self.watch.is_asked)
        return self.is_stopping

    def _must(self, saved: Checkpoints) -> bool:
        """Return whether this process must stop: asked to, or a save has failed."""
        return self.watch.is_asked or saved.has_failed

    def _stops(self, saved: Checkpoints) -> bool:
        """Return whether this step is the last; of several processes votes tell."""
        self.is_stopping |= self._must(saved) and together.count() == 1
        return self.is_stopping

    def _on_step(self, step: int, state: TrainState, saved: Checkpoints) -> None:
        with self.rate.paused():
            if not self.peak:
                self._measure_peak()
            self.odd.dissect(step, state)
            try:
                measured = None
                if self._evaluates(step) and not self._stops(saved):
                    measured = self._evaluate_at(step, state)
                elif self._saves(step) or self._stops(saved):
                    # What has no loss is not worth saving.
                    self.held_out.measure(step, state, 1, is_short=True)
            except AskedError:
                pass
            if self._saves(step) or self._stops(saved):
                self._save(step, state, saved, measured)
        if self._stops(saved) and step < self.parts.num_steps:
            self._stop(step, saved)
        self.watch.beat()

    def _save(self, step, state, saved, measured: dict[str, float] | None) -> None:
        """Begin to save; the one before is whole then."""
        self.watch.beat(times=COMPILING)
        with self.clock.phase("checkpoint"):
            saved.wait()
            if self.saving is not None:
                self.events.add("saved", self.saving)
            self.saving = step
            self.events.add("save", step)
            saved.save(step, self.parts.state_parts(state), measured)

    def _stop(self, step: int, saved: Checkpoints) -> None:
        """Raise StoppedError when what was saved is whole."""
        with self.clock.phase("checkpoint"):
            saved.wait()
        self.watch.is_saved = True
        self.events.add("saved", step)
        raise StoppedError(step)

    def _measure_peak(self) -> None:
        """Measure what the machine can do; after the first step, which waits for none.

        No step may run meanwhile.
        """
        dtype = self.config.model.dtype
        with self.clock.phase("measure"):
            self.peak, source = metrics.peak_flops(dtype)
        self.say(f"machine peak {self.peak / 1e9:,.0f} GFLOP/s ({source}, {dtype})")

    def _is_evaluated(self, step: int) -> bool:
        return together.on_main(lambda: step in self.run.series("eval/loss")[0])

    def _evaluate_at(self, step: int, state: TrainState) -> dict[str, float]:
        """Write held-out metrics of a step; return what its checkpoint keeps of them.

        Raises AskedError when a process is asked to stop meanwhile.
        """
        numbers = self.held_out.measure(step, state, self.config.eval.max_batches)
        row = self.held_out.row("eval", numbers)
        self.run.append({"step": step, **row})
        self.events.add("eval", step)
        if step < self.parts.num_steps:
            self.table.add(step, numbers)
        above = closing.above_bayes(numbers)
        self.say(f"step {step}: held-out {closing.shown(numbers)}{above}")
        return {"eval/loss": row["eval/loss"]}

    def _on_skip(self, step: int, name: str, numbers: dict[str, float]) -> None:
        """Write that a step changed nothing; it is done all the same."""
        self._hear(numbers)
        self.run.append({"step": step, "train/skipped": 1})
        self.odd.add(step, f"{name} is {numbers[name]}: it changed nothing")

    def _hear(self, numbers: dict[str, float]) -> None:
        """Take note that a step is done, and of the votes of several processes."""
        self.watch.beat()
        self.watch.is_saved = False
        self.is_stopping |= numbers.pop(VOTES, 0) > 0

    def _on_metrics(self, step: int, numbers: dict[str, float]) -> None:
        self._hear(numbers)
        self.odd.look(step, numbers["train/loss"])
        numbers = steps.present(numbers)
        self.table.note(step, numbers)
        self.rate.add(step)
        if "total" not in self.startup:
            self._record_startup(step)
            self.events.add("first step", step)
            self.compiles.guard(self.clock, self.say)
        steps_per_second = self.rate.steps_per_second()
        speed = steps_per_second * self.parts.tokens_per_step
        # Of the first step nothing is known yet: neither speed nor peak.
        mfu = speed * self.flops_per_token / self.peak if speed else 0.0
        if step % self.config.log.every == 0 or step == self.parts.num_steps:
            seen = self.data.tokens_seen(step, self.config.train.batch_size)
            row = {"step": step, **numbers, **seen}
            if speed:
                row |= {"perf/tokens_per_second": speed, "perf/mfu": mfu}
            self.run.append(row)
        is_text = "train/bits_per_byte" in numbers
        names = ("loss", "bits_per_byte" if is_text else "accuracy")
        shown = {name: numbers[f"train/{name}"] for name in names}
        left = None
        if speed:
            shown |= {"tokens_per_second": speed, "mfu": mfu}
            left = (self.parts.num_steps - step) / steps_per_second
        self.progress.update(step, shown, left)

    def _record_startup(self, step: int) -> None:
        self.clock.settle()
        self.startup |= self.clock.seconds | {"total": machine.seconds_since_start()}
        row = {
            f"startup/{name}_seconds": round(seconds, 3)
            for name, seconds in self.startup.items()
        }
        self.run.append({"step": step, **row})
        shown = ", ".join(
            f"{name} {seconds:.1f}"
            for name, seconds in self.startup.items()
            if name != "total" and seconds >= 0.05
        )
        self.say(f"first step after {self.startup['total']:.1f} s: {shown}")

    def say(self, line: str) -> None:
        """Write a line to the log, and show it."""
        self.run.log(line)
        (self.progress.say if self.progress else say)(line)

    def show(self, text: str) -> None:
        """Show a text that is not for the log."""
        say(text)


def say(line: str) -> None:
    if together.is_main():
        print(line, file=sys.stderr, flush=True)
