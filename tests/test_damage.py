"""Tests of checkpoints that a storage has changed: seen, told, and left as they are."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax import checkpoints, digests
from fm_jax.checkpoints import Checkpoints
from fm_jax.errors import DamagedError, UserError

NUM_FLIPS = 60


def _state(seed):
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((2, 64, 32)).astype(np.float32)
    return {
        "params": {"kernel": jnp.asarray(noise[0]), "scale": jnp.asarray(noise[1, 0])},
        "optimizer": {
            "step": jnp.int32(seed),
            "mu": jnp.asarray(noise[1]).astype("bfloat16"),
        },
    }


def _abstract():
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    state = jax.eval_shape(lambda: _state(0))
    return checkpoints.abstract_of(state, jax.tree.map(lambda _: here, state))


def _is(found, seed):
    same = jax.tree.map(
        lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(),
        found,
        _state(seed),
    )
    return all(jax.tree.leaves(same))


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """Return a folder with the steps 1 and 2."""
    path = tmp_path_factory.mktemp("saved") / "checkpoints"
    saved = Checkpoints(path, keep=2)
    for step in (1, 2):
        saved.save(step, _state(step), None)
    saved.close()
    return path


@pytest.fixture
def copied(two_steps, tmp_path):
    """Return a copy of them to damage."""
    return shutil.copytree(two_steps, tmp_path / "checkpoints")


def _files(step):
    return sorted(path for path in step.rglob("*") if path.is_file())


def _read(path):
    """Return the newest good step, whether its bits are right, and what was said."""
    said = []
    saved = Checkpoints(path)
    try:
        step, found = saved.newest(
            lambda step: saved.restore(step, _abstract()), said.append
        )
    finally:
        saved.close()
    return step, _is(found, step), said


def test_what_is_whole_is_read_without_a_word(copied):
    assert _read(copied) == (2, True, [])


@pytest.mark.parametrize("what", ["cut", "emptied", "gone"])
def test_whatever_file_is_cut_short_or_gone_nothing_wrong_is_read(
    what, copied, tmp_path
):
    """Fault 12, checkpoints: any file of the newest checkpoint is cut short or gone.

    Promise: that is told, and the one before it is read; nothing wrong ever is.
    """
    names = [file.relative_to(copied / "2") for file in _files(copied / "2")]
    assert len(names) > 5
    seen = 0
    for name in names:
        path = shutil.copytree(copied, tmp_path / "one" / "checkpoints")
        file = path / "2" / name
        raw = file.read_bytes()
        if what == "gone":
            file.unlink()
        else:
            file.write_bytes(raw[: len(raw) // 2] if what == "cut" else b"")
        step, is_right, said = _read(path)
        assert is_right, name
        assert (step == 1) == bool(said), name
        seen += step == 1
        shutil.rmtree(tmp_path / "one")
    assert seen > 3  # some files only repeat what others say


def test_a_flipped_bit_is_never_read_as_if_it_were_not(copied):
    """Fault 13, checkpoints: a bit flips in the newest checkpoint.

    Promise: its digests tell, and the one before it is read.
    """
    rng = np.random.default_rng(0)
    files = [file for file in _files(copied / "2") if file.stat().st_size]
    sizes = np.array([file.stat().st_size for file in files])
    fell_back = 0
    for _ in range(NUM_FLIPS):
        file = files[rng.choice(len(files), p=sizes / sizes.sum())]
        raw = bytearray(file.read_bytes())
        at = int(rng.integers(8 * len(raw)))
        raw[at // 8] ^= 1 << at % 8
        whole = file.read_bytes()
        file.write_bytes(raw)
        step, is_right, said = _read(copied)
        assert is_right, (file, at)
        assert (step == 1) == bool(said)
        fell_back += step == 1
        file.write_bytes(whole)
    assert fell_back > NUM_FLIPS / 2
    assert _read(copied) == (2, True, [])


def test_an_asked_for_step_that_is_damaged_is_refused_by_its_leaf(copied, monkeypatch):
    told = digests.of

    def other(tree):
        return told(tree) | {"params/kernel": 5}

    monkeypatch.setattr(digests, "of", other)
    saved = Checkpoints(copied)
    with pytest.raises(DamagedError, match=r"2.*params/kernel is not what was saved"):
        saved.restore(2, _abstract())
    with pytest.raises(DamagedError, match="params/kernel"):
        saved.check(2)
    monkeypatch.undo()
    saved.check(2)
    saved.close()


def test_where_all_are_damaged_the_newest_is_told(copied):
    for step in ("1", "2"):
        for file in _files(copied / step):
            if file.stat().st_size > 2000:
                file.write_bytes(b"")
    saved = Checkpoints(copied)
    with pytest.raises(DamagedError, match="checkpoints/2"):
        saved.newest(lambda step: saved.restore(step, _abstract()), lambda line: None)
    saved.close()


def test_damaged_steps_move_aside_and_their_number_is_free(copied):
    for turn in range(2):
        saved = Checkpoints(copied, writes=True, keep=2)
        moved = saved.set_aside(1)
        assert moved == [copied.parent / "damaged" / f"2-{turn}"]
        assert saved.steps() == [1]
        saved.save(2, _state(2), None)
        saved.close()
        assert _read(copied) == (2, True, [])
    assert len(_files(moved[0])) == len(_files(copied / "2"))


def test_a_step_from_before_there_were_digests_is_taken_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "of", lambda tree: {})
    saved = Checkpoints(tmp_path / "checkpoints")
    saved.save(1, _state(1), None)
    saved.wait()
    monkeypatch.undo()
    assert _is(saved.restore(1, _abstract()), 1)
    with pytest.raises(UserError, match="one of the saved steps"):
        saved.restore(2, _abstract())
    saved.close()


def test_folders_that_no_save_finished_are_not_read_and_not_removed(copied):
    """Fault 14, checkpoints: a step's folder is empty or was copied in part.

    Promise: the newest whole step is taken; what is in the way moves to damaged/.
    """
    (copied / "3").mkdir()
    part = copied / "4" / "params"
    part.mkdir(parents=True)
    file = _files(copied / "2" / "params")[0]
    shutil.copy(file, part)
    (copied / "mine").mkdir()
    step, is_right, said = _read(copied)
    assert (step, is_right) == (2, True)
    assert len(said) == 2
    saved = Checkpoints(copied, writes=True, keep=9)
    moved = saved.set_aside(2)
    assert (moved[1] / "params" / file.name).read_bytes() == file.read_bytes()
    for number in (3, 4):
        saved.save(number, _state(number), None)
        saved.wait()
    saved.close()
    assert _read(copied) == (4, True, [])
    assert (copied / "mine").is_dir()
