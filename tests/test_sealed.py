"""Programs of the cache are as they were written, or compiled again."""

import os
import pathlib
import subprocess
import sys

import pytest

from fm_jax import sealed
from fm_jax.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """Return the folder, as a path whose files are sealed."""
    from etils import epath

    return epath.Path(sealed.programs_in(str(tmp_path / "new" / "programs")))


def test_a_folder_is_private_and_said_without_the_prefix(folder, tmp_path):
    assert str(folder / "x" / "y") == str(tmp_path / "new" / "programs" / "x" / "y")
    assert (tmp_path / "new" / "programs").stat().st_mode & 0o777 == 0o700
    assert isinstance(folder / "x", sealed.SealedPath)


def test_what_is_written_is_read(folder):
    for held in (b"", b"program" * 99):
        (folder / "a-cache").write_bytes(held)
        assert (folder / "a-cache").read_bytes() == held
    assert [file.name for file in folder.iterdir()] == ["a-cache"]


def test_every_flipped_bit_and_every_cut_is_seen_and_its_file_removed(folder):
    (folder / "a").write_bytes(b"a program")
    file = pathlib.Path(folder / "a")
    raw = file.read_bytes()
    flips = [raw[:i] + bytes([raw[i] ^ 1 << i % 8]) + raw[i + 1 :]
             for i in range(len(raw))]  # fmt: skip
    for other in (*flips, *(raw[:i] for i in range(len(raw))), raw + b"\0"):
        file.write_bytes(other)
        with pytest.raises(OSError, match="is not as it was written; it is made again"):
            (folder / "a").read_bytes()
        assert not file.exists()


def test_a_write_that_fails_leaves_nothing(folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        (folder / "a").write_bytes(b"a program")
    assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as error:
        sealed.programs_in(str(tmp_path / "file" / "programs"))
    assert str(error.value) == (
        f"train.compile_cache must be a writable folder; got {tmp_path}/file/programs "
        "(Not a directory). Set it to '' for none."
    )


PROGRAM = """
import sys, warnings
import jax
from fm_jax import metrics, sealed
jax.config.update("jax_compilation_cache_dir", sealed.programs_in(sys.argv[1]))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
watch = metrics.CompileWatch()
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    f = jax.jit(lambda x: (jax.numpy.sin(x) @ x).sum())
    print(f(jax.numpy.ones((5, 5))))
print(watch.hits, watch.misses, sum("made again" in str(s.message) for s in said))
"""


def test_jax_reads_programs_that_are_whole_and_makes_damaged_ones_again(tmp_path):
    """Fault 47, around it: files of the compile cache are flipped, cut and emptied.

    Promise: those that are whole are read, the others compiled again, and whole then.
    """

    def run():
        found = subprocess.run(
            [sys.executable, "-c", PROGRAM, tmp_path / "programs"],
            env=os.environ | {"JAX_COMPILATION_CACHE_DIR": ""},
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        value, counts = found.stdout.splitlines()
        return value, tuple(map(int, counts.split()))

    value, (hits, count, told) = run()
    assert (hits, told) == (0, 0)
    assert count > 0
    assert run() == (value, (count, 0, 0))
    files = sorted((tmp_path / "programs").iterdir())
    assert len(files) == count
    for index, file in enumerate(files):
        raw = bytearray(file.read_bytes())
        raw[len(raw) // 2] ^= 4
        file.write_bytes(raw if index % 2 else raw[: len(raw) // 3])
    assert run() == (value, (0, count, count))
    assert run() == (value, (count, 0, 0))
