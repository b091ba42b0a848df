"""Tests of paths into pytrees and of values given by rules."""

from collections import namedtuple

import jax
import pytest

from fm_jax import trees
from fm_jax.errors import UserError

State = namedtuple("State", ["mu", "count"])
TREE = {"blocks": [{"kernel": 1, "bias": 2}, State(mu={"kernel": 3}, count=4)], "a": 5}


def test_paths_name_dict_keys_indices_and_attributes():
    assert trees.leaves_by_path(TREE) == {
        "a": 5,
        "blocks/0/bias": 2,
        "blocks/0/kernel": 1,
        "blocks/1/mu/kernel": 3,
        "blocks/1/count": 4,
    }


def test_leaves_come_in_tree_order():
    assert list(trees.leaves_by_path(TREE).values()) == jax.tree.leaves(TREE)


def test_leaves_may_be_what_the_caller_calls_a_leaf():
    found = trees.leaves_by_path(
        {"b": (1, 2), "c": {"d": ()}}, is_leaf=lambda x: isinstance(x, tuple)
    )
    assert found == {"b": (1, 2), "c/d": ()}


@pytest.mark.parametrize(
    "entry, key",
    [
        (jax.tree_util.DictKey("kernel"), "kernel"),
        (jax.tree_util.DictKey(3), 3),
        (jax.tree_util.SequenceKey(2), 2),
        (jax.tree_util.GetAttrKey("mu"), "mu"),
        (jax.tree_util.FlattenedIndexKey(1), 1),
        ("bare", "bare"),
    ],
)
def test_the_key_of_an_entry_is_bare(entry, key):
    assert trees.key_of(entry) == key


def test_the_root_has_an_empty_path():
    assert trees.path_name(()) == ""


def test_the_first_matching_rule_gives_the_value():
    rules = [("bias$", "first"), ("^blocks/0", "second"), ("kernel", None), (".*", 9)]
    assert trees.by_rules(TREE, rules, "rules") == {
        "blocks": [
            {"kernel": "second", "bias": "first"},
            State(mu={"kernel": None}, count=9),
        ],
        "a": 9,
    }


def test_a_parameter_without_a_rule_is_refused():
    with pytest.raises(UserError) as error:
        trees.by_rules(TREE, [("kernel", 1), ("bias", 2)], "optimizer.decay")
    assert str(error.value) == (
        "optimizer.decay must cover every parameter; got no rule for 'a'. "
        "End the rules with one for '.*'."
    )


def test_a_rule_that_is_no_regular_expression_is_refused():
    with pytest.raises(UserError) as error:
        trees.by_rules(TREE, [(".*", 1), ("kernel(", 2)], "optimizer.decay")
    assert str(error.value) == (
        "optimizer.decay must be regular expressions; got 'kernel(' "
        "(missing ), unterminated subpattern at position 6)."
    )


def test_nested_dicts_are_made_again_from_their_paths():
    tree = {"a": 5, "blocks": {"mlp": {"kernel": 1, "bias": 2}, "norm": 3}}
    assert trees.nested(trees.leaves_by_path(tree)) == tree
    assert trees.nested({}) == {}
