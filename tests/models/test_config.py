"""Tests of what ModelConfig refuses and derives."""

import dataclasses
import math

import pytest

from fm_jax.errors import UserError
from fm_jax.models.config import CHOICES, REMAT_NAMES


@pytest.mark.parametrize("field", CHOICES)
def test_unknown_choices_are_refused_with_the_known_ones(field, model_config):
    with pytest.raises(UserError) as error:
        model_config(**{field: "fourier"})
    text = str(error.value)
    assert text.startswith(
        f"model.{field} must be one of the known names; got 'fourier'. "
    )
    assert text.endswith("Known: " + ", ".join(sorted(CHOICES[field])))


def test_unknown_names_for_remat_are_refused_and_all_known_ones_taken(model_config):
    with pytest.raises(UserError) as error:
        model_config(remat_names=("query", "mlp_gat"))
    assert str(error.value) == (
        "model.remat_names must be one of the known names; got 'mlp_gat'. "
        "Did you mean 'mlp_gate'? Known: mlp_gate, mlp_up, attention_out, "
        "key, mixed, query, value"
    )
    assert model_config(remat_names=REMAT_NAMES).remat_names == REMAT_NAMES


def test_a_misspelt_choice_gets_the_nearest_one_first(model_config):
    with pytest.raises(UserError) as error:
        model_config(activation="swigelu")
    assert str(error.value) == (
        "model.activation must be one of the known names; got 'swigelu'. "
        "Did you mean 'swiglu'? Known: swiglu, gelu, geglu, relu2"
    )


@pytest.mark.parametrize(
    "field",
    [
        "max_length",
        "num_layers",
        "embed_dim",
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "mlp_dim",
    ],
)
def test_sizes_below_one_are_refused(field, model_config):
    with pytest.raises(UserError) as error:
        model_config(**{field: 0})
    assert str(error.value) == f"model.{field} must be >= 1; got 0."


@pytest.mark.parametrize(
    "field", ["vocab_size", "window", "attention_softcap", "logits_softcap"]
)
def test_negative_values_of_what_may_be_zero_are_refused(field, model_config):
    with pytest.raises(UserError) as error:
        model_config(**{field: -1})
    assert str(error.value) == f"model.{field} must be >= 0; got -1."


@pytest.mark.parametrize(
    "field", ["norm_epsilon", "rope_theta", "embed_init_std", "init_scale"]
)
@pytest.mark.parametrize("value", [0.0, -1.5, math.nan])
def test_scales_that_are_not_positive_are_refused(field, value, model_config):
    with pytest.raises(UserError) as error:
        model_config(**{field: value})
    assert str(error.value) == f"model.{field} must be > 0; got {value}."


def test_heads_that_key_heads_do_not_divide_are_refused(model_config):
    with pytest.raises(UserError) as error:
        model_config(num_heads=4, num_kv_heads=3)
    assert str(error.value) == (
        "model.num_heads must be a multiple of model.num_kv_heads; got 4 and 3. "
        "Set --config.model.num_kv_heads=4 for plain heads."
    )


def test_odd_head_dims_are_refused_under_rope_alone(model_config):
    with pytest.raises(UserError) as error:
        model_config(head_dim=7, positions="rope")
    assert str(error.value) == (
        "model.head_dim must be even under rope; got 7. "
        "Change it or set --config.model.positions=learned."
    )
    assert model_config(head_dim=7, positions="learned").head_dim == 7
    assert model_config(head_dim=7, positions="none").head_dim == 7


@pytest.mark.parametrize("pattern", ["", "LSG", "lg"])
def test_window_patterns_of_other_letters_are_refused(pattern, model_config):
    with pytest.raises(UserError) as error:
        model_config(window_pattern=pattern)
    assert str(error.value) == (
        "model.window_pattern must be made of L (local) and G (global); got "
        f"{pattern!r}. Example: LLG."
    )


def test_a_parallel_block_with_sandwich_norms_is_refused(model_config):
    with pytest.raises(UserError) as error:
        model_config(parallel_block=True, norm_position="sandwich")
    assert str(error.value) == (
        "model.norm_position must be 'pre' in a parallel block; got 'sandwich'. "
        "Set --config.model.norm_position=pre."
    )


@pytest.mark.parametrize(
    "pattern, expected",
    [
        ("L", (9, 9, 9, 9, 9)),
        ("G", (0, 0, 0, 0, 0)),
        ("LG", (9, 0, 9, 0, 9)),
        ("LLG", (9, 9, 0, 9, 9)),
        ("GGGGGGL", (0, 0, 0, 0, 0)),
    ],
)
def test_windows_repeat_the_pattern_over_the_layers(pattern, expected, model_config):
    config = model_config(num_layers=5, window=9, window_pattern=pattern)
    assert config.windows() == expected


def test_a_window_of_zero_makes_every_layer_global(model_config):
    assert model_config(window=0, window_pattern="LG").windows() == (0, 0, 0)


def test_gated_activations_are_those_with_a_glu(model_config):
    gated = {a for a in CHOICES["activation"] if model_config(activation=a).is_gated}
    assert gated == {"swiglu", "geglu"}


def test_a_config_is_frozen(model_config):
    with pytest.raises(dataclasses.FrozenInstanceError):
        model_config().num_layers = 4
