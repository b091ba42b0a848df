"""Tests of checkpoints: the same bits on any mesh, and the last good one stays."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from fm_jax import checkpoints, meshes
from fm_jax.checkpoints import Checkpoints
from fm_jax.errors import UserError


def _mesh(data, fsdp, tensor):
    given = {"data": data, "fsdp": fsdp, "tensor": tensor}
    return meshes.make(meshes.sizes("ddp", given, 8))


def _places(mesh):
    whole = NamedSharding(mesh, PartitionSpec())
    cut = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    return {
        "params": {"kernel": cut, "scale": whole},
        "optimizer": {"step": whole, "state": (cut, whole)},
    }


def _parts(mesh, seed=0):
    """Return a state's parts on a mesh, with bits that rounding would lose."""
    rng = np.random.default_rng(seed)
    kernel = rng.standard_normal((8, 12)).astype(np.float32)
    scale = rng.standard_normal(7).astype(np.float32)
    scale[:4] = [np.nan, np.inf, -0.0, 1e-42]
    parts = {
        "params": {"kernel": kernel, "scale": scale},
        "optimizer": {
            "step": np.int32(seed),
            "state": (kernel.astype(jnp.bfloat16), scale * 3),
        },
    }
    return jax.device_put(parts, _places(mesh))


def _abstract(parts, mesh):
    places = {name: _places(mesh)[name] for name in parts}
    return checkpoints.abstract_of(parts, places)


def _assert_same_bits(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture
def opened(tmp_path):
    """Return `opened(**kept)`: the checkpoints of one folder, closed at the end."""
    held = []

    def open_again(**kept):
        held.append(Checkpoints(tmp_path / "checkpoints", **kept))
        return held[-1]

    yield open_again
    for one in held:
        one.close()


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 4, 2), (8, 1, 1), (1, 2, 4)])
def test_a_state_comes_back_bit_by_bit_on_any_mesh(sizes, opened):
    parts = _parts(_mesh(2, 2, 2))
    saved = opened()
    saved.save(3, parts, None)
    saved.wait()
    mesh = _mesh(*sizes)
    found = opened().restore(3, _abstract(parts, mesh))
    _assert_same_bits(found, parts)
    jax.tree.map(_assert_lies, found, _places(mesh))


def _assert_lies(x, place):
    assert x.sharding.is_equivalent_to(place, x.ndim)


def test_one_part_is_restored_without_the_others(opened):
    mesh = _mesh(1, 4, 2)
    parts = _parts(mesh)
    saved = opened()
    saved.save(3, parts, None)
    saved.wait()
    params = {"params": parts["params"]}
    _assert_same_bits(saved.restore(3, _abstract(params, mesh)), params)


def test_saving_leaves_the_callers_parts_alone(opened):
    parts = _parts(_mesh(8, 1, 1))
    saved = opened(keep=2)
    for step in (1, 2):
        saved.save(step, parts, {"eval/loss": 1.0})
    saved.wait()
    assert parts.keys() == {"params", "optimizer"}
    assert saved.steps() == [1, 2]


def test_a_save_behind_the_latest_step_is_made_or_raised(opened, tmp_path):
    """Fault 16, checkpoints: a run goes back, and saves steps that are there already.

    Promise: an earlier step is saved as asked and can be restored; one that is there
    raises its number; neither is skipped without a word.
    """
    saved = opened(keep=2)
    saved.save(10, {"params": {"w": jnp.ones(3)}}, None)
    saved.save(5, {"params": {"w": jnp.full(3, 7.0)}}, None)
    saved.wait()
    assert saved.steps() == [5, 10]
    (found,) = jax.tree.leaves(saved.restore(5, {"params": {"w": jnp.zeros(3)}}))
    assert found.tolist() == [7.0] * 3
    with pytest.raises(FileExistsError, match="10"):
        saved.save(10, {"params": {"w": jnp.zeros(3)}}, None)


LOSSES = {2: 5.0, 4: 3.0, 6: 4.0, 8: 2.5, 10: 4.5, 12: 6.0}


@pytest.mark.parametrize(
    "kept, steps",
    [
        ({}, [12]),
        ({"keep": 3}, [8, 10, 12]),
        ({"keep_best": 2}, [4, 8, 12]),
        ({"keep_every": 4}, [4, 8, 12]),
        ({"keep": 2, "keep_best": 1, "keep_every": 6}, [6, 8, 10, 12]),
    ],
)
def test_kept_are_the_latest_the_best_and_every_so_many(kept, steps, opened):
    saved = opened(**kept)
    parts = {"params": {"w": jnp.ones(3)}}
    for step, loss in LOSSES.items():
        saved.save(step, parts, {"eval/loss": loss})
    saved.wait()
    assert saved.steps() == steps
    assert opened(**kept).steps() == steps


def test_the_best_step_is_that_of_the_lowest_loss(opened):
    saved = opened(keep=9)
    parts = {"params": {"w": jnp.ones(3)}}
    assert saved.best() is None
    saved.save(1, parts, None)
    saved.wait()
    assert saved.best() is None
    for step, loss in LOSSES.items():
        saved.save(step, parts, {"eval/loss": loss})
    saved.save(14, parts, None)
    saved.wait()
    assert saved.best() == 8
    assert opened(keep=9).best() == 8


def test_checkpoints_without_a_loss_are_not_kept_as_the_best(opened):
    saved = opened(keep_best=1)
    parts = {"params": {"w": jnp.ones(3)}}
    for step, metrics in ((1, None), (2, {"eval/loss": 2.0}), (3, None), (4, None)):
        saved.save(step, parts, metrics)
    saved.wait()
    assert saved.steps() == [2, 4]


def test_a_step_that_was_not_saved_is_refused_with_those_that_were(opened):
    saved = opened(keep=2)
    parts = {"params": {"w": jnp.ones(3)}}
    for step in (10, 20):
        saved.save(step, parts, None)
    saved.wait()
    with pytest.raises(UserError) as error:
        saved.restore(15, parts)
    assert str(error.value) == (
        "a step to read must be one of the saved steps [10, 20] of "
        f"{saved.path.parent}; got 15."
    )


def test_a_step_is_chosen_by_its_number_or_as_the_latest_or_best(opened, tmp_path):
    saved = opened(keep=3)
    for step, loss in ((1, 2.5), (4, 1.5), (9, 3.5)):
        saved.save(step, {"params": {"w": jnp.ones(3)}}, {"eval/loss": loss})
    saved.wait()
    steps = {"latest": 9, "best": 4, "1": 1}
    for step, expected in steps.items():
        assert checkpoints.choose(saved, step, tmp_path) == expected


@pytest.mark.parametrize(
    ("losses", "step", "said"),
    [
        ((), "latest", "a run must have a checkpoint to read; got none in here."),
        ((None,), "best", "--step=best needs checkpoints with an evaluation; got none"),
        ((None,), "\u00b2", "--step must be a number, latest or best; got '\u00b2'."),
        ((None, None), "7", "--step must be one of the saved steps [0, 1]; got 7."),
    ],
)
def test_a_step_that_cannot_be_chosen_is_refused(opened, losses, step, said):
    saved = opened(keep=2)
    for at, loss in enumerate(losses):
        saved.save(at, {"params": {"w": jnp.ones(3)}}, loss)
    saved.wait()
    with pytest.raises(UserError) as error:
        checkpoints.choose(saved, step, Path("here"))
    assert str(error.value).startswith(said)


def test_the_size_is_the_bytes_of_all_leaves():
    assert checkpoints.size_bytes(_parts(_mesh(8, 1, 1))) == (
        8 * 12 * 4 + 7 * 4 + 4 + 8 * 12 * 2 + 7 * 4
    )


class _Failing:
    """A stand-in for Orbax, whose every call meets the same error."""

    checkpoints = ()

    def __init__(self, error):
        self.error = error

    def save_checkpointables_async(self, *_, **__):
        return self

    def result(self):
        raise self.error

    wait = result


def test_an_error_that_is_not_the_disk_stays_itself_however_often(opened):
    saved = opened()
    real, saved._orbax = saved._orbax, _Failing(RuntimeError("a bug"))
    for _ in range(3):
        saved.save(1, _numbers(4), None)
        while not saved.has_failed:  # before anybody waits for it
            time.sleep(0.001)
        with pytest.raises(RuntimeError, match="a bug"):
            saved.wait()
        assert not saved.has_failed
    saved._orbax = real


def test_saves_leave_no_files_open(opened):
    saved, counts = opened(writes=True), []
    for step in range(1, 9):
        saved.save(step, _numbers(4), None)
        saved.wait()
        counts.append(len(os.listdir("/proc/self/fd")))
    assert counts[-1] <= counts[1] + 2  # each save had left three


def _numbers(size):
    return {"params": {"w": np.arange(size, dtype=np.float32) * 0.37}}


def _python(code, *arguments):
    start = (
        "import os, pathlib, resource, signal, sys\n"
        "import jax\n"
        "jax.config.update('jax_platforms', 'cpu')\n"
        "import numpy as np\n"
        "from fm_jax.checkpoints import Checkpoints\n"
        "saved = Checkpoints(pathlib.Path(sys.argv[1]), keep=2)\n"
        "def parts(size):\n"
        "    w = np.arange(size, dtype=np.float32) * 0.37\n"
        "    return {'params': {'w': jax.device_put(w)}}\n"
    )
    return subprocess.run(
        [sys.executable, "-c", start + code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def _restored(path, step, size):
    saved = Checkpoints(path, keep=2)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    struct = jax.ShapeDtypeStruct((size,), jnp.float32, sharding=place)
    found = saved.restore(step, {"params": {"w": struct}})
    steps = saved.steps()
    saved.close()
    return steps, found


FULL = """
saved.save(1, parts(1000), None)
saved.wait()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, resource.RLIM_INFINITY))
try:
    saved.save(2, parts(2_000_000), None)
    saved.wait()
except BaseException as error:
    print(type(error).__name__, error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
print(saved.steps())
saved.close()
"""


def test_a_full_disk_is_the_users_error_and_the_earlier_checkpoint_stays(tmp_path):
    """Fault 15, checkpoints: the disk is full while a save runs in the background.

    Promise: one error names the folder when the save is waited for, and the
    checkpoint before it stays whole.
    """
    path = tmp_path / "checkpoints"
    found = _python(FULL, path)
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines() == [
        f"UserError the disk must have room for a checkpoint; got none under {path}. "
        "The last good checkpoint stays. Free space or lower checkpoint.keep, then "
        "give the same command.",
        "[1]",
    ]
    steps, parts = _restored(path, 1, 1000)
    assert steps == [1]
    _assert_same_bits(parts, _numbers(1000))


KILLED = """
saved.save(1, parts(1000), None)
saved.wait()
saved.save(2, parts(16_000_000), None)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_process_killed_in_a_save_leaves_the_earlier_checkpoint(tmp_path):
    """Fault 11, checkpoints: kill -9 during a save.

    Promise: the step before is restored bit for bit, and the next save goes on from
    there.
    """
    path = tmp_path / "checkpoints"
    found = _python(KILLED, path)
    assert found.returncode == -signal.SIGKILL, found.stderr
    begun = [p.name for p in path.iterdir() if p.name != "1"]
    assert begun and "2" not in begun  # the kill came within the save
    steps, parts = _restored(path, 1, 1000)
    assert steps == [1]
    _assert_same_bits(parts, _numbers(1000))
    saved = Checkpoints(path, keep=2)
    saved.save(2, jax.device_put(_numbers(7)), None)
    saved.close()
    steps, parts = _restored(path, 2, 7)
    assert steps == [1, 2]
    _assert_same_bits(parts, _numbers(7))


@pytest.mark.parametrize("writes", [False, True])
def test_only_the_run_itself_clears_what_a_broken_save_left(writes, tmp_path):
    """Fault 11, checkpoints: kill -9 during a save.

    Promise: what was left of it is cleared by the run itself and by no reader.
    """
    under_way = tmp_path / "2.orbax-checkpoint-tmp"
    under_way.mkdir()
    Checkpoints(tmp_path, writes=writes).close()
    end = time.monotonic() + (10 if writes else 1)
    while under_way.exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert under_way.exists() != writes
