"""Tests of the table of faults: README.md has it, and it is what the tests say."""

import pytest

from tests import faults

GOOD = '''
def test_the_shard_is_named():
    """Fault 36, data: a bit flips inside
    a shard.

    Promise: the shard is named, exit 2; nothing
    trains on it.
    """


async def test_another():
    """Fault 4, stopping: a second SIGTERM.

    Promise: it ends.
    """


def test_nothing():
    """Faults of others are no matter of this."""
'''
ROW = (
    "| 36, data: a bit flips inside a shard | the shard is named, exit 2; nothing "
    "trains on it | `data/test_x::test_the_shard_is_named` |"
)


@pytest.fixture
def plant(tmp_path):
    """Return `plant(text)`: the table of the tests that stand in it."""

    def plant(text, name="data/test_x.py"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        return faults.table(faults.collect(tmp_path))

    return plant


def test_the_readme_has_the_table_that_the_tests_make():
    found = faults.written(faults.README.read_text(encoding="utf-8"))
    assert found == faults.table(faults.collect()), "run python -m tests.faults --write"


def test_rows_are_sorted_by_number_and_told_in_one_line(plant):
    heading, rule, *rows = plant(GOOD).splitlines()
    assert (heading, rule) == ("| fault | promise | test |", "| --- | --- | --- |")
    assert rows == [
        "| 4, stopping: a second SIGTERM | it ends | `data/test_x::test_another` |",
        ROW,
    ]


def test_a_changed_promise_is_another_table(plant):
    before = plant(GOOD)
    assert before != plant(GOOD.replace("exit 2", "exit 1"))
    assert before != plant(GOOD.replace("test_another", "test_other"))
    assert before == plant(GOOD)


def test_tests_of_one_fault_share_its_row(plant):
    plant(GOOD)
    other = GOOD.replace("test_the_shard", "test_a_shard").replace("it ends", "at once")
    rows = plant(other, "test_y.py").splitlines()[2:]
    assert rows[0].startswith("| 4, stopping: a second SIGTERM | it ends; at once | ")
    assert rows[1:] == [
        ROW.replace("named` |", "named`, `test_y::test_a_shard_is_named` |")
    ]


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ("Fault 36,", "Fault 36 "),
        ("Fault 36,", "Fault thirty-six,"),
        ("data:", "disks:"),
        ("a shard.", "a shard"),
        ("    Promise", "    promise"),
        ("a shard.\n\n", "a shard.\n"),
        ("trains on it.", "trains on it"),
        ("trains on it.", "trains on it.\n\n    And more"),
        ("the shard is named", "the shard | is named"),
        ("def test_the_shard", "def the_shard"),
    ],
)
def test_a_docstring_that_is_almost_one_is_refused(good, bad, plant):
    assert good in GOOD
    with pytest.raises(ValueError, match="must be a test whose docstring is `Fault"):
        plant(GOOD.replace(good, bad, 1))


def test_the_table_is_put_between_the_marks(tmp_path, monkeypatch, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{faults.BEGIN}\nold\n{faults.END}\nafter\n")
    monkeypatch.setattr(faults, "README", readme)
    faults.main([])
    made = capsys.readouterr().out
    assert made == faults.table(faults.collect())
    faults.main(["--write"])
    expected = f"before\n{faults.BEGIN}\n{made}{faults.END}\nafter\n"
    assert readme.read_text() == expected
    readme.write_text("no marks")
    with pytest.raises(ValueError, match="must have the marks"):
        faults.main(["--write"])
