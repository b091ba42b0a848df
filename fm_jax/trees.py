"""Paths into pytrees, and values given to leaves by ordered regular expressions."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from fm_jax.errors import UserError


def path_name(path: tuple) -> str:
    """Return a key path as `blocks/attention/query/kernel`."""
    return "/".join(str(key_of(entry)) for entry in path)


def key_of(entry: Any) -> Any:
    """Return the bare key of one entry of a jax key path."""
    for field in ("key", "name", "idx"):
        if hasattr(entry, field):
            return getattr(entry, field)
    return entry


def leaves_by_path(tree: Any, is_leaf: Callable | None = None) -> dict[str, Any]:
    """Return `{path name: leaf}` in tree order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return {path_name(path): leaf for path, leaf in leaves}


def nested(leaves: Mapping[str, Any]) -> dict:
    """Return the nested dicts of `{path name: leaf}`."""
    tree: dict = {}
    for path, leaf in leaves.items():
        *folders, last = path.split("/")
        within = tree
        for folder in folders:
            within = within.setdefault(folder, {})
        within[last] = leaf
    return tree


def by_rules(tree: Any, rules: Sequence[tuple[str, Any]], thing: str) -> Any:
    """Return `tree` with each leaf replaced by the value of the first matching rule.

    A rule is `(pattern, value)`; the pattern is searched in the leaf's path name.
    `thing` names the rules in errors. Raises UserError when a leaf matches no rule
    or a pattern is not a regular expression.
    """
    compiled = []
    for pattern, value in rules:
        try:
            compiled.append((re.compile(pattern), value))
        except re.error as error:
            raise UserError(
                f"{thing} must be regular expressions; got {pattern!r} ({error})."
            ) from error

    def value_of(path, _):
        name = path_name(path)
        for pattern, value in compiled:
            if pattern.search(name):
                return value
        raise UserError(
            f"{thing} must cover every parameter; got no rule for {name!r}. "
            "End the rules with one for '.*'."
        )

    return jax.tree_util.tree_map_with_path(value_of, tree)
