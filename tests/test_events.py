"""Tests of events and of goodput, which are told from them."""

import pytest

from fm_jax import events
from fm_jax.errors import LostError, UserError
from fm_jax.runs import Run


def _row(time, attempt, event, step=None, trained=None):
    row = {"time": time, "attempt": attempt, "event": event}
    return row if step is None else row | {"step": step, "trained": trained}


# Two preemptions: the second start lost what the first did after step 20.
ROWS = [
    _row(100.0, 1, "start"),
    _row(110.0, 1, "ready", 0, 0.0),
    _row(130.0, 1, "save", 20, 20.0),
    _row(145.0, 1, "eval", 30, 30.0),  # killed afterwards
    _row(200.0, 2, "start"),
    _row(210.0, 2, "ready", 20, 0.0),
    _row(220.0, 2, "save", 28, 8.0),
    _row(221.0, 2, "end"),
    _row(300.0, 3, "start"),
    _row(305.0, 3, "ready", 28, 0.0),
    _row(320.0, 3, "done", 40, 12.0),
]


def test_goodput_counts_steps_that_were_kept_over_all_time():
    found = events.goodput(ROWS)
    assert (found.seconds, found.trained, found.attempts) == (220.0, 40.0, 3)
    assert found.share == 40 / 220


def test_goodput_of_a_start_that_lost_everything():
    rows = [*ROWS[:4], _row(200.0, 2, "start"), _row(210.0, 2, "ready", 0, 0.0)]
    assert events.goodput(rows).trained == 0
    assert events.goodput(ROWS[:4]).trained == 30
    assert events.goodput([]).share == 0
    assert events.goodput(ROWS[:1]).share == 0
    assert (
        events.goodput([*ROWS[:4], _row(150.0, 1, "odd") | {"step": 5}]).trained == 30
    )


def test_events_know_their_attempt(tmp_path):
    seconds = iter((0.5, 1.25))
    for attempt in (1, 2):
        made = events.Events(Run(tmp_path), lambda: next(seconds))
        assert made.attempt == attempt
        made.add("start", devices=8)
        made.add("save", 5)
    rows = events.read(Run(tmp_path))
    assert [row["event"] for row in rows] == ["start", "save"] * 2
    assert rows[0].keys() == {"time", "attempt", "event", "devices"}
    assert (rows[3]["attempt"], rows[3]["step"], rows[3]["trained"]) == (2, 5, 1.25)


def _dies(attempt, *more):
    return [_row(0, attempt, "start"), *more]


def test_a_run_that_dies_at_each_start_is_refused(tmp_path):
    """Fault 10, stopping: a run is started again and again and dies each time.

    Promise: after five starts in a row that saved nothing, exit 2 with the reason.
    """
    run = Run(tmp_path)
    ready = _row(0, 1, "ready", 20, 0.0)
    rows = [row for n in range(1, 6) for row in _dies(n, ready)]
    events.refuse_fruitless(rows[:-2], run)
    with pytest.raises(UserError, match="5 in a row that died"):
        events.refuse_fruitless(rows, run)


@pytest.mark.parametrize(
    "row",
    [
        _row(0, 3, "end"),
        _row(0, 3, "saved", 25, 1.0),
        _row(0, 4, "ready", 25, 0.0),  # what was not said to be saved was there
    ],
)
def test_what_was_saved_or_said_breaks_the_row(row, tmp_path):
    rows = [row for n in range(1, 4) for row in _dies(n)]
    rows += [row, *(r for n in range(4, 6) for r in _dies(n))]
    events.refuse_fruitless(rows, Run(tmp_path))


def test_an_end_because_others_were_lost_does_not(tmp_path):
    left = _row(0, 1, "end") | {"status": LostError.exit_status}
    rows = [row for n in range(1, 6) for row in _dies(n, left)]
    with pytest.raises(UserError, match="5 in a row that died"):
        events.refuse_fruitless(rows, Run(tmp_path))
    rows[3] = _row(0, 2, "end") | {"status": UserError.exit_status}
    events.refuse_fruitless(rows, Run(tmp_path))


def test_goodput_of_a_start_that_went_back():
    rows = [
        *ROWS[:3],
        _row(131.0, 1, "rewind", 33, 21.0),
        _row(132.0, 1, "ready", 20, 21.0),
        _row(140.0, 1, "done", 40, 28.0),
    ]
    found = events.goodput(rows)
    assert (found.trained, found.attempts) == (20 + 7, 1)
