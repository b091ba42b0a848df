"""Processes that meet before jax: jaxlib aborts when one of them does not come."""

import contextlib
import os
import re
import socket
import time

from fm_jax.cluster.launchers import Cluster
from fm_jax.errors import UserError


def meet(found: Cluster, timeout_seconds: float) -> None:
    """Return when all processes have come; raise UserError in each when one has not.

    Each calls process 0, says who it is, and is told to go on or why not.
    """
    host, _, port = found.coordinator.rpartition(":")
    if found.process_id == 0:
        _await_calls(found, int(port), timeout_seconds)
        return
    hello = f"fm_jax {found.process_id} of {found.num_processes}\n".encode()
    deadline = time.monotonic() + timeout_seconds
    got = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        answer = ""
        try:
            address = (host.strip("[]"), int(port))
            with socket.create_connection(address, min(left, 5)) as call:
                got = "a connection but no word, as while others are missing"
                call.settimeout(left + 2)  # process 0 is to say who did not come
                call.sendall(hello)
                answer = call.makefile(errors="replace").readline()
        except OSError as error:
            if not isinstance(error, TimeoutError):
                got = error.strerror or str(error)
        if answer == "go\n":
            return
        if answer.startswith("no: "):
            raise UserError(answer[4:].strip())
        if answer:
            got = "the answer of another program"
        time.sleep(min(0.2, left))
    raise UserError(
        f"process 0 must answer at {found.coordinator} within {timeout_seconds:g} s; "
        f"process {found.process_id} of {found.num_processes} got {got}. See whether "
        "process 0 runs there, and what it says."
    )


def _await_calls(found: Cluster, port: int, timeout_seconds: float) -> None:
    try:
        server = _listen(port, bind=found.bind_host, backlog=found.num_processes)
    except OSError as error:
        raise UserError(
            f"process 0 must be able to listen at {found.coordinator}; got "
            f"{os.strerror(error.errno)}. Choose another port."
        ) from error
    deadline = time.monotonic() + timeout_seconds
    heard, calls, problem = [], {}, ""
    with server, contextlib.ExitStack() as stack:
        while not problem:
            calls = {index: call for index, call in calls.items() if _is_open(call)}
            absent = sorted(set(range(1, found.num_processes)) - calls.keys())
            left = deadline - time.monotonic()
            if not absent:
                break
            if left <= 0:
                problem = (
                    f"all {found.num_processes} processes must come to process 0 at "
                    f"{found.coordinator} within {timeout_seconds:g} s; got no call of "
                    f"{absent}. See whether they run, and what they say."
                )
                break
            server.settimeout(min(left, 0.5))
            try:
                call = stack.enter_context(server.accept()[0])
            except TimeoutError:
                continue
            if (said := _hear(call)) is None:
                continue
            heard.append(call)
            index, num = said
            if num != found.num_processes or index not in absent:
                problem = (
                    f"the processes must be numbered 0 to {found.num_processes - 1}, "
                    f"each once; process 0 at {found.coordinator} got the call of "
                    f"another {index} of {num}. Give each its own --process_id."
                )
            calls[index] = call
        answer = f"no: {problem}\n" if problem else "go\n"
        for call in heard:
            with contextlib.suppress(OSError):
                call.sendall(answer.encode())
    if problem:
        raise UserError(problem)


def _listen(port: int, *, bind: str, backlog: int) -> socket.socket:
    """Return a server at `bind`, at all addresses where that is "".

    At that which jax was given for its own, where it was.
    """
    bind = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", "").rpartition(":")[0] or bind
    if not bind and socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(
                ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=backlog
            )
    family = socket.AF_INET6 if bind.startswith("[") else socket.AF_INET
    return socket.create_server(
        (bind.strip("[]"), port), family=family, backlog=backlog
    )


def _hear(call: socket.socket) -> tuple[int, int] | None:
    """Return who calls, of how many; None where it is none of us."""
    call.settimeout(2)
    try:
        said = re.fullmatch(rb"fm_jax (\d+) of (\d+)\n", call.recv(64))
    except OSError:
        return None
    return (int(said[1]), int(said[2])) if said else None


def _is_open(call: socket.socket) -> bool:
    call.setblocking(False)
    try:
        return call.recv(1, socket.MSG_PEEK) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        call.settimeout(2)
