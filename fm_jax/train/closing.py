"""After the last step, or in place of it: samples, numbers, what was too big."""

import shlex
import statistics

import jax

from fm_jax import machine, metrics
from fm_jax.compiled import estimates
from fm_jax.generation import batch
from fm_jax.generation.request import Request
from fm_jax.prepare.opened import Data, Split
from fm_jax.runs import Run
from fm_jax.sections import Config
from fm_jax.train.compose import Parts
from fm_jax.train.step import TrainState


def samples(parts: Parts, data: Data, state: TrainState) -> list[str]:
    """Return the texts that the model writes at the end, prompt and all."""
    sample, model = parts.config.sample, parts.config.model
    if not sample.num_tokens or data.labels:
        return []  # and a prompt that the tokenizer has no ids for is no matter
    tokenizer = data.tokenizer
    prompt = [tokenizer.end_id, *tokenizer.encode_batch([sample.prompt])[0]]
    num_tokens = sample.num_tokens
    if model.positions == "learned":
        num_tokens = min(num_tokens, model.max_length - len(prompt))
    if num_tokens < 1:
        return []
    requests = [
        Request(
            tuple(map(int, prompt)),
            num_tokens,
            temperature=sample.temperature,
            top_k=sample.top_k,
            top_p=sample.top_p,
            seed=parts.config.train.seed,
            sample=number,
            end_ids=(tokenizer.end_id,),
        )
        for number in range(sample.num_samples)
    ]
    found = batch.generate(
        parts.model, parts.merged(state), requests, decode=tokenizer.decode
    )
    return [sample.prompt + written.text for written in found]


def speed(run: Run, parts: Parts, peak: float) -> dict[str, float]:
    """Return the median speed of a run's steps, {} where too few were timed.

    peak: FLOP/s of all devices.
    """
    _, speeds = run.series("perf/tokens_per_second")
    if not speeds:
        return {}
    median = statistics.median(speeds)
    return {
        "perf/median_tokens_per_second": median,
        "perf/median_mfu": median * parts.flops_per_token / peak,
        "perf/median_step_seconds": parts.tokens_per_step / median,
    }


def speed_line(speed: dict[str, float], peak: float) -> str:
    """Return `speed`, and the memory that this process took, as a line."""
    return (
        f"median {speed['perf/median_tokens_per_second']:,.0f} tokens/s, "
        f"MFU {speed['perf/median_mfu']:.1%} of {peak / 1e9:,.0f} GFLOP/s; "
        f"peak host memory {machine.peak_memory_bytes() / 1e6:,.0f} MB"
    )


def machine_row(compiles: metrics.CompileWatch, peak: float) -> dict[str, float]:
    """Return what the run took of its machine, and what that can do, as a row's."""
    return {
        "memory/peak_host_bytes": machine.peak_memory_bytes(),
        "compile/seconds": compiles.seconds,
        "compile/cache_hits": compiles.hits,
        "compile/cache_misses": compiles.misses,
        "compile/seconds_saved": compiles.saved,
        "perf/peak_flops": peak,
    }


def held_out_line(held_out: Split, final: dict[str, float]) -> str:
    """Return the last evaluation beside its yardsticks, as a line."""
    if "bits_per_byte" not in final:
        return f"all held-out examples, {final['tokens']:,.0f}: {shown(final)}"
    gzip_bits = held_out.gzip_bits_per_byte
    return (
        f"all held-out text, {held_out.num_bytes:,} bytes: "
        f"{final['bits_per_byte']:.4f} bits/byte by this model"
        f"{'' if gzip_bits is None else f', {gzip_bits:.4f} by gzip -9'}"
        f"{above_bayes(final)}"
    )


def shown(numbers: dict[str, float]) -> str:
    """Return held-out metrics in words: bits of text, or how many answers are right.

    Of several files of answers that of each.
    """
    if "bits_per_byte" in numbers:
        bits = numbers["bits_per_byte"]
        return f"loss {numbers['loss']:.4f} nats/token, {bits:.4f} bits/byte"
    by_file = [
        f"{name.removeprefix('accuracy/')} {value:.4f}"
        for name, value in numbers.items()
        if name.startswith("accuracy/")
    ]
    each = f" ({', '.join(by_file)})" if by_file else ""
    return f"loss {numbers['loss']:.4f}, accuracy {numbers['accuracy']:.4f}{each}"


def above_bayes(numbers: dict[str, float]) -> str:
    """Return how far a loss is above the least, "" where that is not known."""
    if "excess_loss" not in numbers:
        return ""
    return (
        f"; {numbers['excess_loss']:.4f} nats/token above the best that any model can "
        f"reach, {numbers['bayes_loss']:.4f}"
    )


def what_next(run: Run, config: Config) -> str:
    """Return what a person may type when a run is done, as lines."""
    sample, kind = config.sample, config.data.examples
    prompt = shlex.quote(sample.prompt if sample.num_tokens else "")
    ask = f"fm generate --run={run.path} --prompt={prompt}"
    if kind == "chat":
        ask = f"fm generate --run={run.path} --chat --prompt='...'"
    elif kind == "classify":
        ask = f"fm classify --run={run.path} --text='...'"
    return (
        f"run folder: {run.path}\n"
        "next:\n"
        f"  {ask}\n"
        f"  fm eval --run={run.path}\n"
        f"  fm report {run.path}    # makes report.html there again"
    )


def predicted(
    parts: Parts, compiled: jax.stages.Compiled, peak: float, held_before: int
) -> dict[str, float]:
    """Return what the compiled step was to need, and the memory that the run took.

    peak: FLOP/s of all devices. Memory is that of one device where devices count it;
    else that of the process, which held `held_before`, the state among it, before the
    first step.
    """
    stats = jax.local_devices()[0].memory_stats()
    measured = machine.peak_memory_bytes()
    step = parts.estimate(compiled, metrics.this_chip(peak, parts.config.model.dtype))
    needed = step.memory.total
    if stats:
        measured = stats["peak_bytes_in_use"]
    else:
        state = estimates.device_bytes(parts.abstract)
        needed = held_before + (needed - state) * jax.local_device_count()
    return {
        "predicted/step_seconds": step.seconds,
        "predicted/memory_bytes": needed,
        "memory/peak_bytes": measured,
    }


def memory_table(
    error: BaseException, parts: Parts, compiled: jax.stages.Compiled | None
) -> str:
    """Return what needs the memory that was not there, as lines."""
    said = (str(error).strip() or type(error).__name__).splitlines()[0]
    lines = [f"out of memory ({said}). What one device needs:"]
    if compiled is None:
        held = estimates.state_memory(
            parts.abstract, parts.abstract_batch(parts.config.train.batch_size)
        )
        least = estimates.Memory(**held, gradients=0, activations=0, host=0)
        lines += estimates.memory_lines(least, None)
        lines.append("  and gradients and activations: the step was not compiled")
    else:
        lines += estimates.memory_lines(parts.estimate(compiled, None).memory, None)
    lines.append("fm plan with the same --config flags searches for what fits.")
    return "\n".join(lines)
