"""A run, opened to be served: its weights in an engine, its tokenizer, its template."""

import time
from functools import partial
from pathlib import Path
from typing import Any

from fm_jax.errors import UserError
from fm_jax.generation import engine as engines
from fm_jax.generation.engine import Engine
from fm_jax.generation.request import Request
from fm_jax.serve import chat
from fm_jax.serve.served import Served
from fm_jax.serve.worker import Worker
from fm_jax.tokenizers.special import special_encoder
from fm_jax.train import restore
from fm_jax.train.restore import Restored

PACE = 0.05  # seconds between the pieces of a stream, about


def open_run(flags: Any) -> tuple[Served, Worker]:
    """Return the model of a run as it is served, and the worker that is to write.

    Raises UserError when there is no such run or step, or what is asked of it is more
    than it has.
    """
    path = Path(flags.run)
    template = chat.find(path, flags.chat_template)
    mesh = {axis: flags.values[f"mesh.{axis}"] for axis in ("data", "fsdp", "tensor")}
    held = restore.load(path, flags.step, mesh=mesh)
    config, tokenizer = held.config.model, held.tokenizer
    capacity = flags.capacity or config.max_length
    if capacity < 2:
        raise UserError(f"--capacity must be >= 2; got {capacity}.")
    engines.check_capacity(held.model, capacity)
    served = Served(
        name=flags.name or path.resolve().name,
        created=int(time.time()),
        capacity=capacity,
        vocab_size=config.vocab_size,
        tokenizer=tokenizer,
        encode_special=special_encoder(tokenizer),
        template=template,
        begin_ids=held.begin_ids,
        chat_begin_ids=chat.begin_ids(path, held.begin_ids),
        end_ids=held.end_ids,
    )
    sizes = {"num_slots": flags.num_slots, "capacity": capacity, "int8": flags.int8}
    worker = Worker(
        Engines(path, mesh, held, **sizes),
        decode=served.decode,
        token=served.token,
        num_slots=flags.num_slots,
        max_waiting=flags.max_waiting,
    )
    return served, worker


class Engines:
    """Makes engines of a run, warm ones, with `sizes` as `Engine` takes them.

    Weights as they are saved are let go once an engine has them as it wants them; for
    another engine they are read again.
    """

    def __init__(self, path: Path, mesh: dict, held: Restored, **sizes: Any):
        self._again = partial(restore.load, path, str(held.step), mesh=mesh)
        self._model, self._layout, self._sizes = held.model, held.layout, sizes
        self._params: dict | None = held.params

    def __call__(self) -> Engine:
        params, self._params = self._params, None
        if params is None:
            params = self._again().params
        engine = Engine(
            self._model, params, pace=PACE, layout=self._layout, **self._sizes
        )
        warm_up(engine)
        return engine


def warm_up(engine: Engine) -> None:
    """Let an engine compile its programs for short prompts.

    They are those of one text that begins, and of as many as there are slots, with the
    likeliest ids and with drawn ones.
    """
    num_tokens = min(2, engine.capacity - 1)
    for temperature in (0.0, 1.0):
        for count in {1, engine.num_slots}:
            for _ in range(count):
                engine.add(Request((0,), num_tokens, temperature=temperature))
            while not engine.is_idle:
                engine.step()
