"""Checkpoints of strangers, made wrong in thousands of ways: one line, or read."""

import json
import math
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fm_jax import jsonfiles
from fm_jax.errors import UserError
from fm_jax.hf import adapters, carried, families, header, shards, tensors
from fm_jax.hf.lowrank import Low
from fm_jax.runs import Run
from tests.hf import made
from tests.security import mutants

FIELDS = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [5], "data_offsets": [24, 34]},
    "c": {"dtype": "F16", "shape": [], "data_offsets": [34, 36]},
}
TEXT = json.dumps(FIELDS).encode()
WHOLE = struct.pack("<Q", len(TEXT)) + TEXT + bytes(36)
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "vocab_size": 31,
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": [2, 3],
}


def _headed(fields):
    """Return a file of a header, with as many bytes of tensors as it says."""
    text = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return struct.pack("<Q", len(text)) + text + bytes(36)


@mutants.cases(700)
@given(raw=st.one_of(mutants.of_bytes(WHOLE), mutants.of_json(FIELDS).map(_headed)))
def test_a_header_that_lies_is_one_line(tmp_path_factory, raw):
    """Fault 48, security: a safetensors header that lies.

    Promise: one line that names the file and what is wrong, exit 2, nothing written.
    """
    file = tmp_path_factory.getbasetemp() / "lies.safetensors"
    file.write_bytes(raw)
    if said := mutants.refused(header.read, file):
        assert str(file) in said
    else:  # what is believed is in the file
        size = file.stat().st_size
        for info in header.read(file).values():
            assert 8 <= info.start <= info.start + info.num_bytes <= size
            width = (
                header.OTHER_BITS.get(info.kind)
                or 8 * header.DTYPES[info.kind].itemsize
            )
            assert width * math.prod(info.shape) == 8 * info.num_bytes


def test_a_header_that_is_right_is_read(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(WHOLE)
    assert header.read(tmp_path / "a.safetensors").keys() == {"a", "b", "c"}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """Return a folder of two files of weights, and its index."""
    folder = tmp_path_factory.mktemp("sharded")
    for number, name in enumerate(("a", "b"), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        made.save(folder / file, {name: np.ones((2, number), np.float32)})
    files = {"a": "model-00001-of-00002.safetensors"}
    files["b"] = "model-00002-of-00002.safetensors"
    return folder, {"metadata": {"total_size": 24}, "weight_map": files}


def test_an_index_that_is_right_is_read(sharded):
    folder, index = sharded
    (folder / tensors.INDEX).write_text(json.dumps(index))
    assert tensors.open_folder(folder).infos.keys() == {"a", "b"}


@mutants.cases(500)
@given(data=st.data())
def test_an_index_that_lies_is_one_line(sharded, data):
    folder, index = sharded
    (folder / tensors.INDEX).write_bytes(data.draw(mutants.of_json(index)))
    if not mutants.refused(tensors.open_folder, folder):
        found = tensors.open_folder(folder)
        assert {info.file.parent for info in found.infos.values()} == {folder}
        assert all(mutants.refused(found.read, name) == "" for name in found.infos)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """Return a folder of a small adapter, and its config."""
    folder = tmp_path_factory.mktemp("adapter")
    ones = {
        f"model.layers.{layer}.self_attn.{kind}_proj": Low(
            np.ones((2, 12), np.float32), np.ones((12, 2), np.float32), 4.0
        )
        for layer in (0, 1)
        for kind in "qv"
    }
    whole = adapters.Adapter(
        lows=ones, rank=2, alpha=4.0, root=False, dropout=0.0, is_turned=False, base="b"
    )
    adapters.write(folder, whole, list(ones))
    config = json.loads((folder / adapters.CONFIG).read_text())
    config["rank_pattern"] = {r"layers\.1\.self_attn\.q_proj": 2}
    config["alpha_pattern"] = {"q_proj": 4}
    return folder, config


def test_an_adapter_that_is_right_is_read(adapter):
    folder, config = adapter
    (folder / adapters.CONFIG).write_text(json.dumps(config))
    assert len(adapters.read(folder).lows) == 4


@mutants.cases(500)
@given(data=st.data())
def test_an_adapter_that_lies_is_one_line(adapter, data):
    folder, config = adapter
    (folder / adapters.CONFIG).write_bytes(data.draw(mutants.of_json(config)))
    mutants.refused(adapters.read, folder)


@pytest.mark.parametrize("pattern", ["(a+)+$", "(.|s)*x", ".*.*.*.*x", "(q{1,9}){1,9}"])
def test_a_pattern_that_would_match_for_ever_is_refused(adapter, pattern):
    folder, config = adapter
    text = json.dumps(config | {"rank_pattern": {pattern: 2}})
    (folder / adapters.CONFIG).write_text(text)
    assert "Others can take for ever" in mutants.refused(adapters.read, folder)


@mutants.cases(700)
@given(raw=mutants.of_json(LLAMA))
def test_a_config_of_theirs_that_lies_is_one_line(tmp_path_factory, raw):
    file = tmp_path_factory.getbasetemp() / "theirs.json"
    file.write_bytes(raw)

    def read():
        families.read(jsonfiles.read(file))

    mutants.refused(read)


def test_a_config_of_theirs_that_is_right_is_read():
    assert families.read(LLAMA)[0].name == "llama"


@mutants.cases(150)
@given(
    raw=mutants.of_json(
        {"family": "llama", "names": {"a": ["a", "b"]}, "kinds": {"a": "F32"}}
    )
)
def test_what_an_import_kept_and_is_wrong_is_one_line(tmp_path_factory, raw):
    folder = tmp_path_factory.getbasetemp() / "imported" / "hf"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / carried.CONFIG).write_text("{}")
    (folder / carried.WEIGHTS).write_bytes(raw)
    mutants.refused(carried.origin_of, Run(folder.parent))


@mutants.cases(300)
@given(
    text=st.one_of(
        st.text(max_size=20),
        st.from_regex(r"\d{1,400}(\.\d{1,400})? ?[a-zA-Z]{0,4}", fullmatch=True),
    )
)
def test_any_text_is_a_size_or_one_line(text):
    try:
        assert 1 <= shards.size(text) < 1 << 62
    except UserError as error:
        assert "--max_shard_size" in str(error)
