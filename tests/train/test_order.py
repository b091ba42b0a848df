"""The tokens of a step are the same whoever reads them: hashed, over real processes."""

import hashlib
import pathlib
import subprocess
import sys

import numpy as np
import pytest

LAUNCH = pathlib.Path(__file__).parent.parent.parent / "launch" / "local.py"
STEPS = 9

# Reads steps as fm train does, and keeps the rows that this process would train on.
READER = """
import os, sys
import numpy as np
from fm_jax import config as configs
from fm_jax import flags, sharding
from fm_jax.commands.listed import COMMANDS
out, start, argv = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
config = configs.check(flags.parse(COMMANDS["train"], argv)[1])
from fm_jax.cluster import launchers, together
together.start(launchers.find("", 0, -1, os.environ), timeout_seconds=60)
from fm_jax.prepare import opened
from fm_jax.train import compose, feeds
data = together.each(lambda: opened.open_data(config, print))
layout = compose.open_layout(config)
parts = compose.build(
    compose.resolve(config, data.tokenizer), layout,
    corpus_tokens=data.train.num_targets, train_names=data.train.names,
)
rows = sharding.local_rows(config.train.batch_size, layout)
for step, batch in enumerate(feeds.train_batches(parts, data, start), start):
    np.savez(f"{out}/{step}-{rows[0]}.npz", rows=rows, **batch)
together.leave(0)
"""


def _read(folder, flags, environment, *, start=0, processes=1, devices=1):
    """Return the sha256 of the whole batch of each step, as processes read it."""
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, LAUNCH, f"--processes={processes}",
         f"--devices_per_process={devices}", sys.executable, "-c", READER,
         folder, str(start), *flags],
        env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = {}
    for step in range(start, STEPS):
        parts = [np.load(path) for path in folder.glob(f"{step}-*.npz")]
        assert len(parts) == processes
        rows = np.concatenate([part["rows"] for part in parts])
        assert sorted(rows) == list(range(8))
        digest = hashlib.sha256()
        for name in sorted(parts[0].files):
            whole = np.concatenate([part[name] for part in parts])
            digest.update(name.encode() + whole[np.argsort(rows)].tobytes())
        found[step] = digest.hexdigest()
    return found


@pytest.fixture(scope="module")
def alone(tiny, environment, tmp_path_factory):
    """Return the hashes of one process with one device, from the first step."""
    folder = tmp_path_factory.mktemp("order") / "alone"
    return _read(folder, [*tiny, f"--config.train.steps={STEPS}"], environment)


def test_no_two_steps_are_the_same(alone):
    assert len(set(alone.values())) == STEPS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "devices", "start", "more"),
    [
        (2, 1, 0, ["--config.train.accumulation=2"]),
        (4, 1, 3, []),
        (2, 2, 5, ["--config.mesh.preset=fsdp", "--config.data.num_workers=2"]),
    ],
)
def test_the_tokens_of_a_step_are_the_same_for_any_processes(
    processes, devices, start, more, alone, tiny, environment, tmp_path
):
    """Fault 41, data: a run goes on with other hosts, devices, accumulation or workers.

    Promise: the tokens of a step are a function of seed and step alone: the same bytes
    for 1, 2 and 4 real processes, from any step.
    """
    flags = [*tiny, f"--config.train.steps={STEPS}", *more]
    flags.append(f"--config.data.cache_dir={tmp_path / 'cache'}")  # built anew
    found = _read(
        tmp_path / "read", flags, environment,
        start=start, processes=processes, devices=devices,
    )  # fmt: skip
    assert found == {step: alone[step] for step in range(start, STEPS)}
