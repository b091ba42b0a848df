"""One process makes a thing for all, and a file is whole or not there."""

import contextlib
import select
import subprocess
import sys

import pytest

from fm_jax import caches
from fm_jax.errors import UserError


def refusal(function, *args):
    with pytest.raises(UserError) as caught:
        function(*args)
    return str(caught.value)


# Says when it holds the path, makes it once `go` is there, and says what it did.
MAKER = """
import pathlib, sys, time
from fm_jax import caches
path, go = map(pathlib.Path, sys.argv[1:])
print("asks", flush=True)
with caches.made_by_one(path):
    if path.exists():
        print("finds", path.read_text(), flush=True)
    else:
        print("makes", flush=True)
        while not go.exists():
            time.sleep(0.01)
        path.write_text("made")
        print("made", flush=True)
"""


@pytest.fixture
def makers(tmp_path):
    """Return `makers()`: a process that makes `tmp_path/new/thing`, and asks for it."""
    with contextlib.ExitStack() as stack:

        def start():
            command = [sys.executable, "-c", MAKER]
            command += [str(tmp_path / "new" / "thing"), str(tmp_path / "go")]
            process = stack.enter_context(
                subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            )
            stack.callback(process.kill)
            assert process.stdout.readline() == "asks\n"
            return process

        yield start


def _has_more_to_say(process, seconds):
    return bool(select.select([process.stdout], [], [], seconds)[0])


def test_a_process_waits_for_the_one_that_makes_and_finds_it_made(makers, tmp_path):
    first = makers()
    assert first.stdout.readline() == "makes\n"
    second = makers()
    assert not _has_more_to_say(second, 0.3)
    (tmp_path / "go").touch()
    assert first.communicate(timeout=30)[0] == "made\n"
    assert second.communicate(timeout=30)[0] == "finds made\n"


def test_a_process_that_waits_makes_it_when_the_first_is_killed(makers, tmp_path):
    first = makers()
    assert first.stdout.readline() == "makes\n"
    second = makers()
    assert not _has_more_to_say(second, 0.3)
    first.kill()
    assert second.stdout.readline() == "makes\n"
    (tmp_path / "go").touch()
    assert second.communicate(timeout=30)[0] == "made\n"


def test_where_the_disk_knows_no_locks_each_makes_its_own(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(caches.fcntl, "flock", unsupported)
    path = tmp_path / "new" / "thing"
    with caches.made_by_one(path), caches.made_by_one(path):
        path.touch()


def test_an_error_while_making_comes_out_and_lets_the_next_one_in(makers, tmp_path):
    path = tmp_path / "new" / "thing"
    with pytest.raises(OSError, match="full"), caches.made_by_one(path):
        raise OSError("full")
    assert makers().stdout.readline() == "makes\n"


def test_what_may_not_be_built_is_refused(tmp_path):
    caches.require(True, tmp_path / "thing")
    assert refusal(caches.require, False, tmp_path / "thing") == (
        f"{tmp_path / 'thing'} must be prepared; got nothing there. fm train does."
    )


def test_a_file_is_written_whole_or_the_one_before_stays(tmp_path, monkeypatch):
    path = tmp_path / "thing.json"
    caches.write_whole(path, "one")
    monkeypatch.setattr(caches.os, "fsync", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        caches.write_whole(path, "two")
    assert path.read_text() == "one"
    assert [p.name for p in tmp_path.iterdir()] == ["thing.json"]


def test_bytes_are_written_as_they_are(tmp_path):
    caches.write_whole(tmp_path / "thing.npy", b"\xff\r\n\x00")
    assert (tmp_path / "thing.npy").read_bytes() == b"\xff\r\n\x00"
