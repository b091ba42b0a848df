"""The end of a run that took all its steps: samples, closing numbers, the report."""

from typing import Any

from fm_jax import events, metrics, report
from fm_jax.cluster import together
from fm_jax.train import closing
from fm_jax.train.step import TrainState


def sample(trainer: Any, state: TrainState) -> None:
    """Write the run's samples, and show them."""
    run, last = trainer.run, trainer.parts.num_steps
    with trainer.clock.phase("sample"):
        texts = closing.samples(trainer.parts, trainer.data, state)
    for text in texts:
        run.append({"step": last, "text": text}, "samples.jsonl")
        prompt = trainer.config.sample.prompt
        trainer.show(f"\n--- a sample, going on from {prompt!r}:\n{text}\n---\n")


def finish(trainer: Any, final: dict[str, float]) -> None:
    """Write the closing row, DONE and the report, and say what a person may do next.

    trainer: a `trainer.Trainer`; final: metrics of all held-out text.
    """
    run, parts, clock = trainer.run, trainer.parts, trainer.clock
    last, dtype = parts.num_steps, trainer.config.model.dtype
    with clock.phase("measure"):
        # Again, and the better: a busy moment at the start would flatter the MFU.
        trainer.peak = max(trainer.peak, metrics.peak_flops(dtype)[0])
    speed = closing.speed(run, parts, trainer.peak)
    if speed:
        trainer.say(closing.speed_line(speed, trainer.peak))
    clock.settle()
    trainer.events.add("done", last)
    good = events.goodput(events.read(run))
    if good.attempts > 1:
        trainer.say(
            f"goodput {good.share:.1%}: {good.trained:,.1f} s of steps that were kept "
            f"in {good.seconds:,.1f} s since the first of {good.attempts} starts"
        )
    gzip_bits = trainer.data.eval.gzip_bits_per_byte
    run.append(
        {
            "step": last,
            **trainer.held_out.row("final", final),
            **({} if gzip_bits is None else {"gzip/bits_per_byte": gzip_bits}),
            **closing.machine_row(trainer.compiles, trainer.peak),
            **speed,
            "run/goodput": good.share,
            "run/starts": good.attempts,
            **{f"time/{n}_seconds": s for n, s in clock.seconds.items()},
        }
    )
    trainer.say(closing.held_out_line(trainer.data.eval, final))
    trainer.table.add(last, final)
    run.write("DONE", f"{last}\n")
    if trainer.step_fn is not None:
        _predict(trainer)
    together.on_main(lambda: report.write([run.path], run.path / "report.html"))
    trainer.show(closing.what_next(run, trainer.config))


def _predict(trainer: Any) -> None:
    """Append what the compiled step was to need, and what it took."""
    try:
        predicted = closing.predicted(
            trainer.parts, trainer.step_fn, trainer.peak, trainer.held_before
        )
    except Exception as error:  # of a compiler whose text we never read: no harm
        trainer.say(f"nothing can be said of what was predicted ({error!r})")
    else:
        trainer.run.append({"step": trainer.parts.num_steps, **predicted})
