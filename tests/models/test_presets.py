"""Tests of presets: published decoders have the parameters that were published."""

import pathlib

import pytest

from fm_jax import config as configs
from fm_jax import configfile
from fm_jax.errors import UserError
from fm_jax.models import counts, presets

CONFIGS = pathlib.Path(__file__).parent.parent.parent / "configs"
# Of the checkpoints as released on the Hugging Face Hub by OpenAI and Meta.
RELEASED = {
    "gpt2-124m": 124_439_808,
    "gpt2-355m": 354_823_168,
    "gpt2-774m": 774_030_080,
    "gpt2-1558m": 1_557_611_200,
    "llama3-1b": 1_235_814_400,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
}


def test_every_preset_is_held_to_a_count():
    assert presets.PRESETS.keys() == RELEASED.keys()


@pytest.mark.parametrize("name", RELEASED)
def test_a_preset_has_the_parameters_of_the_release(name):
    family, size = name.split("-")
    file = {"gpt2": "gpt2_pretrain", "llama3": "llama_pretrain"}[family]
    raw = configfile.load(f"{CONFIGS}/{file}.py:{size}").to_dict()
    assert counts.params(configs.check(raw).model).total == RELEASED[name]


def test_an_unknown_preset_is_refused_with_the_nearest():
    with pytest.raises(UserError, match="Did you mean 'llama3-8b'"):
        presets.preset("llama3-8B")
