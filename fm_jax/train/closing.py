"""After the last step, or in place of it: samples, predictions, what was too big."""

import jax

from fm_jax import generation, machine, metrics
from fm_jax.compiled import estimates
from fm_jax.train.compose import Data, Parts
from fm_jax.train.step import TrainState


def samples(parts: Parts, data: Data, state: TrainState) -> list[str]:
    """Return the texts that the model writes at the end, prompt and all."""
    sample, model = parts.config.sample, parts.config.model
    if not sample.num_tokens:
        return []  # and a prompt that the tokenizer has no ids for is no matter
    tokenizer = data.tokenizer
    prompt = [tokenizer.end_id, *tokenizer.encode_batch([sample.prompt])[0]]
    num_tokens = sample.num_tokens
    if model.positions == "learned":
        num_tokens = min(num_tokens, model.max_length - len(prompt))
    if num_tokens < 1:
        return []
    found = generation.generate(
        parts.model,
        state.weights(),
        [[int(i) for i in prompt]] * sample.num_samples,
        num_tokens=num_tokens,
        end_id=tokenizer.end_id,
        temperature=sample.temperature,
        top_k=sample.top_k,
        top_p=sample.top_p,
        seed=parts.config.train.seed,
    )
    return [sample.prompt + tokenizer.decode(ids) for ids in found]


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
