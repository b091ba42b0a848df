"""Tests of the folder that a store is made in."""

import fcntl
import os
import socket
import time

import pytest

from fm_jax.data import site
from fm_jax.data.site import Site


@pytest.fixture
def place(tmp_path):
    (tmp_path / "stores").mkdir()
    return tmp_path / "stores" / "abc"


def finish_a_shard(folder):
    (folder.parts / "00000-00000.json").write_text("{}")


def test_what_is_left_is_for_the_same_plan_alone(place):
    one = Site(place, "abc")
    assert one.folder == place.parent / ".abc.building"
    assert not one.open("plan")
    finish_a_shard(one)
    one.leave()
    assert Site(place, "abc").open("plan")
    assert not Site(place, "abc").open("another plan")
    assert list(one.parts.glob("*.json")) == []


def test_what_has_no_finished_shard_is_not_left(place):
    one = Site(place, "abc")
    one.open("plan")
    (one.parts / ".00000-00000.tokens.7").write_text("half")
    one.leave()
    assert list(place.parent.iterdir()) == []


def test_what_was_half_written_goes_when_work_begins_again(place):
    one = Site(place, "abc")
    one.open("plan")
    finish_a_shard(one)
    (one.parts / ".00000-00001.tokens.7").write_text("half")
    assert Site(place, "abc").open("plan")
    names = sorted(file.name for file in one.parts.iterdir())
    assert names == ["00000-00000.json", "plan"]


def test_hashes_of_a_lane_are_left_too(place):
    one = Site(place, "abc")
    one.open("plan")
    (one.parts / "00000.hashes").write_text("")
    one.leave()
    assert Site(place, "abc").open("plan")


def test_a_whole_store_is_put_in_place_without_what_it_was_made_of(place):
    one = Site(place, "abc")
    one.open("plan")
    finish_a_shard(one)
    (one.folder / ".tokenizer.json.77").write_text("half")
    (one.folder / "offsets.npy").write_text("")
    one.finish("header")
    one.leave()
    two = Site(place, "abc")
    assert two.open("whatever the plan is")
    assert two.is_whole
    two.put()
    assert sorted(f.name for f in place.iterdir()) == ["header.json", "offsets.npy"]
    assert list(place.parent.iterdir()) == [place]


def test_another_place_has_another_folder_for_each_store(place):
    folders = {Site(place, name).folder.name for name in ("abc", "def", "xyz")}
    assert folders == {".abc.building", ".abc.def.building", ".abc.xyz.building"}


def test_what_nobody_went_on_with_for_long_goes(place):
    old, new, mine = (Site(place.parent / name, name) for name in ("old", "new", "abc"))
    for other in (old, new):
        other.open("plan")
        finish_a_shard(other)
    then = time.time() - site.KEPT_SECONDS - 60
    os.utime(old.parts, (then, then))
    mine.open("plan")
    assert not old.folder.exists()
    assert new.parts.exists()


def test_where_there_are_no_locks_each_has_a_folder_that_it_leaves_to_nobody(
    place, monkeypatch
):
    def refuse(file, how):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    one = Site(place, "abc")
    name = f".abc.building-{socket.gethostname()}-{os.getpid()}"
    assert one.folder == place.parent / name
    one.open("plan")
    finish_a_shard(one)
    one.leave()
    assert not one.folder.exists()
