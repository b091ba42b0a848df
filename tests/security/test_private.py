"""What is kept and what listens is this user's alone, unless more was asked for."""

import ast
import os
import pathlib
import shutil
import socket
import stat
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from fm_jax import caches, configfile
from fm_jax.cli import COMMANDS
from fm_jax.cluster import launchers, meeting, together
from fm_jax.cluster.launchers import Cluster
from fm_jax.data.arrays import Growing
from fm_jax.errors import UserError
from fm_jax.serve import command as serving
from fm_jax.train import compose
from tests.data import made

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(params=[0o000, 0o002, 0o022, 0o077], ids=oct)
def umask(request):
    """Set the umask to one that hides nothing, little, or all from others."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.fixture
def no_cache(monkeypatch):
    """Let JAX have no compilation cache, and leave it as it was."""
    import jax

    kept = {
        name: getattr(jax.config, name)
        for name in (
            "jax_compilation_cache_dir",
            "jax_persistent_cache_min_compile_time_secs",
            "jax_persistent_cache_min_entry_size_bytes",
        )
    }
    jax.config.update("jax_compilation_cache_dir", None)
    yield lambda: jax.config.jax_compilation_cache_dir
    for name, value in kept.items():
        jax.config.update(name, value)


def _mode(path):
    return stat.S_IMODE(path.stat().st_mode)


# ---- Caches


def test_a_cache_is_made_for_its_user_alone(tmp_path, umask, no_cache):
    """Fault 51, security: a cache on a disk that others use too.

    Promise: it is made 0700 under any umask; a compile cache others write is refused.
    """
    caches.folder(tmp_path / "home" / "cache" / "deep")
    with caches.made_by_one(tmp_path / "other" / "thing"):
        pass
    compose.use_compile_cache(str(tmp_path / "new" / "jax"))
    assert no_cache() == f"sealed://{tmp_path}/new/jax"
    folders = [p for p in tmp_path.rglob("*") if p.is_dir()]
    assert {p.name for p in folders} >= {"home", "cache", "deep", "other", "new", "jax"}
    assert {p: oct(_mode(p)) for p in folders} == dict.fromkeys(folders, "0o700")


def test_stores_and_what_else_is_cached_stand_in_private_folders(tmp_path, umask):
    cache = tmp_path / "cache"
    made.build(cache, ["abc", "defg"], made.BYTES, num_workers=1)
    assert any(cache.rglob("header.json"))
    assert _mode(cache) == _mode(cache / "stores") == 0o700


def test_what_is_asked_for_by_out_is_as_the_user_has_it(tmp_path, umask):
    out = tmp_path / "mine" / "train"
    made.build(tmp_path, ["abc", "defg"], made.BYTES, num_workers=1, out=out)
    assert _mode(tmp_path / "mine") == 0o777 & ~umask


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o720, 0o702, 0o1777])
def test_programs_are_not_taken_from_where_others_write(tmp_path, mode, no_cache):
    path = tmp_path / "shared"
    path.mkdir()
    path.chmod(mode)
    with pytest.raises(UserError) as error:
        compose.use_compile_cache(str(path))
    assert str(error.value) == (
        "train.compile_cache must be a folder of yours alone, for what is in it is "
        f"run; got {path}, which others can write to. chmod go-w {path}, or choose "
        "another."
    )
    assert no_cache() is None
    path.chmod(mode & 0o755)
    compose.use_compile_cache(str(path))
    assert no_cache() == f"sealed://{path}"


def test_programs_are_not_taken_from_another_users(tmp_path, monkeypatch, no_cache):
    uid = tmp_path.stat().st_uid
    monkeypatch.setattr(caches.os, "geteuid", lambda: uid + 1)
    with pytest.raises(UserError, match=r"which is another user's\. Choose another"):
        compose.use_compile_cache(str(tmp_path))
    assert no_cache() is None


def test_a_link_to_where_others_write_is_looked_through(tmp_path, no_cache):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    (tmp_path / "mine").symlink_to("shared")
    with pytest.raises(UserError, match="which others can write to"):
        compose.use_compile_cache(str(tmp_path / "mine"))
    assert no_cache() is None


def test_a_run_does_not_say_where_programs_are_kept(tmp_path):
    raw = configfile.load_base()
    raw["train"] |= {"compile_cache": str(tmp_path / "theirs"), "steps": 3}
    record = {key: {} for key in ("changed_from_base", "resolved", "data")}
    run = configfile.Run(tmp_path)
    run.write_config(record | {"config": raw, "history": []})
    for given in (tmp_path, tmp_path / "config.json"):
        found = configfile.load(str(given)).to_dict()
        assert found["train"]["compile_cache"] == configfile.own_cache()
        assert found["train"]["steps"] == 3
    raw["train"]["compile_cache"] = ""  # that none are kept, it may say
    run.write_config(record | {"config": raw, "history": []})
    assert configfile.load(str(tmp_path)).to_dict()["train"]["compile_cache"] == ""
    # What fm sweep hands to its own runs is the user's.
    raw["train"]["compile_cache"] = "mine"
    (tmp_path / "mine.json").write_text(configfile.json.dumps({"config": raw}))
    found = configfile.load(str(tmp_path / "mine.json")).to_dict()
    assert found["train"]["compile_cache"] == "mine"


def test_a_file_beside_its_place_is_not_for_others_to_write(tmp_path):
    before = os.umask(0o022)
    try:
        caches.write_whole(tmp_path / "a.json", "{}")
        file = Growing(tmp_path / "a.npy", "<i4")
        file.append(np.arange(3))
        file.finish()
    finally:
        os.umask(before)
    for path in tmp_path.iterdir():
        assert not _mode(path) & (stat.S_IWGRP | stat.S_IWOTH)


# ---- Sockets


def _listening(sock):
    return sock.getsockname()[0]


def test_a_server_is_reached_from_this_machine_alone_unless_asked():
    """Fault 51, security: a socket that more can reach than were asked in.

    Promise: loopback alone, unless --host or the coordinator's address say more.
    """
    default = COMMANDS["serve"].flags["host"][0]
    with serving.bound(default, 0) as sock:
        assert serving.is_loopback(sock)
    with serving.bound("0.0.0.0", 0) as sock:
        assert not serving.is_loopback(sock)
        served = type("Served", (), {"name": "a", "capacity": 3})
        worker = type("Worker", (), {"num_slots": 1, "max_waiting": 1})
        lines = list(serving.welcome(served, worker, sock, api_key=""))
        assert any("WARNING: whoever reaches this address" in line for line in lines)


@pytest.mark.parametrize(
    ("host", "bind"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("localhost", "127.0.0.1"),
        ("LocalHost", "127.0.0.1"),
        ("[::1]", "::1"),
        ("10.1.2.3", None),
        ("127.0.0.1.example.org", None),
        ("node7", None),
    ],
)
def test_processes_of_one_machine_meet_where_others_do_not_come(
    host, bind, monkeypatch
):
    monkeypatch.delenv("JAX_COORDINATOR_BIND_ADDRESS", raising=False)
    found = Cluster(f"{host}:5000", 2, 0)
    if bind == "::1" and not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    with meeting._listen(0, bind=found.bind_host, backlog=1) as server:
        assert _listening(server) == (bind or _anywhere())
    told = {"127.0.0.1": "127.0.0.1:5000", "::1": "[::1]:5000", None: None}
    assert together._bind_address(found) == told[bind]


def test_the_address_that_jax_was_given_holds(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_BIND_ADDRESS", "127.0.0.1:5000")
    with meeting._listen(0, bind="", backlog=1) as server:
        assert _listening(server) == "127.0.0.1"
    assert together._bind_address(Cluster("node7:5000", 2, 0)) is None


def _anywhere():
    return "::" if socket.has_dualstack_ipv6() else "0.0.0.0"


def test_the_launcher_lets_processes_meet_on_this_machine():
    text = (ROOT / "launch" / "local.py").read_text()
    assert '"FM_COORDINATOR": f"127.0.0.1:{port}"' in text
    assert launchers.Cluster("127.0.0.1:1", 2, 0).bind_host == "127.0.0.1"


def test_whoever_says_nothing_right_is_no_process_of_ours():
    for said in (b"", b"GET / HTTP/1.1\r\n\r\n", b"fm_jax 1 of 2", b"\xff" * 64,
                 b"fm_jax -1 of 2\n", b"fm_jax 1 of 2\n" * 9):  # fmt: skip
        here, there = socket.socketpair()
        with here, there:
            there.sendall(said)
            there.shutdown(socket.SHUT_WR)
            heard = meeting._hear(here)
            assert heard is None or said.startswith(b"fm_jax 1 of 2\n")


# Where a file may have a socket, and what for.
SOCKETS = {
    "fm_jax/cluster/meeting.py",  # processes of a cluster
    "fm_jax/serve/command.py",  # fm serve
    "fm_jax/data/site.py",  # the name of the machine alone
    "fm_jax/runs.py",  # the same
    "fm_jax/trackers/board.py",  # the same
    "fm_jax/watch.py",  # a pair of this process alone: signals to a thread
    "launch/local.py",  # a port that is free
}


def test_nothing_else_listens_and_workers_talk_through_pipes():
    having = set()
    for folder in ("fm_jax", "configs", "launch"):
        for file in (ROOT / folder).rglob("*.py"):
            text = file.read_text()
            tops = {
                alias.name.split(".")[0]
                for node in ast.walk(ast.parse(text))
                if isinstance(node, ast.Import | ast.ImportFrom)
                for alias in (
                    node.names
                    if isinstance(node, ast.Import)
                    else [ast.alias(node.module or "")]
                )
            }
            if tops & {"socket", "socketserver", "http", "multiprocessing", "zmq"}:
                having.add(file.relative_to(ROOT).as_posix())
            assert "mkfifo" not in text and "AF_UNIX" not in text
    assert having == SOCKETS


def test_a_worker_process_takes_no_library_from_the_folder_it_is_started_in(tmp_path):
    if not shutil.which(sys.executable):
        pytest.skip("no Python to start")
    (tmp_path / "numpy.py").write_text("open('ran', 'w').close()\n")
    code = textwrap.dedent(
        """
        from fm_jax.data import worker
        print(worker.subprocess.Popen)
        """
    )
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-P", "-c", code]
    subprocess.run(words, cwd=tmp_path, env=environ, check=True, capture_output=True)
    assert not (tmp_path / "ran").exists()
    assert (
        '"-P", "-m", "fm_jax.data.worker"'
        in (ROOT / "fm_jax" / "data" / "worker.py").read_text()
    )
