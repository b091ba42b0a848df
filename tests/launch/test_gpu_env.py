"""Tests of launch/gpu.env: what a program on a GPU is told, and what it is not."""

import os
import pathlib
import subprocess

import pytest

LAUNCH = pathlib.Path(__file__).parent.parent.parent / "launch"
NAMES = ("XLA_FLAGS", "XLA_PYTHON_CLIENT_MEM_FRACTION", "CUDA_DEVICE_MAX_CONNECTIONS")
HIDING = "xla_gpu_enable_latency_hiding_scheduler"


@pytest.fixture
def told(tmp_path):
    """Return a function of libraries' texts, a GPU and an environment to what is set.

    As the launcher does, bash ends at the first command that fails.
    """

    def told(libraries, capability="", **given):
        for name, text in libraries.items():
            path = tmp_path / "lib" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        tool = tmp_path / "bin" / "nvidia-smi"
        tool.parent.mkdir()
        tool.write_text(f"#!/bin/sh\necho {capability}\n")
        tool.chmod(0o755)
        environ = {k: v for k, v in os.environ.items() if k not in NAMES} | given
        environ |= {"PATH": f"{tool.parent}:{os.environ['PATH']}"}
        code = f"set -euo pipefail; venv={tmp_path}; . {LAUNCH}/gpu.env; env"
        found = subprocess.run(
            ["bash", "-c", code],
            env=environ,
            capture_output=True,
            text=True,
            check=True,
        )
        lines = (line.partition("=") for line in found.stdout.splitlines())
        return {name: value for name, _, value in lines if name in NAMES}

    return told


def test_only_flags_that_every_library_knows_are_given(told):
    libraries = {
        "a/libjax_common.so": f"\0{HIDING}\0xla_gpu_enable_pipelined_all_gather\0",
        "b/xla_cuda_plugin.so": f"{HIDING}\0xla_gpu_enable_pipelined_all_gather_2\0",
    }
    assert told(libraries, capability="9.0") == {
        "XLA_FLAGS": f"--{HIDING}=true ",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    }


def test_what_the_user_set_wins(told):
    given = {
        "XLA_FLAGS": f"--{HIDING}=false",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5",
        "CUDA_DEVICE_MAX_CONNECTIONS": "32",
    }
    found = told({"libjax_common.so": HIDING}, capability="9.0", **given)
    # Of a flag that is given twice XLA takes the later.
    assert found == given | {"XLA_FLAGS": f"--{HIDING}=true --{HIDING}=false"}


def test_nothing_is_guessed_without_libraries_or_a_gpu(told):
    assert told({"other.so": HIDING}) == {
        "XLA_FLAGS": "",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9",
    }
