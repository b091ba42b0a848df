"""Ordered path rules that say how fast each leaf and layer of a model trains.

A stacked leaf `blocks/mlp/up/kernel` is one parameter a layer to a rule:
`blocks/3/mlp/up/kernel`.
"""

import difflib
import re
from collections.abc import Collection, Mapping

import numpy as np

from fm_jax.errors import UserError
from fm_jax.sections import FinetuneConfig

BLOCKS = "blocks/"
BOTTOM = ("embedding", "position_embedding", "embedding_norm")  # below the blocks
FROM_ANEW = "classifier/"  # what no base has
UNUSED = ("head", "head_bias")  # of the vocabulary, where there is such a head
WITHOUT_TRAINING = ("probe", "none")  # of the methods


def multipliers(
    leaves: Mapping[str, int], finetune: FinetuneConfig, *, targets: Collection[str]
) -> dict[str, np.ndarray]:
    """Return what each leaf's learning rate is multiplied by, `[L]` of a stacked one.

    leaves: by path the layers stacked in it, 0 outside the blocks. targets: the paths
    of kernels that have an update of low rank, which is then what trains of them.

    The first of `finetune.rules` that finds a path says all of it. Of the others train
    what the method does (bias: all biases, arXiv 2106.10199), of `last_layers` blocks
    and what is above them; each layer by `layer_decay` slower than the next one up
    (arXiv 1801.06146, 2003.10555). A classifier's head trains at 1 or by a rule other
    than 0, unless nothing does; the vocabulary's own is frozen beside it. A tied head
    counts as the embedding that it is.

    Raises UserError for a rule that finds nothing, and where nothing is left to train.
    """
    num_layers = max(leaves.values())
    if finetune.last_layers > num_layers:
        raise UserError(
            "finetune.last_layers must be of the model's blocks; got "
            f"{finetune.last_layers} of {num_layers}. Set it to 0 for all."
        )
    rules = _compiled(finetune.rules, leaves)
    found = {}
    is_headed = any(path.startswith(FROM_ANEW) for path in leaves)
    for path, stacked in leaves.items():
        if is_headed and path in UNUSED:
            found[path] = np.float32(0)
            continue
        values = []
        for name, height in zip(
            names(path, stacked), heights(path, stacked, num_layers), strict=True
        ):
            given = next((v for rule, v in rules if rule.search(name)), None)
            values.append(_value(path, height, given, finetune, targets))
        found[path] = np.array(values, np.float32) if stacked else np.float32(values[0])
    if finetune.method not in WITHOUT_TRAINING and not any(map(np.any, found.values())):
        raise UserError(
            f"finetune.method must leave something to train; got {finetune.method!r}, "
            "of which the model has nothing or finetune.rules leave nothing. Use "
            "'none' to train nothing."
        )
    return found


def _value(path, height, given, finetune, targets):
    method = finetune.method
    if method in WITHOUT_TRAINING:
        return 0.0
    if path.startswith(FROM_ANEW):
        return given or 1.0
    if given is not None:
        return given
    is_of_method = {
        "bias": re.search(r"(^|[/_])bias$", path),
        "lora": path in targets,
    }.get(method, True)
    is_below = finetune.last_layers and height >= finetune.last_layers
    if not is_of_method or is_below:
        return 0.0
    return finetune.layer_decay**height


def names(path: str, stacked: int) -> list[str]:
    """Return the names by which rules know a leaf: with each layer's number."""
    if not stacked:
        return [path]
    rest = path.removeprefix(BLOCKS)
    return [f"{BLOCKS}{layer}/{rest}" for layer in range(stacked)]


def heights(path: str, stacked: int, num_layers: int) -> list[int]:
    """Return how many layers are above each of a leaf's: 0 for the top block's.

    And for what is above it; of the embeddings all.
    """
    if stacked:
        return list(range(num_layers - 1, -1, -1))
    return [num_layers if path.split("/", maxsplit=1)[0] in BOTTOM else 0]


def nearest(pattern: str, paths: Collection[str]) -> str:
    """Return the paths that look most like a pattern, for an error."""
    bare = re.sub(r"[^\w/]+", "/", pattern).strip("/")
    near = difflib.get_close_matches(bare, paths, n=3, cutoff=0.0)
    return ", ".join(near)


def _compiled(given, leaves):
    every = [name for path, stacked in leaves.items() for name in names(path, stacked)]
    rules = []
    for pattern, value in given:
        try:
            rule = re.compile(pattern)
        except re.error as error:
            raise UserError(
                f"finetune.rules must be regular expressions; got {pattern!r} "
                f"({error})."
            ) from error
        if not any(map(rule.search, every)):
            raise UserError(
                f"finetune.rules must each find a parameter; got {pattern!r}. Nearest: "
                f"{nearest(pattern, [names(*leaf)[0] for leaf in leaves.items()])}."
            )
        rules.append((rule, float(value)))
    return rules
