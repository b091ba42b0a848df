"""Tests of the FLOPs of a step of which a part is frozen, beside sums by hand."""

import pytest

from fm_jax.finetune import flops, heads, tuning
from fm_jax.models import counts, zoo
from tests.finetune import asked

LENGTH = 7


@pytest.fixture(scope="module")
def sizes(model_config):
    """Return a model, its products' weights in blocks, its head's, and attention."""
    config = model_config()
    matmul, table = counts.params(config).matmul, config.vocab_size * config.embed_dim
    attention = counts.flops_per_token(config, LENGTH) - 6 * matmul
    return zoo.build(config), matmul - table, table, attention


def _per_token(model, num_answers=0, lora=None, **given):
    plan = tuning.plan(model, asked.finetune(**given), lora or asked.lora())
    return flops.per_token(plan, LENGTH, num_answers)


def test_where_all_trains_they_are_those_of_a_whole_model(sizes):
    model, blocks, table, attention = sizes
    assert _per_token(model) == pytest.approx(6 * (blocks + table) + attention)
    assert _per_token(model) == counts.flops_per_token(model.config, LENGTH)


@pytest.mark.parametrize("base", ["compute", "int8"])
def test_frozen_kernels_have_no_gradient_and_updates_cost_six_each(sizes, base):
    model, blocks, table, attention = sizes
    lora = asked.lora(targets="mlp/up", rank=3, base=base)
    config = model.config
    updates = config.num_layers * 3 * (config.embed_dim + config.mlp_dim)
    expected = 4 * (blocks + table) + attention + 6 * updates
    found = _per_token(model, method="lora", lora=lora)
    assert found == pytest.approx(expected)


def test_below_the_layers_that_train_there_is_no_backward_pass(sizes):
    model, blocks, table, attention = sizes
    assert model.config.num_layers == 3
    expected = (2 + 2 + 6) / 3 * blocks + 6 * table + (1 + 1 + 3) / 9 * attention
    assert _per_token(model, last_layers=1) == pytest.approx(expected)


def test_a_classifier_has_no_head_of_words(sizes):
    model, blocks, _, attention = sizes
    head = 4 * model.config.embed_dim
    headed = heads.with_classifier(model, 4)
    expected = 6 * (blocks + head) + attention
    assert _per_token(headed, num_answers=4) == pytest.approx(expected)
