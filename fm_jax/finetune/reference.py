"""What a reference model says of all pairs of a split: made once, and kept."""

import base64
import contextlib
import dataclasses
import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from fm_jax import caches, digests, sharding
from fm_jax.cluster import together
from fm_jax.data import arrays, batches, prefetch
from fm_jax.data.example_rows import ExampleRows
from fm_jax.errors import UserError, reason
from fm_jax.finetune import preferences
from fm_jax.models.zoo import Model

VERSION = 2


def logps(
    model: Model,
    params: dict,
    rows: ExampleRows,
    *,
    layout: sharding.Layout,
    batch_size: int,
    num_segments: int,
    loss_chunk: int,
    folder: Path,
    run_id: str,
    step: int,
    say: Callable[[str], None],
) -> np.ndarray:
    """Return the log-probability of each pair's responses, nats, float32 [examples, 2].

    params: of the reference, on the mesh of `layout`; run_id, step: the run that they
    are of. `batch_size` rows go through the model at a time, over all devices. All
    processes call this together; what process 0 finds in `folder` is told to the
    others, and what is not there is computed by all and written by it.

    Raises UserError where a log-probability is not finite, on a file that is not whole,
    and on a folder that cannot be written.
    """
    identity = {
        "version": VERSION,
        "run_id": run_id,
        "step": step,
        "weights": digests.of(params),
        "model": dataclasses.asdict(model.config),
        "rows": [rows.store.header["name"], rows.packing, rows.length],
    }
    told = json.dumps(identity, sort_keys=True).encode()
    path = folder / f"reference-{hashlib.blake2b(told, digest_size=10).hexdigest()}.npy"
    with contextlib.ExitStack() as stack:
        together.on_main(lambda: _hold(stack, path))
        found = together.on_main(lambda: _read(path, rows) if path.exists() else "")
        if found:
            return _unpacked(found)
        say(
            f"Asking the reference, step {step:,} of {run_id}, about "
            f"{rows.num_examples:,} pairs"
        )
        made = computed(
            model,
            params,
            rows,
            layout=layout,
            batch_size=batch_size,
            num_segments=num_segments,
            loss_chunk=loss_chunk,
        )
        together.on_main(lambda: _write(path, made))
        return made


def computed(
    model: Model,
    params: dict,
    rows: ExampleRows,
    *,
    layout: sharding.Layout,
    batch_size: int,
    num_segments: int,
    loss_chunk: int,
) -> np.ndarray:
    """Return what `logps` does, computed now."""

    def step(params, batch):
        pieces = sharding.cut_rows(batch)
        how = {"num_segments": num_segments, "loss_chunk": loss_chunk}
        return preferences.response_logps(model, params, pieces, **how)[0]

    step = jax.jit(step, out_shardings=layout.sharding())
    every = batches.EvalBatches((rows,), batch_size, np.arange(batch_size))
    mine = sharding.local_rows(batch_size, layout)
    plan = batches.EvalBatches((rows,), batch_size, mine)
    found = np.full((rows.num_examples, 2), np.nan, np.float32)
    with layout.active():
        for number, batch in enumerate(prefetch.prefetch(plan)):
            put = sharding.put_batch(batch, batch_size, layout)
            logps_BS = np.asarray(step(params, put))
            for row, logps_S in zip(every.indices(number)[1], logps_BS, strict=True):
                examples = rows.examples_of(row)
                found[examples] = logps_S[: 2 * len(examples)].reshape(-1, 2)
    bad = np.flatnonzero(~np.isfinite(found).all(axis=1))
    if bad.size:
        raise UserError(
            "the reference must give every response a finite log-probability; got "
            f"{found[bad[0]].tolist()} for {rows.where(int(bad[0]))}. Begin from a run "
            "whose loss is finite."
        )
    return found


def _hold(stack: contextlib.ExitStack, path: Path) -> None:
    try:
        stack.enter_context(caches.made_by_one(path))
    except OSError as error:
        raise _not_writable(path, error) from error


def _not_writable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"data.cache_dir must be writable and have room; got {path} ({reason(error)}). "
        "Free space or set --config.data.cache_dir."
    )


def _write(path: Path, logps: np.ndarray) -> None:
    stream = io.BytesIO()
    np.save(stream, logps)
    try:
        caches.write_whole(path, stream.getvalue())
    except OSError as error:
        raise _not_writable(path, error) from error


def _read(path: Path, rows: ExampleRows) -> str:
    """Return a file's log-probabilities as text that processes tell each other."""
    shape = (rows.num_examples, 2)
    try:
        found = arrays.mapped(path)
    except (OSError, ValueError) as error:
        raise _not_whole(path, str(error)) from error
    if (found.shape, found.dtype) != (shape, np.float32):
        raise _not_whole(path, f"{found.dtype} {found.shape} for float32 {shape}")
    if not np.isfinite(found).all():
        raise _not_whole(path, "numbers that are not finite")
    return base64.b64encode(found.tobytes()).decode()


def _not_whole(path: Path, got: str) -> UserError:
    return UserError(
        f"a reference's log-probabilities must be whole; got {path} ({got}). Delete it "
        "and start again: it will be made again."
    )


def _unpacked(told: str) -> np.ndarray:
    found = np.frombuffer(base64.b64decode(told), np.float32)
    return found.reshape(-1, 2).copy()
