"""Tests of what the figures share: ticks, numbers as text, and no pyplot."""

import subprocess
import sys

import numpy as np
import pytest

from fm_jax.scaling import axes


@pytest.mark.parametrize(
    ("value", "said"),
    [(7e7, "70M"), (1.5e9, "1.5B"), (1e12, "1T"), (999, "999"), (1e3, "1k"),
     (3e21, "3·10²¹"), (1e18, "10¹⁸")],
)  # fmt: skip
def test_amounts_are_short(value, said):
    assert axes.amount(value) == said


@pytest.mark.parametrize(
    ("low", "high", "most", "said"),
    [
        (1.3, 1.9, 7, [1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9]),
        (4e7, 1.1e10, 7, [1e8, 3e8, 1e9, 3e9, 1e10]),
        (2e17, 3e24, 5, [1e19, 1e21, 1e23]),
        (2.01, 2.04, 7, np.geomspace(2.01, 2.04, 3)),
    ],
)
def test_ticks_are_round_and_no_more_than_asked(low, high, most, said):
    np.testing.assert_allclose(axes.ticks(low, high, most=most), said)


def test_drawing_leaves_pyplot_alone_and_needs_no_jax():
    code = (
        "import sys\nfrom fm_jax.scaling import axes, plot\n"
        "assert 'matplotlib' not in sys.modules\nwith axes.styled(): pass\n"
        "plot.png(axes.figure(2, 2))\n"
        "print([m for m in ('matplotlib.pyplot', 'jax', 'pandas', 'scipy')"
        " if m in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"
