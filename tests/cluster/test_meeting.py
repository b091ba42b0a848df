"""Tests of the meeting: all come, or each is told in one line who did not."""

import concurrent.futures
import contextlib
import os
import pathlib
import socket
import subprocess
import sys
import time

import pytest

from fm_jax.cluster import meeting
from fm_jax.cluster.launchers import Cluster
from fm_jax.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent.parent


@pytest.fixture
def address():
    """Return an address of this machine that is free."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{held.getsockname()[1]}"


def _meet(clusters, timeout_seconds):
    """Return the message that each meeting ends with, all at once; "" for none."""

    def meet(found):
        try:
            meeting.meet(found, timeout_seconds)
        except UserError as error:
            return str(error)
        return ""

    with concurrent.futures.ThreadPoolExecutor() as pool:
        return list(pool.map(meet, clusters))


def test_all_go_on_when_all_have_come(address):
    assert _meet([Cluster(address, 3, i) for i in (2, 0, 1)], 20) == ["", "", ""]


def test_a_process_without_its_coordinator_says_whom_it_called(address):
    began = time.monotonic()
    [said] = _meet([Cluster(address, 3, 1)], 0.5)
    assert time.monotonic() - began < 5
    assert said == (
        f"process 0 must answer at {address} within 0.5 s; process 1 of 3 got "
        "Connection refused. See whether process 0 runs there, and what it says."
    )


def test_all_that_came_are_told_who_did_not(address):
    """Fault 24, processes: one of several does not come to the start.

    Promise: after --join_timeout seconds all that came say who is missing, and exit 2.
    """
    first, second = _meet([Cluster(address, 4, 0), Cluster(address, 4, 2)], 1)
    assert f"all 4 processes must come to process 0 at {address}" in first
    assert "within 1 s; got no call of [1, 3]." in first
    assert second == first


def test_two_processes_of_one_number_are_refused(address):
    """Fault 30, processes: two processes were given one number.

    Promise: all that came are told which number came twice, exit 2.
    """
    said = _meet([Cluster(address, 3, i) for i in (0, 1, 1)], 20)
    assert len(set(said)) == 1
    assert "must be numbered 0 to 2, each once;" in said[0]
    assert "got the call of another 1 of 3." in said[0]


def test_processes_that_count_differently_are_refused(address):
    first, second = _meet([Cluster(address, 2, 0), Cluster(address, 3, 2)], 20)
    assert first == second
    assert "got the call of another 2 of 3." in first


def test_a_port_in_use_is_named_and_its_user_not_joined(address):
    """Fault 30, processes: another program has the port.

    Promise: it is told as one, exit 2, and is not joined.
    """
    host, port = address.split(":")
    with socket.create_server((host, int(port))) as server, server:
        [said] = _meet([Cluster(address, 2, 0)], 20)
        assert f"must be able to listen at {address}; got Address already" in said

        def other_program():
            server.settimeout(0.7)
            with contextlib.suppress(TimeoutError):
                while True:
                    with server.accept()[0] as call:
                        call.recv(64)
                        call.sendall(b"HTTP/1.0 400 Bad Request\r\n")

        with concurrent.futures.ThreadPoolExecutor() as pool:
            pool.submit(other_program)
            [said] = _meet([Cluster(address, 2, 1)], 0.5)
        assert "got the answer of another program." in said


def test_a_call_of_something_else_is_no_process(address):
    host, port = address.split(":")
    with concurrent.futures.ThreadPoolExecutor() as pool:
        said = pool.submit(_meet, [Cluster(address, 2, 0)], 1)
        for text in (b"", b"GET / HTTP/1.1\r\n\r\n", b"fm_jax -1 of 2\n"):
            while not said.done():
                try:
                    with socket.create_connection((host, int(port))) as call:
                        call.sendall(text)
                    break
                except ConnectionRefusedError:
                    time.sleep(0.01)
    assert "got no call of [1]." in said.result()[0]


def test_processes_that_never_meet_end_with_one_line_each(address):
    code = (
        "import os, sys\n"
        "from fm_jax.cluster import launchers, together\n"
        "from fm_jax.errors import UserError\n"
        "found = launchers.find('', 0, -1, os.environ)\n"
        "try: together.start(found, timeout_seconds=1)\n"
        "except UserError as error: sys.exit(f'fm: {error}')\n"
    )
    told = {"FM_NUM_PROCESSES": "3", "PYTHONPATH": str(ROOT)}
    alone = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=os.environ | told | {"FM_COORDINATOR": where, "FM_PROCESS_ID": index},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for where, index in ((address, "0"), ("127.0.0.1:9", "1"))
    ]
    for process in alone:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 1
        assert (out, err.count("\n")) == ("", 1)
        assert "within 1 s" in err
