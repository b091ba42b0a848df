"""One training run, from a checked config to a finished run folder."""

import contextlib
import math
import sys
from pathlib import Path

import jax

from fm_jax import config as configs
from fm_jax import machine, metrics, report
from fm_jax.checkpoints import Checkpoints, size_bytes
from fm_jax.cluster import together
from fm_jax.compiled import estimates
from fm_jax.errors import DivergedError, OutOfMemoryError, UserError
from fm_jax.evaluation import likelihood
from fm_jax.prepare import opened
from fm_jax.prepare.opened import Data
from fm_jax.runs import Run
from fm_jax.train import beginning, closing, compose, loop, opening, rows
from fm_jax.train import step as steps
from fm_jax.train.beginning import Beginning
from fm_jax.train.compose import Parts
from fm_jax.train.progress import Progress
from fm_jax.train.step import TrainState


def train(config: configs.Config, workdir: Path, command: list[str]) -> Run:
    """Train, or go on training, the run in `workdir`; return it when it is done.

    Raises UserError for what the user can mend, before a device is touched where that
    can be; DivergedError when a loss is no longer finite. Once the run has begun, the
    reason is left in its folder. All processes of a cluster call this; process 0 alone
    writes the folder, apart from checkpoints, which all write together.
    """
    run = Run(workdir, writes=together.is_main())
    clock = metrics.Clock()
    startup = {"import": machine.seconds_since_start()}
    with clock.phase("devices"):
        compose.use_compile_cache(config.train.compile_cache)
        compiles = metrics.CompileWatch()
        together.agree("the config", opening.identity(config.raw, workdir))
        together.shares_folder(workdir)
    earlier = together.on_main(lambda: opening.earlier_record(run, config.raw))
    with clock.phase("devices"):
        layout = compose.open_layout(config)
    with clock.phase("prepare_data"):
        data = together.each(lambda: opened.open_data(config, _print))
        together.agree("the data", opening.data_record(data))
        # Here plans of rows are made, where there are any.
        row_tokens = together.each(lambda: compose.row_tokens(data))
        together.each(lambda: len(data.eval))
    if earlier is not None:
        opening.refuse_other_data(run, earlier["data"], opening.data_record(data))
    config = compose.resolve(config, data.tokenizer)
    parts = compose.build(
        config,
        layout,
        corpus_tokens=data.train.num_targets,
        row_tokens=row_tokens,
        train_names=data.train.names,
        eval_names=data.eval.names,
    )
    if together.on_main(run.done_step) == parts.num_steps:
        _print(
            f"This run is done: {run.path}. Choose another --workdir for a new one, or "
            "raise its duration to go on."
        )
        return run
    # All at once: Orbax waits for all processes when it opens.
    saved = together.each(lambda: opening.saved_steps(run))
    together.each(lambda: opening.refuse_shorter(run, parts.num_steps, saved))
    begins = None
    if not saved:
        begins = together.each(lambda: beginning.find(config, data.tokenizer))
        opening.refuse_no_steps(parts.num_steps, begins)
    together.on_main(lambda: opening.require_room(run.path, size_bytes(parts.abstract)))
    init = begins.record() if begins else None
    # A run that still trains may have saved again while they looked.
    together.agree("what config.init.from names", init or {})
    if saved:
        init = earlier["resolved"]["init"]
    record = opening.record(parts, data, command, earlier, run.path, init)
    lines = opening.plan(parts, data, run)

    with contextlib.ExitStack() as stack:
        together.on_main(lambda: stack.enter_context(run.held()))
        together.on_main(run.begin)
        table = rows.Table(run, parts, data, record)
        trainer = _Trainer(run, parts, data, clock, startup, compiles, table)
        try:
            together.on_main(lambda: run.write_config(record))
            together.on_main(
                lambda: run.write("tokenizer.json", data.tokenizer.to_json())
            )
            with parts.layout.active():
                trainer.train(begins, lines, goes_on=earlier is not None)
        except BaseException as error:
            if estimates.is_out_of_memory(error):
                error = OutOfMemoryError(
                    closing.memory_table(error, parts, trainer.step_fn)
                )
            with contextlib.suppress(UserError):
                if isinstance(error, DivergedError):
                    table.diverged(error.step)
                if not run.done_step():
                    run.write("FAILED", f"{type(error).__name__}: {error}\n")
            raise error
    return run


class _Trainer:
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

    def train(
        self, begins: Beginning | None, lines: list[str], *, goes_on: bool
    ) -> None:
        parts, config = self.parts, self.config
        for line in lines:
            self._say(line)
        self.run.log("weight decay on: " + ", ".join(opening.decayed(parts)))
        with contextlib.ExitStack() as stack:
            saved = Checkpoints(
                self.run.checkpoints,
                writes=True,
                keep=config.checkpoint.keep,
                keep_best=config.checkpoint.keep_best,
                keep_every=config.checkpoint.keep_every,
            )
            stack.callback(saved.close)
            state, start = self._first_state(saved, begins, goes_on)
            with self.clock.phase("compile"):
                self.step_fn = parts.train_step.lower(
                    parts.abstract, parts.abstract_batch(config.train.batch_size)
                ).compile()
            # With the state, and what the compiler has left behind.
            self.held_before = machine.memory_bytes()
            with self.clock.phase("measure"):
                self.peak, source = metrics.peak_flops(config.model.dtype)
            self._say(
                f"{self.compiles.line()}; machine peak {self.peak / 1e9:,.0f} GFLOP/s "
                f"({source}, {config.model.dtype})"
            )
            self.progress = Progress(parts.num_steps, start, is_shown=self.run.writes)
            stack.callback(self.progress.close)
            state = loop.run(
                state,
                self.step_fn,
                compose.train_batches(parts, self.data, start),
                parts.put,
                start=start,
                stop=parts.num_steps,
                clock=self.clock,
                hooks=loop.Hooks(
                    on_metrics=self._on_metrics,
                    is_due=lambda step: self._evaluates(step) or self._saves(step),
                    on_step=lambda step, state: self._on_step(step, state, saved),
                ),
            )
            self.progress.close()
            final = self._evaluate(parts.num_steps, state, max_batches=0)
            with self.clock.phase("checkpoint"):
                saved.wait()
        self._sample(state)
        self._finish(final)

    def _first_state(
        self, saved: Checkpoints, begins: Beginning | None, goes_on: bool
    ) -> tuple[TrainState, int]:
        found = together.on_main(saved.steps) if goes_on else []
        step = found[-1] if found else 0
        self.run.rewind(step)
        if found:
            with self.clock.phase("restore"):
                held = saved.restore(step, self.parts.state_parts(self.parts.abstract))
            self._say(f"Going on from step {step:,} of {self.run.path}")
            return self.parts.state_of(held), step
        if begins:
            with self.clock.phase("restore"):
                state = beginning.first_state(self.parts, begins)
            what = "state" if begins.with_optimizer else "weights"
            self._say(
                f"Beginning with the {what} of step {begins.step:,} of {begins.path}"
            )
            return state, begins.start
        with self.clock.phase("init"):
            state = self.parts.init(jax.random.key(self.config.train.seed))
            return jax.block_until_ready(state), 0

    # ---- along the way

    def _evaluates(self, step: int) -> bool:
        every = self.config.eval.every
        return every > 0 and (step % every == 0 or step == self.parts.num_steps)

    def _saves(self, step: int) -> bool:
        every = self.config.checkpoint.every
        return step == self.parts.num_steps or (every > 0 and step % every == 0)

    def _on_step(self, step: int, state: TrainState, saved: Checkpoints) -> None:
        with self.rate.paused():
            self._evaluate_and_save(step, state, saved)

    def _evaluate_and_save(self, step, state, saved) -> None:
        row = {}
        if self._evaluates(step):
            numbers = self._evaluate(step, state, self.config.eval.max_batches)
            row = self._row("eval", numbers)
            self.run.append({"step": step, **row})
            if step < self.parts.num_steps:
                self.table.add(step, numbers)
            above = closing.above_bayes(numbers)
            self._say(
                f"step {step}: held-out loss {numbers['loss']:.4f} nats/token, "
                f"{numbers['bits_per_byte']:.4f} bits/byte{above}"
            )
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
        steps_per_second = self.rate.steps_per_second()
        speed = steps_per_second * self.parts.tokens_per_step
        mfu = speed * self.parts.flops_per_token / self.peak
        if step % self.config.log.every == 0 or step == self.parts.num_steps:
            seen = self.data.tokens_seen(step, self.config.train.batch_size)
            row = {"step": step, **numbers, **seen}
            if speed:
                row |= {"perf/tokens_per_second": speed, "perf/mfu": mfu}
            self.run.append(row)
        shown = {
            "loss": numbers["train/loss"],
            "bits_per_byte": numbers["train/bits_per_byte"],
        }
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
                compose.held_out(
                    self.data.eval.windows,
                    self.config.eval.batch_size,
                    self.parts.layout,
                    max_batches=max_batches,
                ),
                bayes=compose.held_out_bayes(
                    self.data, self.config.eval.batch_size, max_batches=max_batches
                ),
                names=self.data.eval.names,
            )
        if not math.isfinite(numbers["loss"]):
            raise DivergedError("the held-out loss", numbers["loss"], step)
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
            _print(f"\n--- a sample, going on from {prompt!r}:\n{text}\n---\n")

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
        try:
            predicted = closing.predicted(
                self.parts, self.step_fn, self.peak, self.held_before
            )
        except Exception as error:  # of a compiler whose text we never read: no harm
            self._say(f"nothing can be said of what was predicted ({error!r})")
        else:
            run.append({"step": last, **predicted})
        together.on_main(lambda: report.write([run.path], run.path / "report.html"))
        _print(closing.what_next(run, self.config.sample))

    def _say(self, line: str) -> None:
        self.run.log(line)
        (self.progress.say if self.progress else _print)(line)


def _print(line: str) -> None:
    if together.is_main():
        print(line, file=sys.stderr, flush=True)
