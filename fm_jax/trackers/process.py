"""The process of one tracker: takes lines of JSON on stdin, answers on stdout.

The first line says which tracker and which run; then come rows, steps that the run
went on from, and its end. Each answer says how many lines were taken, or what failed.
Nothing here may outlive the process that trains by more than LINGER seconds.
"""

import contextlib
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import Any

from fm_jax import redact
from fm_jax.errors import reason
from fm_jax.trackers import on_mlflow, on_wandb

PLACES = {"mlflow": on_mlflow.open_run, "wandb": on_wandb.open_run}
LINGER = 30.0  # seconds after the process that trains is gone
PIECE = 1 << 16


def main() -> None:
    """Serve until told to end, or until stdin ends, and leave no exit hook a say."""
    with contextlib.suppress(OSError):
        os.nice(10)  # steps come first
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # stdin says when it is over
    told, answers = os.dup(0), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what a library prints is for the log
    status = 1
    try:
        _serve(told, answers)
        status = 0
    except BrokenPipeError:
        pass  # nobody is there to be told
    except BaseException as error:
        said = f"{type(error).__name__}: {reason(error)}"
        sys.stderr.write(_clean(traceback.format_exc()))
        with contextlib.suppress(OSError):
            _answer(answers, {"error": _clean(said)})
    finally:
        sys.stderr.flush()
        os._exit(status)


def _serve(told: int, answers: int) -> None:
    batches = _batches(told)
    first, *rest = next(batches)
    place = PLACES[first["tracker"]](first)
    _take(place, rest, 1, answers)
    for batch in batches:
        if _take(place, batch, 0, answers):
            return
    timer = threading.Timer(LINGER, lambda: os._exit(1))
    timer.daemon = True
    timer.start()
    place.close("failed")  # the process that trains ended without a word


def _take(place: Any, batch: list[dict], num_before: int, answers: int) -> bool:
    """Hand a batch to the tracker; return whether that was the end."""
    rows = []
    status = None
    for message in batch:
        if "row" in message:
            rows.append((message["time"], message["row"]))
        elif "went_on_from" in message:
            place.rows(rows)
            rows = []
            place.went_on_from(message["went_on_from"])
        else:
            status = message["end"]
    place.rows(rows)
    if status:
        place.close(status)
    _answer(answers, {"taken": num_before + len(batch), "is_done": status is not None})
    return status is not None


def _batches(source: int) -> Iterator[list[dict[str, Any]]]:
    """Yield the messages that have come, some at a time, until the source ends."""
    unread = b""
    while piece := os.read(source, PIECE):
        *lines, unread = (unread + piece).split(b"\n")
        if lines:
            yield [json.loads(line) for line in lines]


def _answer(answers: int, message: dict[str, Any]) -> None:
    os.write(answers, json.dumps(message).encode() + b"\n")


def _clean(text: str) -> str:
    return "\n".join(redact.words(text.split("\n"), os.environ))


if __name__ == "__main__":
    main()
