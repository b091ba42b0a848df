"""Every shell script passes shellcheck."""

import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SCRIPTS = [
    ROOT / ".ci" / "run",
    *sorted(p for p in (ROOT / "launch").rglob("*") if p.suffix in (".sh", ".sbatch")),
]


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not here")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_script_passes_shellcheck(script):
    done = subprocess.run(
        ["shellcheck", "--external-sources", "--source-path=SCRIPTDIR", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
