"""One training run, from a checked config to a finished run folder."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from fm_jax import config as configs
from fm_jax import events, machine, metrics
from fm_jax.checkpoints import size_bytes
from fm_jax.cluster import launchers, together
from fm_jax.compiled import estimates
from fm_jax.errors import (
    DivergedError,
    OutOfMemoryError,
    StoppedError,
    UserError,
    exit_status,
)
from fm_jax.hf import adopt
from fm_jax.prepare import opened
from fm_jax.runs import Run
from fm_jax.tokenizers import template
from fm_jax.trackers import named
from fm_jax.trackers.feed import Feed
from fm_jax.train import aims, beginning, closing, compose, feeds, opening, rows
from fm_jax.train.trainer import Trainer, say
from fm_jax.watch import Watch


def train(
    config: configs.Config,
    workdir: Path,
    command: list[str],
    watch: Watch | None = None,
    num_rewinds: int = 0,
    track: Sequence[str] = (),
) -> Run:
    """Train, or go on training, the run in `workdir`; return it when it is done.

    Raises UserError for what the user can mend, before a device is touched where that
    can be; DivergedError when a loss is no longer finite. Once the run has begun, the
    reason is left in its folder. All processes of a cluster call this; process 0 alone
    writes the folder, apart from checkpoints, which all write together, and the exit
    status that each leaves in exits/.

    num_rewinds: how often a run that diverges goes back to its last checkpoint, leaving
    out the batches since. watch: hears of signals; None: nothing does. Raises
    StoppedError when the run was asked to stop, and what it did is saved. track: the
    trackers that get its metrics as well, as `named.check` returns them.
    """
    watch = watch or Watch()
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
        promised = launchers.promised_gpus(os.environ)
        together.each(lambda: opening.refuse_no_gpu(promised))
        layout = compose.open_layout(config)
    with clock.phase("prepare_data"):
        data = together.each(lambda: opened.open_data(config, say))
        together.agree("the data", opening.data_record(data))
        # Here plans of rows are made, where there are any.
        row_tokens = together.each(lambda: feeds.row_tokens(data))
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
        answers=aims.answers_of(data),
    )
    done = together.on_main(lambda: run.done_step() if run.is_done() else None)
    if done == parts.num_steps:
        say(
            f"This run is done: {run.path}. Choose another --workdir for a new one, or "
            "raise its duration to go on."
        )
        return run
    # All at once: Orbax waits for all processes when it opens.
    saved = together.each(lambda: opening.saved_steps(run))
    together.agree("what is seen of the checkpoints", {"steps": saved})
    together.each(lambda: opening.refuse_shorter(run, parts.num_steps, saved))
    init = earlier["resolved"]["init"] if saved else None
    begins = None
    if not saved or (init and compose.needs_base(parts)):
        begins = together.each(
            lambda: beginning.find(config, data.tokenizer, say=say, again=init)
        )
        opening.refuse_no_steps(parts.num_steps, begins)
    saves = size_bytes(parts.state_parts(parts.abstract))
    together.on_main(lambda: opening.require_room(run.path, saves))
    if not saved:
        init = begins.record() if begins else None
    # A run that still trains may have saved again while they looked.
    together.agree("what config.init.from names", init or {})
    record = opening.record(parts, data, command, earlier, run.path, init)
    lines = opening.plan(parts, data, run)

    with contextlib.ExitStack() as stack:
        # First, and so closed last: nothing else of the run waits for it.
        feed = stack.enter_context(Feed())
        heard = dataclasses.replace(run, hearer=feed if run.writes else None)
        together.on_main(lambda: stack.enter_context(run.held()))
        run.mend(events.FILE)
        together.on_main(lambda: events.refuse_fruitless(events.read(run), run))
        together.on_main(run.begin)
        happened = events.Events(run, lambda: clock.seconds.get("train", 0.0))
        happened.add("start", devices=layout.mesh.size)
        stack.enter_context(_leaving_status(run, watch))
        table = rows.Table(run, parts, data, record)
        trainer = Trainer(
            heard, parts, data, clock, startup, compiles, table, happened, watch,
            num_rewinds,
        )  # fmt: skip
        try:
            together.on_main(lambda: run.write_config(record))
            together.on_main(
                lambda: run.write("tokenizer.json", data.tokenizer.to_json())
            )
            if begins and not saved:
                together.on_main(lambda: adopt.carry(begins.path, run.path))
            if data.chat_template:
                together.on_main(lambda: run.write(template.FILE, data.chat_template))
            if run.writes:
                feed.start(named.openers(run.path, record, track), trainer.say)
            with parts.layout.active():
                trainer.train(begins, lines, goes_on=earlier is not None)
            happened.add("end", status=0)
        except BaseException as error:
            if estimates.is_out_of_memory(error):
                error = OutOfMemoryError(
                    closing.memory_table(error, parts, trainer.step_fn)
                )
            error = together.lost(error)
            with contextlib.suppress(UserError):
                happened.add("end", status=exit_status(error))
                if isinstance(error, DivergedError):
                    table.diverged(error.step)
                if not run.is_done() and not isinstance(error, StoppedError):
                    run.write("FAILED", f"{type(error).__name__}: {error}\n")
            raise error
    return run


@contextlib.contextmanager
def _leaving_status(run: Run, watch: Watch) -> Iterator[None]:
    """Leave this process's exit status in the run's folder, however the block ends."""
    index = together.index()
    watch.stacks = run.path / f"stacks-{index}.txt"
    (run.path / "alive").mkdir(exist_ok=True)
    watch.alive = run.path / "alive" / str(index)
    watch.on_end = lambda status: run.leave_status(index, status)
    status = 0
    try:
        yield
    except BaseException as error:
        status = exit_status(error)
        raise
    finally:
        file, watch.alive = watch.alive, None
        file.unlink(missing_ok=True)
        run.leave_status(index, status)
