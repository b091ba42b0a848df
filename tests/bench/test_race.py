"""Tests of processes by turns: who runs when, and what is said of one that fails."""

import pytest

from fm_jax.bench import race, ratios
from fm_jax.errors import UserError

CHILD = '''"""A side to take turns with: it writes its name to a file at each turn."""
import json, sys, time

spec = json.loads(sys.argv[1])
if spec.get("fails"):
    sys.exit("no room")
print(json.dumps({"about": spec["side"]}), flush=True)
for line in sys.stdin:
    if line.strip() != "go":
        break
    with open(spec["file"], "a") as file:
        file.write(spec["side"])
    answer = {"seconds": 0.5, "cpu_seconds": 0.25, "faults": 3}
    print(json.dumps(answer), flush=True)
print(json.dumps({"peak_host_bytes": 7}), flush=True)
'''


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """Return a function that starts a worker whose process is CHILD."""
    (tmp_path / "race_child.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(race, "MODULE", "race_child")
    started = []

    def start(side, **spec):
        spec |= {"side": side, "file": str(tmp_path / "turns")}
        started.append(race.Worker(spec))
        return started[-1]

    yield start
    for one in started:
        one.close()


def test_in_every_round_all_have_one_turn_in_order(worker, tmp_path):
    samples = race.run([worker("a"), worker("b"), worker("c")], 3)
    assert (tmp_path / "turns").read_text() == "abc" * 3
    assert [len(taken) for taken in samples] == [3, 3, 3]
    first = samples[0][0]
    assert (first.seconds, first.cpu_seconds, first.faults) == (0.5, 0.25, 3)
    assert first.busy >= 0


def test_a_worker_tells_of_itself_at_both_ends(worker):
    one = worker("a")
    assert one.ready == {"about": "a"}
    assert one.end() == {"peak_host_bytes": 7}


def test_a_process_that_fails_is_named_with_its_last_words(worker):
    with pytest.raises(UserError, match=r"must end well; b said: no room"):
        worker("b", fails=True)


def test_a_ratio_is_each_rounds_own():
    theirs, ours = [2.0, 40.0, 9.0], [1.0, 10.0, 3.0]
    found = ratios.paired(theirs, ours)
    assert found == {"median": 3.0, "low": 2.5, "high": 3.5, "rounds": 3}
    assert ratios.quartiles([5.0]) == (5.0, 5.0, 5.0)
