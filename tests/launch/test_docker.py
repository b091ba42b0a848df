"""Tests of launch/Dockerfile and of launch/local.sh as an image's entry point.

No image is built: what it copies is looked at, and its entry point is run.
"""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parents[2]
TEXT = (ROOT / "launch" / "Dockerfile").read_text().replace("\\\n", " ")
LINES = [line.split() for line in TEXT.splitlines() if line and line[0] != "#"]
COPIES = [(words[1:-1], words[-1]) for words in LINES if words[0] == "COPY"]
NOBODY = 65534


def test_what_is_copied_is_there_and_reaches_the_builder():
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    sources = [source for names, _ in COPIES for source in names]
    assert {"fm_jax", "configs", "pyproject.toml"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists()
        assert f"!{source.partition('/')[0]}" in ignored
    assert ignored[1] == "*"
    assert "**/__pycache__" in ignored
    # Nothing is let through that is not copied.
    tops = {source.partition("/")[0] for source in sources}
    assert {line[1:] for line in ignored if line.startswith("!")} == tops


def test_what_an_installation_follows_from_is_copied_before_it():
    before = TEXT.partition("./launch/local.sh")[0]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for name in ("pyproject.toml", "launch/constraints.txt", "launch/local.sh",
                 "launch/gpu.env", project["project"]["readme"]):  # fmt: skip
        assert name in before
    # An editable installation finds no folder that is made after it.
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert f"RUN mkdir {' '.join(packages)} &&" in TEXT


def test_the_image_runs_local_sh_as_a_user_who_is_not_root():
    kept = {words[0]: words[1:] for words in LINES}
    assert kept["ENTRYPOINT"] == ['["/opt/fm_jax/launch/local.sh"]']
    assert kept["WORKDIR"] == ["/opt/fm_jax"]
    assert kept["USER"] == ["1000"]
    assert [w[0] for w in LINES].index("USER") > TEXT.count("RUN")
    assert "FM_ACCELERATOR=$ACCELERATOR FM_VENV=/opt/venv" in " ".join(TEXT.split())


# ---- the entry point


@pytest.fixture
def image():
    """Return the folder of an image: local.sh and an installation made for cpu.

    Others can read it; nobody can write to the installation.
    """
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        root = pathlib.Path(folder)
        root.chmod(0o755)
        for name in (n for names, _ in COPIES for n in names if "fm_jax" not in n):
            if (ROOT / name).is_file():
                (root / name).parent.mkdir(exist_ok=True)
                shutil.copy(ROOT / name, root / name)
        venv = root / "venv"
        (venv / "bin").mkdir(parents=True)
        (venv / "bin" / "python").symlink_to(sys.executable)
        pins = f"cat {root}/pyproject.toml {root}/launch/constraints.txt | cksum"
        sums = subprocess.run(["sh", "-c", pins], capture_output=True, check=True)
        (venv / ".fm_jax").write_bytes(b"cpu " + sums.stdout.strip() + b"\n")
        venv.chmod(0o555)
        yield root
        venv.chmod(0o755)


def _start(image, *command, **given):
    environ = {k: v for k, v in os.environ.items() if not k.startswith("FM_")}
    ours = {"FM_VENV": str(image / "venv"), "FM_ACCELERATOR": "cpu"}
    return subprocess.Popen(
        [image / "launch" / "local.sh", *command],
        env=environ | ours | given,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=image,
        # Root may write everywhere.
        user=NOBODY if os.geteuid() == 0 else None,
    )


def test_an_installation_that_is_whole_is_used_by_who_cannot_write_to_it(image):
    done = _start(image, "sh", "-c", "id -u; echo $VIRTUAL_ENV; touch $FM_VENV/x")
    out, err = done.communicate(timeout=60)
    assert out.splitlines()[1] == str(image / "venv")
    assert int(out.splitlines()[0]) != 0
    assert "Permission denied" in err  # of touch, and nothing else
    assert err.count("\n") == 1


@pytest.mark.parametrize("asked", [{"FM_ACCELERATOR": "cuda"}, {"FM_EXTRAS": "hf"}])
def test_another_installation_than_the_images_is_refused_in_one_line(image, asked):
    done = _start(image, "true", **asked)
    out, err = done.communicate(timeout=60)
    assert (done.returncode, out) == (2, "")
    lines = [line for line in err.splitlines() if line.startswith("launch/local.sh: ")]
    assert err.splitlines() == lines
    assert "FM_VENV must be writable to install for " in lines[0]
    assert "where 'cpu' is installed" in lines[0]


def test_the_command_takes_the_place_of_local_sh_and_gets_its_signals(image):
    code = "trap 'echo asked; exit 75' TERM; echo $$; while :; do sleep 0.05; done"
    process = _start(image, "sh", "-c", code)
    assert process.stdout.readline() == f"{process.pid}\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60) == ("asked\n", "")
    assert process.returncode == 75
