"""A process that takes turns with others: `python -m fm_jax.bench.child SPEC`.

It opens its side, says so in a line of JSON, and then does the side's piece of work for
each line "go" that it reads, until it reads another.
"""

import importlib
import json
import os
import resource
import sys
import time

from fm_jax import machine

SIDES = {
    "fm_jax": "fm_jax.bench.step",
    "pytorch": "fm_jax.bench.nanogpt_like",
    "pytorch_compiled": "fm_jax.bench.nanogpt_like",
}


def main(spec: dict) -> None:
    """Serve one side. `open_side(spec)` of its module returns its piece of work."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def say(**answer):
        print(json.dumps(answer), file=out, flush=True)

    if spec["side"] == "fm_jax":
        machine.tune_allocator()
    began = time.perf_counter()
    work, about = importlib.import_module(SIDES[spec["side"]]).open_side(spec)
    work()
    say(ready_seconds=time.perf_counter() - began, **about)
    for line in sys.stdin:
        if line.strip() != "go":
            break
        before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        work()
        seconds = time.perf_counter() - start
        after = resource.getrusage(resource.RUSAGE_SELF)
        say(
            seconds=seconds,
            cpu_seconds=after.ru_utime
            + after.ru_stime
            - before.ru_utime
            - before.ru_stime,
            faults=after.ru_minflt - before.ru_minflt,
        )
    say(peak_host_bytes=machine.peak_memory_bytes())


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
