"""Tests of what the process says of itself, its allocator, and how quiet it is."""

import gc
import importlib.util
import os
import pathlib
import platform
import subprocess
import sys
import time

import numpy as np
import pytest

from fm_jax import __version__, machine


def _python(code, *arguments, timeout=60):
    found = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=timeout,
    )
    return found.stdout.split()


def test_versions_name_python_the_system_and_every_package():
    found = machine.versions()
    assert found["python"] == platform.python_version()
    assert found["numpy"] == np.__version__
    assert found["fm_jax"] == __version__
    assert set(found) == {"python", "system", *machine.PACKAGES}
    assert "not installed" not in found.values()


def test_a_package_that_is_missing_is_said_to_be(monkeypatch):
    monkeypatch.setattr(machine, "PACKAGES", ("numpy", "no-such-package"))
    assert machine.versions()["no-such-package"] == "not installed"


def test_seconds_since_start_are_those_since_the_process_was_made():
    code = (
        "import time; from fm_jax import machine; time.sleep(0.2)\n"
        "print(machine.seconds_since_start())"
    )
    before = time.perf_counter()
    (inside,) = map(float, _python(code))
    outside = time.perf_counter() - before
    tick = 0.02  # the system counts a process's start in hundredths
    assert 0.2 - tick < inside < outside + tick


def test_seconds_since_start_go_by_like_seconds():
    readings = [time.perf_counter()]
    start = machine.seconds_since_start()
    readings.append(time.perf_counter())
    time.sleep(0.05)
    readings.append(time.perf_counter())
    stop = machine.seconds_since_start()
    readings.append(time.perf_counter())
    least, most = readings[2] - readings[1], readings[3] - readings[0]
    rounding = 1e-4
    assert least - rounding <= stop - start <= most + rounding


def test_without_proc_the_time_of_the_processor_stands_in(monkeypatch):
    def missing(*_):
        raise FileNotFoundError("/proc/self/stat")

    monkeypatch.setattr(machine.Path, "read_text", missing)
    before = time.process_time()
    assert before <= machine.seconds_since_start() <= time.process_time()


def test_flags_of_xla_are_those_that_are_set(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", " --a=1 --b=2 ")
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "")
    assert machine.xla_flags() == {"XLA_FLAGS": "--a=1 --b=2"}
    assert machine.started(["fm"])["xla"] == {"XLA_FLAGS": "--a=1 --b=2"}


def test_cores_are_those_that_this_process_may_use():
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("needs Linux")
    mine = os.sched_getaffinity(0)
    assert machine.num_cores() == len(mine)
    os.sched_setaffinity(0, {min(mine)})
    try:
        assert machine.num_cores() == 1
    finally:
        os.sched_setaffinity(0, mine)


HELD = """
from fm_jax import machine
before = machine.peak_memory_bytes()
held = bytes([1]) * (before + 2**20)
grown = machine.peak_memory_bytes()
size = len(held)
del held
print(before, size, grown, machine.peak_memory_bytes())
"""


def test_peak_memory_grows_by_what_is_held_and_stays():
    before, held, grown, after = map(int, _python(HELD))
    assert 2**20 < before < held < grown < before + 2 * held
    assert after > held


def test_peak_memory_is_not_what_a_parent_held_before():
    child = "from fm_jax import machine; print(machine.peak_memory_bytes())"
    held = bytes([1]) * 2**29
    (peak,) = map(int, _python(child))
    assert peak < len(held)


HOLDS = """
import pathlib
from fm_jax import machine

def resident():
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return 1024 * int(line.split()[1])

readings = [machine.memory_bytes(), resident()]
held = bytes([1]) * 200_000_000
readings += [machine.memory_bytes(), resident()]
del held
readings += [machine.memory_bytes(), resident()]
print(*readings)
"""


@pytest.mark.skipif(not pathlib.Path("/proc/self").exists(), reason="asks /proc")
def test_memory_is_what_is_resident_now_and_no_longer_what_was():
    before, system_before, held, system_held, after, system_after = map(
        int, _python(HOLDS)
    )
    slack = 2**20  # the kernel counts pages in batches
    assert before == pytest.approx(system_before, abs=slack)
    assert held == pytest.approx(system_held, abs=slack)
    assert after == pytest.approx(system_after, abs=slack)
    assert held - before == pytest.approx(200_000_000, abs=slack)
    assert after == pytest.approx(before, abs=slack)


def test_memory_that_cannot_be_told_is_zero(monkeypatch):
    def missing(*_):
        raise FileNotFoundError("/proc/self/statm")

    monkeypatch.setattr(machine.Path, "read_text", missing)
    assert machine.memory_bytes() == 0


FAULTS = """
import ctypes, resource, sys
from fm_jax import machine
if sys.argv[1] == "tuned":
    machine.tune_allocator()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
def take(size):
    block = libc.malloc(size)
    libc.memset(block, 1, size)
    libc.free(block)
size = 64 << 20  # over what glibc ever keeps by itself
take(size)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    take(size)
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults * resource.getpagesize() / size)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="tunes glibc alone")
def test_a_tuned_process_keeps_the_pages_of_freed_buffers():
    # In buffers' worth of small pages; the system may give large ones, far fewer.
    (plain,) = map(float, _python(FAULTS, "plain"))
    (tuned,) = map(float, _python(FAULTS, "tuned"))
    assert tuned < 1e-3 < plain


def test_other_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(machine.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(machine.ctypes, "CDLL", None)
    machine.tune_allocator()


def _git(folder, *arguments):
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=True
    ).stdout.strip()


def test_the_git_state_is_the_commit_and_whether_files_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "machine.py"))
    _git(tmp_path, "init", "-q")
    (tmp_path / "machine.py").write_text("1")
    _git(tmp_path, "add", ".")
    _git(tmp_path, "commit", "-qm", "first")
    commit = _git(tmp_path, "rev-parse", "HEAD")
    assert machine.git_state() == {"commit": commit, "dirty": False}
    (tmp_path / "machine.py").write_text("2")
    assert machine.git_state() == {"commit": commit, "dirty": True}


def test_without_git_the_state_is_empty(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "machine.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert machine.git_state() == {}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.git_state() == {}


@pytest.fixture
def devices(tmp_path, monkeypatch):
    """Return `devices(*vendors)`: the PCI devices that this machine then has."""

    def pretend(*vendors, given=(), plugin=False):
        for index, vendor in enumerate(vendors):
            (tmp_path / f"0000:00:{index:02d}.0").mkdir()
            (tmp_path / f"0000:00:{index:02d}.0" / "vendor").write_text(f"{vendor}\n")
        (tmp_path / "dev").mkdir()
        for name in given:
            (tmp_path / "dev" / name).touch()
        known = {"/sys/bus/pci/devices": tmp_path, "/dev": tmp_path / "dev"}
        monkeypatch.setattr(machine, "Path", known.__getitem__)
        monkeypatch.setattr(os, "environ", {"TPU_MIN_LOG_LEVEL": "0", "HOME": "/root"})
        plugins = {"jax_plugins": object()} if plugin else {}
        monkeypatch.setattr(importlib.util, "find_spec", plugins.get)

    return pretend


@pytest.mark.parametrize("vendors", [(), ("0x8086",), ("0x10de", "0x8086")])
@pytest.mark.parametrize("plugin", [False, True])
def test_without_a_tpu_its_compiler_is_left_out_and_what_was_given_stays(
    vendors, plugin, devices
):
    devices(*vendors, plugin=plugin)
    machine.skip_absent_tpu()
    assert os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] == "1"
    platforms = {} if plugin else {"JAX_PLATFORMS": "cpu"}
    given = {"TPU_MIN_LOG_LEVEL": "0", "HOME": "/root"}
    assert os.environ == machine.QUIET | platforms | given
    assert machine.QUIET["TPU_MIN_LOG_LEVEL"] != "0"


@pytest.mark.parametrize(
    "vendors, given", [(("0x8086", "0x1ae0"), ()), ((), ("accel0",)), ((), ("vfio",))]
)
def test_where_a_tpu_is_nothing_is_changed(vendors, given, devices):
    devices(*vendors, given=given)
    machine.skip_absent_tpu()
    assert os.environ == {"TPU_MIN_LOG_LEVEL": "0", "HOME": "/root"}


def test_imports_are_collected_neither_while_they_come_nor_later():
    code = (
        "import gc\n"
        "from fm_jax import machine\n"
        "with machine.importing():\n"
        "    print(gc.isenabled())\n"
        "print(gc.isenabled(), gc.get_freeze_count() > 0)\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == ["False", "True", "True"]


def test_where_jax_is_there_nothing_is_kept_from_the_collector(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", np)
    frozen = gc.get_freeze_count()
    with machine.importing():
        assert gc.isenabled()
    assert gc.get_freeze_count() == frozen
