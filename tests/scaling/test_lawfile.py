"""Tests of a user's law: every mistake in it is one line with a way out."""

import numpy as np
import pytest

from fm_jax.errors import UserError
from fm_jax.scaling import lawfile

GOOD = """
NAMES = ("E", "A", "alpha")
START = [(1.0, 100.0, 0.3), (2.0, 50.0, 0.2)]

def loss(theta, params, tokens):
    E, A, alpha = theta
    return E + A / params**alpha
"""


def test_a_file_may_say_no_more_than_names_and_a_loss(tmp_path):
    path = tmp_path / "law.py"
    path.write_text(GOOD.replace("START", "UNREAD"))
    found = lawfile.read(path)
    assert found.names == ("E", "A", "alpha")
    assert found.columns == ("params", "tokens")
    assert found.scales == {}
    assert found.start is None


def test_one_guess_or_several_are_rows(tmp_path):
    path = tmp_path / "law.py"
    path.write_text(GOOD)
    np.testing.assert_array_equal(
        lawfile.read(path).start, [[1, 100, 0.3], [2, 50, 0.2]]
    )
    path.write_text(GOOD + "START = (1, 2, 3)")
    np.testing.assert_array_equal(lawfile.read(path).start, [[1, 2, 3]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "must exist; got no such file. Check"),
        (("NAMES =", "NAMES = ="), "must run; got SyntaxError: "),
        (("START =", "1 / 0 #"), "must run; got ZeroDivisionError: division by zero. "),
        (("NAMES =", "NAME ="), "must define NAMES, a tuple of names; got None. For "),
        (('"E"', '"E 1"'), "must define NAMES, a tuple of names; got .'E 1', 'A'"),
        (('"E"', '"A"'), "must name each parameter once; got .'A', 'A', 'alpha'"),
        (("START =", "COLUMNS = 'params' #"), "give COLUMNS as a tuple of names; got"),
        (("def loss", "def lost"), "must define a function loss; got None. Write def"),
        (
            (", tokens)", ")"),
            r"take theta and the COLUMNS in loss; got loss\(theta, pa",
        ),
        (("START =", "SCALES = {'B': 'log'} #"), "give SCALES as a dict of some of NA"),
        (("START =", "SCALES = {'A': 'ln'} #"), "Each is one of log, linear, signed"),
        (("(1.0, ", "('one', "), "must give START as numbers; got"),
        (("(1.0, ", "("), "must give START as numbers; got"),
        (
            ("START =", "START = (1, 2) #"),
            "give 3 numbers for each guess of START; got",
        ),
        (("(1.0, ", "(-1.0, "), "START, above 0 where the scale is log; got .* SCALES"),
        (
            ("E + A", "E + math.log(A)"),
            "must work on arrays in loss; got NameError: na",
        ),
        (("E + A", "(E > 0 and E) + A"), "work on arrays in loss; got ValueError: The"),
        (
            ("/ params", "/ params.sum()"),
            r"for each theta and point; got shape \(2, 1\)",
        ),
    ],
)
def test_a_mistake_in_a_law_file_is_one_line(tmp_path, change, message):
    path = tmp_path / "law.py"
    if change is not None:
        assert change[0] in GOOD
        path.write_text(GOOD.replace(change[0], change[1], 1))
    with pytest.raises(UserError, match=message) as caught:
        lawfile.read(path)
    assert str(caught.value).startswith(f"law file {path} must ")
    assert "\n" not in str(caught.value)
