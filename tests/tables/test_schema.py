"""The columns of the run table and what a row of them may hold."""

import json
import re

import numpy as np
import pytest

from fm_jax.tables import schema
from tests.tables import runfolders


def _values(**given):
    return runfolders.row("a", 40) | given


def test_a_row_has_the_columns_in_order_and_survives_json():
    row = schema.row(**dict(reversed(_values(unique_tokens=25_000).items())))
    assert list(row) == list(schema.COLUMNS)
    assert json.loads(json.dumps(row)) == row


def test_format_is_filled_in():
    values = _values()
    del values["format"]
    assert schema.row(**values)["format"] == schema.FORMAT == 1


def test_numbers_of_numpy_become_plain_numbers_of_the_columns_type():
    row = schema.row(
        **_values(step=np.int64(7), loss=np.float32(2.5), flops_exact=2**70)
    )
    assert (type(row["step"]), type(row["loss"])) == (int, float)
    assert row["flops_exact"] == 2.0**70
    assert row["loss"] == 2.5


def test_every_column_says_what_it_means():
    for kind, meaning in schema.WRITTEN.values():
        assert kind in (int, float, str, bool)
        assert meaning


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"stpe": 1}, "strange ['stpe']"),
        ({"step": 1.5}, "step must be an integer or None; got 1.5."),
        ({"seed": True}, "seed must be an integer or None; got True."),
        ({"is_final": 1}, "is_final must be true or false or None; got 1."),
        ({"loss": "3"}, "loss must be a number or None; got '3'."),
        ({"device": 3}, "device must be a string or None; got 3."),
        ({"loss": float("nan")}, "loss must be finite; got nan. Give None"),
        ({"loss": np.float32("inf")}, "loss must be finite; got inf."),
        ({"run_id": None}, "run_id must be a string; got None."),
        ({"status": "done"}, "status must be one of running, final, diverged; got"),
        ({"format": 2}, "format must be 1; got 2."),
    ],
)
def test_a_row_that_does_not_fit_is_refused(given, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        schema.row(**_values(**given))


def test_a_missing_column_is_refused():
    values = _values()
    del values["tokens"]
    with pytest.raises(ValueError, match=re.escape("missing ['tokens']")):
        schema.row(**values)
