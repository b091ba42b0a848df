"""What a run does once its parts are there: first weights, steps, and the end."""

import contextlib
import json
import math
import sys

import jax

from fm_jax import machine, metrics, report
from fm_jax.checkpoints import Checkpoints
from fm_jax.cluster import together
from fm_jax.errors import DivergedError
from fm_jax.evaluation import likelihood
from fm_jax.finetune.drift import Drift
from fm_jax.prepare.opened import Data
from fm_jax.runs import Run
from fm_jax.train import aims, beginning, closing, feeds, loop, opening, rows, tuned
from fm_jax.train import step as steps
from fm_jax.train.beginning import Beginning
from fm_jax.train.compose import Parts
from fm_jax.train.progress import Progress
from fm_jax.train.step import TrainState


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
    ):
        self.run, self.parts, self.data = run, parts, data
        self.config = parts.config
        self.clock, self.startup, self.compiles = clock, startup, compiles
        self.table = table
        self.rate = loop.Rate()
        self.held_before, self.step_fn = 0, None
        self.progress: Progress | None = None
        self.drift: Drift | None = None
        self.peak = 0.0
        self.flops_per_token = parts.flops_per_token  # too dear to ask for each step

    def train(
        self, begins: Beginning | None, lines: list[str], *, goes_on: bool
    ) -> None:
        parts, config = self.parts, self.config
        for line in lines:
            self._say(line)
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
            state, start = self._first_state(saved, begins, goes_on)
            if parts.num_steps:
                state = self._steps(state, start, saved, stack)
            else:
                self._only_save(state, saved)
            final = self._evaluate(parts.num_steps, state, max_batches=0)
            with self.clock.phase("checkpoint"):
                saved.wait()
        self._sample(state)
        self._finish(final)

    def _steps(
        self,
        state: TrainState,
        start: int,
        saved: Checkpoints,
        stack: contextlib.ExitStack,
    ) -> TrainState:
        """Return the state after all steps."""
        parts = self.parts
        rows = self.config.train.batch_size
        self.step_fn = self._compiled(
            parts.train_step, parts.abstract, parts.abstract_batch(rows)
        )
        # With the state, and what the compiler has left behind.
        self.held_before = machine.memory_bytes()
        self._say(self.compiles.line())
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
            parts.put,
            start=start,
            stop=parts.num_steps,
            clock=self.clock,
            overlap=loop.overlaps(self.step_fn),
            hooks=loop.Hooks(
                on_metrics=self._on_metrics,
                is_due=lambda step: (
                    not self.peak or self._evaluates(step) or self._saves(step)
                ),
                on_step=lambda step, state: self._on_step(step, state, saved),
            ),
        )
        self.progress.close()
        return state

    def _only_save(self, state: TrainState, saved: Checkpoints) -> None:
        """Save the state of a run that takes no step."""
        with self.clock.phase("checkpoint"):
            saved.save(0, self.parts.state_parts(state), None)

    def _first_state(
        self, saved: Checkpoints, begins: Beginning | None, goes_on: bool
    ) -> tuple[TrainState, int]:
        """Return the state to go on from and its step."""
        found = together.on_main(saved.steps) if goes_on else []
        step = found[-1] if found else 0
        self.run.rewind(step)
        params = None
        if begins and not begins.with_optimizer:
            with self.clock.phase("restore"):
                params, lines = beginning.first_params(self.parts, begins)
            for line in lines:
                self._say(line)
            self._look_back(params, begins)
        if found:
            with self.clock.phase("restore"):
                state = beginning.restored(self.parts, saved, step, params)
            self._say(f"Going on from step {step:,} of {self.run.path}")
            return state, step
        if params is not None:
            if self.config.finetune.method in tuned.PROBED:
                with self.clock.phase("probe"):
                    params, line, record = tuned.probed(self.parts, self.data, params)
                self._say(line)
                self.run.write("probe.json", json.dumps(record, indent=1) + "\n")
            return beginning.first_state(self.parts, params), 0
        if begins:
            with self.clock.phase("restore"):
                state = beginning.same_state(self.parts, begins)
            self._say(
                f"Beginning with the state of step {begins.step:,} of {begins.path}"
            )
            return state, begins.start
        key = jax.random.key(self.config.train.seed)
        init = self._compiled(self.parts.init, key)
        with self.clock.phase("init"):
            return jax.block_until_ready(init(key)), 0

    def _compiled(self, program: jax.stages.Wrapped, *args) -> jax.stages.Compiled:
        """Return a program compiled for `args`, shapes or arrays."""
        with self.clock.phase("trace"):
            lowered = program.lower(*args)
        with self.clock.phase("compile"):
            return lowered.compile()

    def _look_back(self, params: dict, begins: Beginning) -> None:
        """Keep what the first weights say of the examples, where it is asked for."""
        if aims.needs_reference(self.config):
            with self.clock.phase("reference"):
                self.data = tuned.with_references(
                    self.parts, self.data, params, begins, self._say
                )
        with self.clock.phase("drift"):
            self.drift = tuned.drift(self.parts, self.data, params)

    # ---- along the way

    def _evaluates(self, step: int) -> bool:
        every = self.config.eval.every
        return every > 0 and (step % every == 0 or step == self.parts.num_steps)

    def _saves(self, step: int) -> bool:
        every = self.config.checkpoint.every
        return step == self.parts.num_steps or (every > 0 and step % every == 0)

    def _on_step(self, step: int, state: TrainState, saved: Checkpoints) -> None:
        with self.rate.paused():
            if not self.peak:
                self._measure_peak()
            self._evaluate_and_save(step, state, saved)

    def _measure_peak(self) -> None:
        """Measure what the machine can do; after the first step, which waits for none.

        No step may run meanwhile.
        """
        dtype = self.config.model.dtype
        with self.clock.phase("measure"):
            self.peak, source = metrics.peak_flops(dtype)
        self._say(f"machine peak {self.peak / 1e9:,.0f} GFLOP/s ({source}, {dtype})")

    def _evaluate_and_save(self, step, state, saved) -> None:
        row = {}
        if self._evaluates(step):
            numbers = self._evaluate(step, state, self.config.eval.max_batches)
            row = self._row("eval", numbers)
            self.run.append({"step": step, **row})
            if step < self.parts.num_steps:
                self.table.add(step, numbers)
            above = closing.above_bayes(numbers)
            self._say(f"step {step}: held-out {closing.shown(numbers)}{above}")
        elif self._saves(step):
            self._evaluate(step, state, 1)  # what has no loss is not worth saving
        if self._saves(step):
            with self.clock.phase("checkpoint"):
                measured = {"eval/loss": row["eval/loss"]} if row else None
                saved.save(step, self.parts.state_parts(state), measured)

    def _on_metrics(self, step: int, numbers: dict[str, float]) -> None:
        numbers = steps.present(numbers)
        self.table.note(step, numbers)
        self.rate.add(step)
        if "total" not in self.startup:
            self._record_startup(step)
            self.compiles.guard(self.clock, self._say)
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
        self._say(f"first step after {self.startup['total']:.1f} s: {shown}")

    def _evaluate(
        self, step: int, state: TrainState, max_batches: int
    ) -> dict[str, float]:
        """Return held-out metrics; raises DivergedError: an update may show here first.

        max_batches: 0 for all held-out text.
        """
        with self.clock.phase("eval"):
            numbers = likelihood.evaluate(
                self.parts.eval_step,
                state.weights(),
                feeds.held_out(
                    self.data.eval.windows,
                    self.config.eval.batch_size,
                    self.parts.layout,
                    max_batches=max_batches,
                ),
                bayes=feeds.held_out_bayes(
                    self.data, self.config.eval.batch_size, max_batches=max_batches
                ),
                names=self.data.eval.names,
            )
        if not math.isfinite(numbers["loss"]):
            raise DivergedError("the held-out loss", numbers["loss"], step)
        if self.drift:
            with self.clock.phase("drift"):
                numbers |= self.drift.measure(self.parts.merged(state))
        return numbers

    def _row(self, split: str, numbers: dict[str, float]) -> dict[str, float]:
        """Return held-out metrics as a row's; say so where they are too good."""
        if said := likelihood.below_bayes(numbers):
            self._say(f"WARNING: {said}")
        return {f"{split}/{name}": value for name, value in numbers.items()}

    # ---- the end

    def _sample(self, state: TrainState) -> None:
        with self.clock.phase("sample"):
            texts = closing.samples(self.parts, self.data, state)
        for text in texts:
            self.run.append(
                {"step": self.parts.num_steps, "text": text}, "samples.jsonl"
            )
            prompt = self.config.sample.prompt
            say(f"\n--- a sample, going on from {prompt!r}:\n{text}\n---\n")

    def _finish(self, final: dict[str, float]) -> None:
        run, last = self.run, self.parts.num_steps
        with self.clock.phase("measure"):
            # Again, and the better: a busy moment at the start would flatter the MFU.
            self.peak = max(self.peak, metrics.peak_flops(self.config.model.dtype)[0])
        speed = closing.speed(run, self.parts, self.peak)
        if speed:
            self._say(closing.speed_line(speed, self.peak))
        self.clock.settle()
        gzip_bits = self.data.eval.gzip_bits_per_byte
        run.append(
            {
                "step": last,
                **self._row("final", final),
                **({} if gzip_bits is None else {"gzip/bits_per_byte": gzip_bits}),
                **closing.machine_row(self.compiles, self.peak),
                **speed,
                **{f"time/{n}_seconds": s for n, s in self.clock.seconds.items()},
            }
        )
        self._say(closing.held_out_line(self.data.eval, final))
        self.table.add(last, final)
        run.write("DONE", f"{last}\n")
        if self.step_fn is not None:
            self._predict()
        together.on_main(lambda: report.write([run.path], run.path / "report.html"))
        say(closing.what_next(run, self.config))

    def _predict(self) -> None:
        """Append what the compiled step was to need, and what it took."""
        run, last = self.run, self.parts.num_steps
        try:
            predicted = closing.predicted(
                self.parts, self.step_fn, self.peak, self.held_before
            )
        except Exception as error:  # of a compiler whose text we never read: no harm
            self._say(f"nothing can be said of what was predicted ({error!r})")
        else:
            run.append({"step": last, **predicted})

    def _say(self, line: str) -> None:
        self.run.log(line)
        (self.progress.say if self.progress else say)(line)


def say(line: str) -> None:
    if together.is_main():
        print(line, file=sys.stderr, flush=True)
