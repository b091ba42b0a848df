"""Tests of what path rules and methods make of each leaf and layer."""

import numpy as np
import pytest

from fm_jax import trees
from fm_jax.errors import UserError
from fm_jax.finetune import rules
from fm_jax.models import zoo
from tests.finetune.asked import finetune

UP, QUERY = "blocks/mlp/up/kernel", "blocks/attention/query/kernel"
LEAVES = {
    "embedding": 0,
    "position_embedding": 0,
    QUERY: 4,
    UP: 4,
    "blocks/mlp/up/bias": 4,
    "final_norm/bias": 0,
    "head": 0,
    "head_bias": 0,
    "classifier/kernel": 0,
}

PLAIN = {path: stacked for path, stacked in LEAVES.items() if path[:5] != "class"}


def _rates(leaves=LEAVES, targets=(), **given):
    found = rules.multipliers(leaves, finetune(**given), targets=targets)
    return {path: np.asarray(rate).tolist() for path, rate in found.items()}


def _refused(**given):
    with pytest.raises(UserError) as error:
        _rates(**given)
    return str(error.value)


def test_everything_trains_alike_by_default():
    rates = _rates(PLAIN)
    assert rates[UP] == [1, 1, 1, 1]
    assert rates["embedding"] == rates["head"] == rates["head_bias"] == 1


def test_beside_a_new_head_that_of_the_vocabulary_is_frozen():
    rates = _rates(rules=(("head", 2.0),))
    assert rates["head"] == rates["head_bias"] == 0
    assert rates["embedding"] == rates["classifier/kernel"] == 1


def test_of_bias_all_biases_train_and_the_new_head():
    on = {path for path, rate in _rates(method="bias").items() if np.any(rate)}
    assert on == {
        "blocks/mlp/up/bias",
        "final_norm/bias",
        "classifier/kernel",
    }


def test_of_lora_what_has_an_update_trains():
    on = {
        path
        for path, rate in _rates(method="lora", targets=(UP,)).items()
        if np.any(rate)
    }
    assert on == {UP, "classifier/kernel"}


@pytest.mark.parametrize("method", ["probe", "none"])
def test_of_methods_without_training_nothing_does(method):
    rates = _rates(method=method, rules=((".*", 1.0),))
    assert not any(map(np.any, rates.values()))


def test_the_last_layers_train_and_what_is_above_them():
    rates = _rates(PLAIN, last_layers=3)
    assert rates[UP] == rates[QUERY] == [0, 1, 1, 1]
    assert rates["embedding"] == rates["position_embedding"] == 0
    assert rates["head"] == rates["final_norm/bias"] == 1


def test_each_layer_further_down_is_slower_by_the_decay():
    rates = _rates(PLAIN, layer_decay=0.5)
    assert rates[UP] == [0.125, 0.25, 0.5, 1]
    assert rates["head"] == rates["final_norm/bias"] == 1
    assert rates["embedding"] == rates["position_embedding"] == 0.5**4


def test_a_rule_of_the_users_says_all_of_what_it_finds_first():
    given = ((r"/2/mlp/up/kernel", 3.0), (r"up", 0.0), (r"/0/mlp", 7.0))
    rates = _rates(rules=given, layer_decay=0.5, last_layers=2)
    assert rates[UP] == [0, 0, 3, 0]
    assert rates[QUERY] == [0, 0, 0.5, 1]


def test_a_rule_may_thaw_what_the_method_leaves():
    given = ((r"blocks/[01]/attention", 0.5), (r"final_norm", 1.0))
    rates = _rates(method="lora", targets=(UP,), rules=given)
    assert rates[QUERY] == [0.5, 0.5, 0, 0]
    assert rates["final_norm/bias"] == 1
    assert rates[UP] == [1, 1, 1, 1]


def test_no_rule_freezes_a_new_head_but_one_may_speed_it_up():
    assert _rates(rules=((r"up", 1.0), (r".*", 0.0)))["classifier/kernel"] == 1
    assert _rates(rules=((r"^classifier", 10.0),))["classifier/kernel"] == 10


def test_rules_cover_every_leaf_of_every_architecture(architecture):
    abstract = trees.leaves_by_path(zoo.build(architecture).abstract)
    leaves = {path: 3 * path.startswith("blocks/") for path in abstract}
    rates = _rates(leaves, layer_decay=0.5)
    for path, leaf in abstract.items():
        assert np.shape(rates[path]) in ((), leaf.shape[:1]), path
        below = path.startswith(("embedding", "position_embedding"))
        if not path.startswith("blocks/"):
            assert rates[path] == (0.125 if below else 1), path


def test_a_rule_that_finds_nothing_is_refused_with_the_nearest_paths():
    assert _refused(rules=((r"blocks/mlp/up", 1.0),)) == (
        "finetune.rules must each find a parameter; got 'blocks/mlp/up'. Nearest: "
        "blocks/0/mlp/up/bias, blocks/0/mlp/up/kernel, blocks/0/attention/query/kernel."
    )


def test_a_rule_that_is_no_regular_expression_is_refused():
    assert _refused(rules=((r"(up", 1.0),)) == (
        "finetune.rules must be regular expressions; got '(up' "
        "(missing ), unterminated subpattern at position 0)."
    )


def test_more_last_layers_than_there_are_are_refused():
    assert _refused(last_layers=5) == (
        "finetune.last_layers must be of the model's blocks; got 5 of 4. Set it to 0 "
        "for all."
    )


def test_a_method_that_finds_nothing_to_train_is_refused():
    assert _refused(method="bias", leaves={"embedding": 0, UP: 4}) == (
        "finetune.method must leave something to train; got 'bias', of which the model "
        "has nothing or finetune.rules leave nothing. Use 'none' to train nothing."
    )
