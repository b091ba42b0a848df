"""Small real runs for the tests of trackers, and readers of what these keep."""

import contextlib
import json
import pathlib
import socket
import subprocess
import sys
import threading

import pytest

from fm_jax.trackers.rows import scalars
from tests.train.conftest import ROOT, corpus, environment, fm, tiny

__all__ = ["corpus", "environment", "fm", "tiny"]

# `fm` with trackers that are waited for less long.
HASTY = """
import sys
from fm_jax import cli
from fm_jax.trackers import feed
feed.CLOSING = dict.fromkeys(feed.CLOSING, 3.0)
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture(scope="session")
def hasty(environment):
    """Return `hasty(*arguments, **environment)`: `fm`, which gives trackers 3 s."""

    def run(*arguments, **extra):
        return subprocess.run(
            [sys.executable, "-c", HASTY, *map(str, arguments)],
            env=environment | extra,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run


@pytest.fixture
def silent():
    """Return the URL of a server that takes connections and never answers."""
    taken = []

    def serve(listening):
        with contextlib.suppress(OSError):
            while True:
                taken.append(listening.accept()[0])

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=serve, args=(listening,), daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        assert taken, "nothing asked the server"
        listening.shutdown(socket.SHUT_RDWR)
    for one in taken:
        one.close()


@pytest.fixture
def refusing():
    """Return the URL of a port that nothing listens at."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


def points(run):
    """Return {(metric, step): value} of a run's metrics.jsonl, the last of each."""
    return {
        (name, row["step"]): value
        for row in run.rows()
        for name, value in scalars(row).items()
    }


def wandb_records(folder):
    """Yield the records of a run folder's W&B files, in order of their starts.

    They are in LevelDB's log format after a header of seven bytes: blocks of 32 KiB,
    pieces with checksum, length and type: whole, first, middle or last.
    """
    from wandb.proto import wandb_internal_pb2

    for file in sorted(pathlib.Path(folder).glob("wandb/offline-run-*/*.wandb")):
        raw, at, held = file.read_bytes(), 7, b""
        while at + 7 <= len(raw):
            if 32768 - at % 32768 < 7:
                at += 32768 - at % 32768
                continue
            length, kind = int.from_bytes(raw[at + 4 : at + 6], "little"), raw[at + 6]
            held += raw[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):
                record = wandb_internal_pb2.Record()
                record.ParseFromString(held)
                yield record
                held = b""


def wandb_points(records):
    """Return {(metric, step): value} of the history of W&B's records, the last."""
    found = {}
    for record in records:
        if record.WhichOneof("record_type") == "history":
            row = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            step = row.pop("step")
            found |= {(k, step): v for k, v in row.items() if not k.startswith("_")}
    return found
