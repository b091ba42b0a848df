"""Names and paths that come from a file or a request, and what hostile ones do."""

import json
import os
import pathlib
import struct

import numpy as np
import pytest

from fm_jax import configfile
from fm_jax.corpora import tfds
from fm_jax.errors import UserError
from fm_jax.finetune import weights
from fm_jax.hf import adapters, adopt, carried, header, tensors
from fm_jax.runs import Run
from fm_jax.serve import requests
from fm_jax.serve.refused import Refused
from fm_jax.serve.served import Served
from fm_jax.sweeps import workdir
from fm_jax.tables import rows
from fm_jax.tokenizers import load as loading
from fm_jax.tokenizers import template
from tests.data import written
from tests.hf import made
from tests.security import mutants
from tests.security.test_fuzz_runs import RECORD
from tests.tables import runfolders

NAMES = {
    "absolute": "/tmp/outside",
    "above": "../outside",
    "above and down": "a/../../outside",
    "here": ".",
    "up": "..",
    "nothing": "",
    "nul": "a\0b",
    "line": "a\nb",
    "escape": "a\x1b[2Jb",
    "dash": "-rf",
    "home": "~/.ssh/authorized_keys",
    "another's home": "~nobody_is_called_so/x",
    "variable": "$HOME/x",
    "long": "a" * 4000,
    "windows": "..\\outside",
    "device": "/dev/zero",
    "address": "file:///etc/passwd",
    "right to left": "a\u202ecod",
    "fullwidth dots": "\uff0e\uff0e/outside",
    "slash like": "\u2215etc\u2215passwd",
    "half a pair": "\ud800",
    "blank": "   ",
}

HALF = "surrogates not allowed"  # what no file can be written with


@pytest.fixture(params=NAMES)
def name(request):
    return NAMES[request.param]


@pytest.fixture
def inside(tmp_path, monkeypatch):
    """Return a folder to work in; what is beside it must stay as it is."""
    folder = tmp_path / "inside"
    folder.mkdir()
    (tmp_path / "outside").write_text("as it was")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    yield folder
    assert sorted(p.name for p in tmp_path.iterdir()) == ["inside", "outside"]
    assert (tmp_path / "outside").read_text() == "as it was"


@pytest.mark.parametrize("end", ["", ".safetensors"])
def test_an_index_names_files_of_its_folder_alone(inside, name, end):
    """Fault 48, security: names in files that lead elsewhere.

    Promise: each is refused in one line or means nothing; no path leaves its folder.
    """
    made.save(inside / "model-1.safetensors", {"a": np.ones(2, np.float32)})
    index = {"weight_map": {"a": name + end, "b": "model-1.safetensors"}}
    (inside / tensors.INDEX).write_text(json.dumps(index))
    assert str(inside) in mutants.refused(tensors.open_folder, inside)


def test_a_store_is_of_the_files_that_the_format_names(inside, name):
    folder = written.write(inside / "store", ["abc"])
    shards = json.loads((folder / "header.json").read_text())["shards"]
    written.reseal(folder, shards=[shards[0] | {"file": name}])
    with pytest.raises(UserError, match=r"shards\[0\]\['file'\] must be tokens-00000"):
        from fm_jax.data import store

        store.open_store(folder)


def test_a_stores_name_makes_no_path(inside, name):
    from fm_jax.data import packing, store

    folder = written.write(inside / "store", ["abc", "defg"])
    written.reseal(folder, name=name)
    if mutants.refused(store.open_store, folder):
        return
    plans = inside / "plans"
    mutants.refused(packing.plan, store.open_store(folder), "single", 3, folder=plans)
    made_there = {p.parent for p in inside.rglob("starts.npy")}
    assert all(place.parent == plans for place in made_there)


@pytest.mark.parametrize("begin", ["", "000-", "0-../../"])
def test_a_line_of_a_sweep_names_a_folder_of_its_runs(inside, name, begin):
    line = {"name": begin + name, "hash": "0" * 16}
    (inside / "sweep.jsonl").write_text(json.dumps(line) + "\n")
    (inside / "sweep.json").write_text('{"sweep": {}}')
    said = mutants.refused(workdir.read, inside)
    assert HALF in said or "must name runs as 000-n1.2e6" in said


def test_a_planned_parent_is_looked_up_and_not_opened(inside, name):
    runfolders.run(inside / "sweep" / "runs" / "000-a", [runfolders.row("a", 40)])
    runfolders.plan(inside / "sweep", ("000-a", name, 1e9, 0))
    if not mutants.refused(rows.collect, inside / "sweep"):
        (row,) = rows.collect(inside / "sweep").rows
        assert row["parent_id"] == (name or None)


def test_a_run_that_began_from_elsewhere_is_not_followed(inside, name):
    began = {"path": name, "run_id": "a-1", "step": 2, "tokens": 1.0}
    resolved = RECORD["resolved"] | {"init": began | {"with_optimizer": False}}
    run = Run(inside / "run")
    run.begin()
    run.write_config(RECORD | {"resolved": resolved})
    said = mutants.refused(lambda: weights.base_of(run, configfile.read_run(run)))
    assert any(one in said for one in ("be where it was", "name too long", HALF))


def test_a_beginning_that_is_nowhere_is_refused(inside, name):
    raw = configfile.load_base()
    raw["init"] |= {"from": name, "model": True}
    said = mutants.refused(adopt.adopted, raw)
    assert bool(said) == bool(name)


def test_an_adapter_names_its_base_and_does_not_bring_it(inside, name):
    folder = inside / "adapter"
    folder.mkdir()
    low = adapters.Low(np.ones((2, 3), np.float32), np.ones((3, 2), np.float32), 1.0)
    whole = adapters.Adapter(
        lows={"q": low}, rank=2, alpha=1.0, root=False, dropout=0.0, is_turned=False,
        base="",
    )  # fmt: skip
    adapters.write(folder, whole, ["q"])
    config = json.loads((folder / adapters.CONFIG).read_text())
    text = json.dumps(config | {"base_model_name_or_path": name})
    (folder / adapters.CONFIG).write_text(text)
    if name == NAMES["half a pair"]:
        assert HALF in mutants.refused(adapters.read, folder)
        return
    assert adapters.read(folder).base == name


def test_a_tensor_may_have_any_name(inside, name):
    file = inside / "a.safetensors"
    said = {name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    text = json.dumps(said).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    if name == NAMES["half a pair"]:
        assert HALF in mutants.refused(header.read, file)
        return
    assert list(header.read(file)) == [name]
    file.write_bytes(header.write({name: ("F32", (1,))}) + bytes(4))
    assert list(header.read(file)) == [name]


def test_a_request_asks_for_the_model_that_is_served(name):
    body = json.dumps({"model": name, "prompt": "a"}).encode()
    asked = requests.completion(body)
    served = Served("mine", 0, 9, 9, None, None, None, (), (), ())
    with pytest.raises(Refused) as error:
        served.requests(asked)
    assert error.value.status == 404
    text = json.dumps(error.value.body(), ensure_ascii=False)
    assert text.encode() and "\n" not in error.value.message


def test_what_is_carried_with_weights_is_of_known_names(inside, name):
    theirs = inside / "theirs"
    theirs.mkdir()
    (theirs / "config.json").write_text("{}")
    for other in ("modeling.py", ".env", "tokenizer.py"):
        (theirs / other).write_text("import os")
    carried.copy(theirs, inside / "ours")
    assert [p.name for p in (inside / "ours").iterdir()] == ["config.json"]


def test_a_tokenizer_or_template_that_is_elsewhere_is_not_there(inside, name):
    if name.strip() and not name.startswith("/dev"):
        assert mutants.refused(loading.load, pathlib.Path(name))
    (inside / "tokenizer_config.json").write_text(json.dumps({"chat_template": name}))
    if not mutants.refused(template.find, inside):
        found = template.find(inside)  # a name is a template that says itself
        assert found is None or found.render([]).strip() in name


def test_a_dataset_that_brings_its_code_is_refused(inside):
    for name in ("huggingface:evil", "some_one:set/config:1.0.0", ":set"):
        asked = tfds.Tfds(name=name, data_dir="", text_field="text")
        with pytest.raises(UserError, match="whose code it would fetch and run"):
            asked._builder  # noqa: B018
    for name in ("c4", "c4/en", "c4/en:3.0.1", "c4:3.*.*", "mine:1.0.0"):
        assert not tfds.ELSEWHERE.match(name)


# ---- What is no plain file


@pytest.fixture(params=["pipe", "folder", "loop", "device"])
def odd(request, inside):
    """Return `odd(file)`: something that is no file stands there."""

    def make(file):
        file.unlink(missing_ok=True)
        match request.param:
            case "pipe":
                os.mkfifo(file)
            case "folder":
                file.mkdir()
            case "loop":
                file.symlink_to(file)
            case _:
                file.symlink_to("/dev/zero")
        return file

    return make


def test_a_pipe_in_place_of_a_file_is_not_waited_for(inside, odd):
    """Fault 48, security: a pipe or a device in place of a file of a folder.

    Promise: it is refused at once in one line, never waited for, never read on and on.
    """
    run = Run(inside)
    assert mutants.refused(header.read, odd(inside / "model.safetensors"))
    odd(inside / "config.json")
    assert mutants.refused(run.read_config)
    assert mutants.refused(loading.load, odd(inside / "tokenizer.json"))
    odd(inside / tensors.INDEX)
    (inside / "model.safetensors").rename(inside / "another")
    assert mutants.refused(tensors.open_folder, inside)
    odd(inside / "chat_template.jinja")
    assert mutants.refused(template.read, inside / "chat_template.jinja")
    odd(inside / "sweep.json")
    assert mutants.refused(configfile.read_json, inside / "sweep.json")


def test_a_link_out_of_a_folder_is_read_as_what_it_must_be(inside):
    made.save(inside / "model.safetensors", {"a": np.ones(2, np.float32)})
    (inside / "folder").mkdir()
    (inside / "folder" / "model.safetensors").symlink_to("../model.safetensors")
    assert tensors.open_folder(inside / "folder").infos.keys() == {"a"}
    (inside / "folder" / "model.safetensors").unlink()
    (inside / "folder" / "model.safetensors").symlink_to("/etc/passwd")
    said = mutants.refused(tensors.open_folder, inside / "folder")
    assert "root:" not in said
