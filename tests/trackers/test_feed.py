"""The queue and its thread: whatever a tracker does, nobody waits for long."""

import threading
import time

import pytest

from fm_jax.errors import StoppedError
from fm_jax.runs import Run
from fm_jax.trackers import feed as feeds
from fm_jax.trackers.feed import Feed


class Kept:
    """A tracker that keeps what it is told."""

    num_dropped = 0

    def __init__(self):
        self.heard = []

    def row(self, when, row):
        self.heard.append(row)

    def rewind(self, step, since, kept):
        self.heard.append((step, since, kept))

    def flush(self):
        pass

    def end(self, status):
        self.heard.append(status)

    def close(self, until):
        self.heard.append("closed")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Let a look come soon, and closing give up soon."""
    monkeypatch.setattr(feeds, "LOOK", 0.02)
    monkeypatch.setattr(feeds, "SLACK", 0.1)
    monkeypatch.setattr(
        feeds, "CLOSING", {"finished": 0.5, "failed": 0.5, "preempted": 0.5}
    )


def _rows(count):
    return [{"step": n, "train/loss": n / 7} for n in range(1, count + 1)]


def test_rows_come_in_order_those_from_before_the_start_first():
    kept, said = Kept(), []
    with Feed() as feed:
        feed.row({"step": 1})
        feed.start({"kept": lambda: kept}, said.append)
        feed.row({"step": 2})
    assert kept.heard == [{"step": 1}, {"step": 2}, "finished", "closed"]
    assert said == []
    assert "trackers" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (StoppedError(3), "preempted"),
        (KeyboardInterrupt(), "preempted"),
        (RuntimeError(), "failed"),
    ],
)
def test_how_the_block_ends_is_told(error, status):
    kept = Kept()
    with pytest.raises(type(error)), Feed() as feed:
        feed.start({"kept": lambda: kept}, print)
        raise error
    assert kept.heard == [status, "closed"]


def test_a_feed_that_was_never_started_closes():
    with Feed() as feed:
        feed.row({"step": 1})


@pytest.mark.parametrize("where", ["open", "row", "rewind", "flush", "end", "close"])
def test_a_tracker_that_raises_is_left_out_after_one_warning(where):
    kept, said = Kept(), []

    def fail(*_):
        raise OSError(5, "no such place")

    def opened():
        broken = Kept()
        if where == "open":
            fail()
        setattr(broken, where, fail)
        return broken

    with Feed() as feed:
        feed.start({"broken": opened, "kept": lambda: kept}, said.append)
        for row in _rows(3):
            feed.row(row)
        feed.rewind(2, _rows(2))
    assert said == [
        "WARNING: broken is left out: no such place; metrics.jsonl has every row"
    ]
    assert kept.heard == [*_rows(3), (2, 0, _rows(2)), "finished", "closed"]


@pytest.mark.parametrize("where", ["open", "row", "flush", "close"])
def test_a_tracker_that_hangs_holds_up_the_end_for_a_bounded_time(where):
    said, free, hangs = [], threading.Event(), threading.Event()

    def hang(*_):
        hangs.set()
        free.wait(20)

    def opened():
        stuck = Kept()
        if where == "open":
            hang()
        setattr(stuck, where, hang)
        return stuck

    feed = Feed()
    feed.start({"stuck": opened}, said.append)
    began = time.monotonic()
    for row in _rows(100):
        feed.row(row)
    assert time.monotonic() - began < 0.3
    feed.close("finished")
    assert hangs.is_set()
    assert 0.5 < time.monotonic() - began < 3
    assert len(said) == 1 and "trackers did not end in 0.6 s" in said[0]
    free.set()


def test_a_full_queue_counts_what_it_has_no_room_for(monkeypatch):
    monkeypatch.setattr(feeds, "MOST_ROWS", 5)
    kept, said = Kept(), []
    feed = Feed()
    for row in _rows(12):
        feed.row(row)
    feed.start({"kept": lambda: kept}, said.append)
    feed.close("finished")
    assert kept.heard == [*_rows(5), "finished", "closed"]
    assert said == [
        "WARNING: 7 rows were too many for the trackers; metrics.jsonl has every row"
    ]


def test_what_a_tracker_dropped_is_told_by_its_name():
    kept, said = Kept(), []
    kept.num_dropped = 1234
    with Feed() as feed:
        feed.start({"slow": lambda: kept}, said.append)
    assert "1,234 rows were too many for the trackers slow" in said[0]


def test_a_warning_that_cannot_be_said_stops_nothing():
    def full(line):
        raise OSError(28, "No space left on device")

    kept = Kept()
    with Feed() as feed:
        feed.start({"broken": lambda: 1 / 0, "kept": lambda: kept}, full)
        feed.row({"step": 1})
    assert kept.heard == [{"step": 1}, "finished", "closed"]


def test_a_warning_tells_no_secret(monkeypatch):
    said = []

    def fail():
        raise OSError("no answer from https://me:hunter22@example.com/api")

    with Feed() as feed:
        feed.start({"broken": fail}, said.append)
    assert "[left out]@example.com" in said[0] and "hunter22" not in said[0]


def test_of_a_long_run_the_last_rows_are_handed_on_again(monkeypatch):
    """A process that is killed had no more in hand than that."""
    monkeypatch.setattr(feeds, "AGAIN", 4)
    kept = Kept()
    with Feed() as feed:
        feed.start({"kept": lambda: kept}, print)
        feed.rewind(10, _rows(10))
    assert kept.heard[0] == (10, 7, _rows(10)[6:])


def test_the_step_that_a_run_goes_on_from_is_handed_on_again(monkeypatch):
    """Its closing row, which bears that step, was taken back."""
    monkeypatch.setattr(feeds, "AGAIN", 0)
    kept = Kept()
    with Feed() as feed:
        feed.start({"kept": lambda: kept}, print)
        feed.rewind(10, _rows(10))
    assert kept.heard[0] == (10, 10, _rows(10)[9:])


def test_a_run_tells_its_hearer_of_metrics_alone_and_of_what_it_takes_back(tmp_path):
    kept = Kept()
    with Feed() as feed:
        feed.start({"kept": lambda: kept}, print)
        run = Run(tmp_path / "run", hearer=feed)
        run.begin()
        run.rewind(0)
        for row in _rows(3):
            run.append(row)
        run.append({"step": 3, "text": "a"}, "samples.jsonl")
        run.append({"step": 3, "final/loss": 1.0})
        run.rewind(2)
    final = {"step": 3, "final/loss": 1.0}
    assert kept.heard[:-2] == [
        (0, 0, []), *_rows(3), final, (2, 0, _rows(2))
    ]  # fmt: skip
