import json

from fm_jax.sweeps import progress
from fm_jax.sweeps.progress import Line


def _lines(*states):
    return [
        Line(name=f"run{i}", state=state, step=3, steps=7, seconds=61.2, loss=2.5)
        for i, state in enumerate(states)
    ]


def test_a_change_of_state_is_said_once():
    said = []
    view = progress.View(said.append, is_terminal=False)
    view.update(_lines("running", "waiting"), 100.0)
    view.update(_lines("running", "waiting"), 90.0)
    view.update(_lines("done", "running"), 59.2)
    view.close()
    assert said == [
        "[0/2] run0 running, loss 2.5000 nats/token; left about 0:01:40",
        "[1/2] run0 done after 0:01:02, loss 2.5000 nats/token; left about 0:01:00",
        "[1/2] run1 running, loss 2.5000 nats/token; left about 0:01:00",
    ]


def test_what_was_so_before_is_not_said():
    said = []
    view = progress.View(said.append, is_terminal=False)
    view.skip(_lines("done", "waiting"))
    view.update(_lines("done", "running"), 59.2)
    assert [line.split(",")[0] for line in said] == ["[1/2] run1 running"]


def test_a_terminal_shows_running_runs_first_and_few_of_many(capsys):
    lines = _lines(*["done"] * 20, "running", *["waiting"] * 5)
    drawn = progress._drawn(lines, 10.0)
    names = list(drawn.columns[0].cells)
    assert str(names[0]) == "run20"
    assert len(names) == progress.NUM_SHOWN
    assert "26 runs: 20 done, 1 running, 5 waiting" in str(drawn.caption)
    view = progress.View(print, is_terminal=True)
    view.update(lines, 10.0)
    view.say("something [else]")
    view.close()
    assert "something [else]" in capsys.readouterr().err


def test_the_last_step_is_that_of_the_last_whole_line(tmp_path):
    assert progress.last_step(tmp_path) == 0
    rows = [{"step": step, "x": "y" * 50} for step in range(400)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 77')
    assert progress.last_step(tmp_path) == 399
