"""Data that comes slowly shows in the numbers of a run."""

import time

from fm_jax import cli
from fm_jax.data.batches import TrainBatches
from fm_jax.runs import Run


def test_waiting_for_slow_data_is_told_apart_from_training(tiny, tmp_path, monkeypatch):
    """Fault 43, data: batches come slowly.

    Promise: the seconds that steps waited for data are in the metrics, apart from
    those that they trained.
    """
    read = TrainBatches.read

    def slow(plan, start, stop):
        time.sleep(0.5 * (stop - start))
        return read(plan, start, stop)

    monkeypatch.setattr(TrainBatches, "read", slow)
    run = Run(tmp_path / "run")
    flags = [*tiny, "--config.train.steps=4", "--config.eval.every=0"]
    assert cli.main(["train", *flags, f"--workdir={run.path}"]) == 0
    ((waited,), (trained,)) = (
        run.series(f"time/{name}_seconds")[1] for name in ("wait_for_data", "train")
    )
    assert trained < 1.0 <= waited
