"""Run folders as training leaves them, with chosen numbers and times."""

import json
import os
import time

from fm_jax.runs import Run

RECORD = {
    "config": {"eval": {"every": 20}},
    "changed_from_base": {},
    "resolved": {"steps": 100, "tokens_per_step": 64},
    "data": {},
    "history": [],
}
SPEED = {"perf/tokens_per_second": 320.0, "perf/mfu": 0.25}
EVENTS = [
    {"time": 100.0, "attempt": 1, "event": "start"},
    {"time": 102.0, "attempt": 1, "event": "ready", "step": 0, "trained": 0.0},
    {"time": 110.0, "attempt": 1, "event": "eval", "step": 20, "trained": 5.0},
]


def rows(last=30):
    """Return rows of metrics: each step's, and those of an evaluation at 20."""
    found = [
        {"step": step, "train/loss": 5 - step / 10, **(SPEED if step > 1 else {})}
        for step in range(1, last + 1)
    ]
    return [*found[:20], {"step": 20, "eval/loss": 3.25}, *found[20:]]


def run(path, *, metrics=None, events=EVENTS, seconds=0, **files):
    """Write a run that its process was last heard of so many seconds ago; its path.

    files: what stands in others, by name; `alive_1` is alive/1, an int there an age.
    """
    made = Run(path)
    made.begin()
    made.write_config(RECORD)
    for row in rows() if metrics is None else metrics:
        made.append(row)
    for row in events:
        made.append(row, "events.jsonl")
    (path / "alive").mkdir()
    (path / "exits").mkdir()
    for name, content in ({"alive_0": seconds} | files).items():
        file = path / name.replace("_", "/")
        if content is None:
            continue
        is_age = isinstance(content, int)
        file.write_text("7\n" if is_age else content)
        if is_age:
            aged(file, content)
    aged(path / "config.json", 5000)  # which each start writes
    for name in ("metrics.jsonl", "events.jsonl"):
        if (path / name).exists():
            aged(path / name, max(seconds, 3))
    return path


def aged(file, seconds):
    """Make a file so many seconds old."""
    when = time.time() - seconds
    os.utime(file, (when, when))


def lines(values):
    """Return values as lines of JSON."""
    return "".join(json.dumps(value) + "\n" for value in values).encode()
