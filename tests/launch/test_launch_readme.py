"""launch/README.md names what is there, and what it says agrees with the code."""

import pathlib
import re

from fm_jax import cli, errors, watch
from fm_jax.cluster import launchers
from fm_jax.commands.listed import COMMANDS

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
TEXT = (LAUNCH / "README.md").read_text()


def test_each_engine_has_a_row_and_each_file_of_a_row_is_there():
    linked = set(re.findall(r"\]\(([^)]+)\)", TEXT))
    engines = {
        str(path.relative_to(LAUNCH))
        for pattern in ("**/*.yaml", "**/*.sbatch", "tpu/*.sh", "Dockerfile")
        for path in LAUNCH.glob(pattern)
    }
    assert engines <= linked
    for name in linked:
        # A folder that was not taken along is not looked into.
        if (LAUNCH / name).parent.exists():
            assert (LAUNCH / name).exists(), name


def test_the_statuses_and_their_restarts_are_the_programs():
    rows = dict(re.findall(r"^\| (\d+) \|.*\| (no|yes)[^|]*\|$", TEXT, re.MULTILINE))
    again = {errors.StoppedError.exit_status, watch.EXIT_STOPPED, watch.EXIT_HUNG}
    final = {0, cli.EXIT_FAILURE, errors.UserError.exit_status}
    final |= {errors.DivergedError.exit_status}
    assert {int(status) for status, word in rows.items() if word == "yes"} == again
    assert {int(status) for status, word in rows.items() if word == "no"} == final


def test_the_contract_names_what_the_program_reads():
    for name in launchers.NAMES:
        assert f"`{name}" in TEXT
    grace = COMMANDS["train"].flags["grace"][0]
    assert f"within `--grace` seconds ({grace:g})" in TEXT
