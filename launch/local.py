"""Run one command as several processes on this machine, as a cluster would.

    ./launch/local.sh --processes=2 --devices_per_process=4 fm train ...

Each is told by FM_COORDINATOR, FM_NUM_PROCESSES and FM_PROCESS_ID who it is, and with
--devices_per_process takes that many simulated CPU devices. The lines of process 0
are shown as they are, those of the others begin with [1], [2] and so on. When one
fails the others are ended, and its status is the status of all. SIGTERM and Ctrl-C are
passed on. Needs the standard library alone.
"""

import argparse
import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

GRACE_SECONDS = 10  # from the first failure to SIGKILL; jax may swallow SIGTERM
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def run(
    command: list[str],
    *,
    num_processes: int,
    devices_per_process: int = 0,
    grace_seconds: float = GRACE_SECONDS,
) -> int:
    """Run the processes to their end; return the status of the first that failed."""
    with _reserved_port() as port:
        shared = {
            "FM_COORDINATOR": f"127.0.0.1:{port}",
            "FM_NUM_PROCESSES": str(num_processes),
        }
        if devices_per_process:
            shared["JAX_PLATFORMS"] = "cpu"
            shared["JAX_NUM_CPU_DEVICES"] = str(devices_per_process)
            # They share a pool, by default a thread for each: one that waits in two
            # collectives at once holds another's, and all wait for ever.
            shared["PJRT_NPROC"] = os.environ.get("PJRT_NPROC", "64")
        processes, passed_on, ended = [], [], queue.SimpleQueue()
        _pass_on(processes, passed_on)
        for index in range(num_processes):
            environ = os.environ | shared | {"FM_PROCESS_ID": str(index)}
            processes.append(_start(command, environ, index))
            for number, num_told in passed_on:
                if num_told <= index:  # it came before this one was in the list
                    _signal_all(processes[index:], number)
            threading.Thread(
                target=lambda i=index: ended.put((i, processes[i].wait())), daemon=True
            ).start()
        status = _await_all(processes, passed_on, ended, grace_seconds)
    for thread in threading.enumerate():
        if thread.name == "output":
            thread.join(2)
    return status


def _start(command: list[str], environ: dict, index: int) -> subprocess.Popen:
    """Start a process in its own session, so that signals reach its workers too.

    Its lines are passed on whole, for several write to one place; on a terminal
    process 0 writes by itself, to show its progress bar.
    """
    streams = [sys.stdout, sys.stderr]
    pipes = [subprocess.PIPE if index or not s.isatty() else None for s in streams]
    process = subprocess.Popen(
        command,
        # What a process wrote into a pipe's buffer is lost when it aborts.
        env=environ | {"PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=pipes[0],
        stderr=pipes[1],
        start_new_session=True,
    )
    prefix = b"[%d] " % index if index else b""
    for source, sink in zip((process.stdout, process.stderr), streams, strict=True):
        if source is not None:
            threading.Thread(
                target=_copy, args=(source, sink, prefix), name="output", daemon=True
            ).start()
    return process


def _copy(source, sink, prefix: bytes) -> None:
    # Where nobody reads any more, closing the pipe tells the process so.
    with source, contextlib.suppress(BrokenPipeError):
        for line in source:
            sink.buffer.write(prefix + line.rstrip(b"\n") + b"\n")
            sink.flush()


def _await_all(
    processes: list, passed_on: list, ended: queue.SimpleQueue, grace_seconds: float
) -> int:
    first, kill_at = 0, float("inf")
    for _ in processes:
        while True:
            wait = max(0, kill_at - time.monotonic())
            try:
                index, status = ended.get(timeout=None if wait > 1e9 else wait)
                break
            except queue.Empty:
                _signal_all(processes, signal.SIGKILL)
                kill_at = float("inf")
        if status and not first:
            first = status if status > 0 else 128 - status
            others = "; ending the others" if len(processes) > 1 else ""
            print(
                f"launch/local.sh: process {index} ended with status {first}{others}",
                file=sys.stderr,
            )
            if not passed_on:  # a second signal may mean: at once, without saving
                _signal_all(processes, signal.SIGTERM)
            kill_at = time.monotonic() + grace_seconds
    return first


def _signal_all(processes: list, number: int) -> None:
    for process in processes:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)


def _pass_on(processes: list, passed_on: list) -> None:
    def handle(number, _):
        passed_on.append((number, len(processes)))
        _signal_all(processes, number)

    for number in PASSED_ON:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, handle)


@contextlib.contextmanager
def _reserved_port() -> Iterator[int]:
    """Yield a port that is given to nobody else while the processes use it."""
    with socket.socket() as held:
        # Not listening, and so no obstacle to process 0, which sets the same option.
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def main() -> int:
    """Run the command of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--devices_per_process", type=int, default=0)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    try:
        return run(
            given.command,
            num_processes=given.processes,
            devices_per_process=given.devices_per_process,
        )
    except OSError as error:
        print(
            f"launch/local.sh: the command must be a program; got {error}.",
            file=sys.stderr,
        )
        return 127


if __name__ == "__main__":
    sys.exit(main())
