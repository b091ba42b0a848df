"""What processes do together: start, tell, agree, leave."""

import collections
import contextlib
import functools
import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fm_jax.cluster import meeting
from fm_jax.cluster.launchers import AUTO, Cluster
from fm_jax.errors import LostError, UserError

HEARTBEAT = 60  # seconds after which the others end where one has died


def start(found: Cluster | None, *, timeout_seconds: float = 300) -> None:
    """Make the processes one jax; to be called before jax looks at a device.

    Raises UserError, in all the processes that are there, when not all have come in
    time, or not all have the same number of devices.
    """
    if found is None:
        return
    import jax

    initialize = functools.partial(
        jax.distributed.initialize,
        initialization_timeout=max(1, round(timeout_seconds)),
        heartbeat_timeout_seconds=HEARTBEAT,
    )
    # It would keep SIGTERM to itself.
    jax.config.update("jax_enable_preemption_service", False)
    if found.coordinator == AUTO:
        try:
            initialize()
        except ValueError as error:
            raise UserError(
                f"jax must find the other processes by itself; got: {error} Give "
                "--coordinator, --num_processes and --process_id."
            ) from error
    else:
        # jaxlib aborts when a process does not come, so none enters it before all
        # have met. Its own detection would take one GPU of a node's eight.
        meeting.meet(found, timeout_seconds)
        initialize(
            found.coordinator,
            found.num_processes,
            found.process_id,
            found.local_device_ids,
            cluster_detection_method="deactivate",
            coordinator_bind_address=_bind_address(found),
        )
    devices = collections.Counter(d.process_index for d in jax.devices())
    if len(set(devices.values())) > 1:
        raise UserError(
            "each process must have the same number of devices; got "
            + ", ".join(f"{n} in process {i}" for i, n in sorted(devices.items()))
            + ". Show each as many."
        )
    # The first exchange opens connections and allows for half a minute only.
    _gather(b"")


def _bind_address(found: Cluster) -> str | None:
    """Return where jax's service listens; None: where its environment says, or all."""
    if not found.bind_host or "JAX_COORDINATOR_BIND_ADDRESS" in os.environ:
        return None
    return f"{found.bind_host}:{found.coordinator.rpartition(':')[2]}"


def count() -> int:
    """Return how many processes work as one."""
    jax = sys.modules.get("jax")  # one process alone need not import it
    if jax is None or not jax.distributed.is_initialized():
        return 1
    return jax.process_count()


def index() -> int:
    """Return which process this is, from 0."""
    return 0 if count() == 1 else sys.modules["jax"].process_index()


def is_main() -> bool:
    """Return whether this is process 0, the one that writes."""
    return index() == 0


def on_main(do: Callable[[], Any]) -> Any:
    """Return, in all processes, what `do` returns in process 0; JSON-able.

    Its UserError is raised by all; of another error the others are told.
    """
    if count() == 1:
        return do()
    error, told = None, {}
    if is_main():
        try:
            told = {"result": do()}
            json.dumps(told)
        except UserError as caught:
            error, told = caught, {"mistake": str(caught)}
        except Exception as caught:
            error, told = caught, {"failure": f"{type(caught).__name__}: {caught}"}
    told = json.loads(_gather(json.dumps(told).encode())[0])
    if error is not None:
        raise error
    if "mistake" in told:
        raise UserError(told["mistake"])
    if "failure" in told:
        raise RuntimeError(f"process 0 failed with {told['failure']}")
    return told["result"]


def each(do: Callable[[], Any]) -> Any:
    """Return what `do` returns here; a UserError of one process is raised by all."""
    if count() == 1:
        return do()
    result, mistake = None, ""
    try:
        result = do()
    except UserError as caught:
        mistake = str(caught)
    for index, said in enumerate(_gather(mistake.encode() or b" ")):
        if said != b" ":
            here = mistake or f"process {index} was refused: {said.decode()}"
            raise UserError(here)
    return result


def any_of(asked: bool) -> bool:
    """Return whether it is true in any process; all ask together."""
    return asked if count() == 1 else b"1" in _gather(b"1" if asked else b"0")


def agree(thing: str, values: Mapping[str, Any]) -> None:
    """Raise UserError in all processes when one has other values than process 0."""
    if count() == 1:
        return
    mine = {k: json.dumps(value, sort_keys=True) for k, value in values.items()}
    first, *rest = map(json.loads, _gather(json.dumps(mine).encode()))
    other = {index: theirs for index, theirs in enumerate(rest, 1) if theirs != first}
    if not other:
        return
    index, theirs = next(iter(other.items()))
    keys = sorted(first.keys() | theirs.keys())
    keys = [key for key in keys if first.get(key) != theirs.get(key)]
    differences = "; ".join(
        f"{key}={_short(theirs.get(key))} where process 0 has {_short(first.get(key))}"
        for key in keys[:8]
    )
    more = f"; and {len(keys) - 8} more" if len(keys) > 8 else ""
    raise UserError(
        f"{thing} must be the same in all processes; process {index} has {differences}"
        f"{more}. Processes that differ from 0: {list(other)}. Start all with one "
        "command and one version of the code."
    )


def shares_folder(path: Path, *, timeout_seconds: float = 60) -> None:
    """Raise UserError in all processes unless all see what process 0 writes in `path`.

    Makes the folder where there is none.
    """
    if count() == 1:
        return

    def write() -> list[str]:
        name, content = f".{uuid.uuid4().hex}.writing", uuid.uuid4().hex
        try:
            path.mkdir(parents=True, exist_ok=True)
            (path / name).write_text(content)
        except OSError as error:
            raise UserError(
                f"{path} must be a folder that can be written; got {error.strerror}."
            ) from error
        return [name, content]

    name, content = on_main(write)
    until = time.monotonic() + timeout_seconds
    while not (seen := _holds(path / name, content)) and time.monotonic() < until:
        time.sleep(0.1)
    answers = _gather(b"1" if seen else b"0")
    if is_main():
        (path / name).unlink(missing_ok=True)
    blind = [index for index, answer in enumerate(answers) if answer != b"1"]
    if blind:
        raise UserError(
            "--workdir must be on a disk that all processes share; processes "
            f"{blind} do not see what process 0 writes in {path}."
        )


def lost(error: BaseException) -> BaseException:
    """Return LostError for what jax raises where another process has gone, else it.

    What jax itself raises in one of several processes nearly always follows from that.
    """
    jax = sys.modules.get("jax")
    if count() > 1 and isinstance(error, jax.errors.JaxRuntimeError):
        return LostError(error)
    return error


def leave(status: int, *, within_seconds: float = 5) -> None:
    """End this process with `status`, soon, even if the others go on.

    jax's own exit waits for the others, by default for minutes, and then aborts. When
    all leave together that wait is short and the exit an ordinary one, so the caller
    goes on to it.
    """
    if count() == 1:
        return

    def end():
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(status)

    timer = threading.Timer(within_seconds, end)
    timer.daemon = True
    timer.start()


def _gather(mine: bytes) -> list[bytes]:
    """Return what each process gives, in all of them."""
    import numpy as np
    from jax.experimental import multihost_utils

    lengths = multihost_utils.process_allgather(np.asarray([len(mine)], np.int32))
    lengths = lengths.reshape(-1)
    # Sizes are few, for each is a program to compile.
    padded = np.zeros(max(64, 1 << int(lengths.max() - 1).bit_length()), np.uint8)
    padded[: len(mine)] = np.frombuffer(mine, np.uint8)
    rows = multihost_utils.process_allgather(padded).reshape(len(lengths), -1)
    return [row[:n].tobytes() for row, n in zip(rows, lengths, strict=True)]


def _short(text: str | None) -> str:
    if text is None:
        return "nothing"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _holds(file: Path, content: str) -> bool:
    try:
        return file.read_text() == content
    except OSError:
        return False
