"""FLOPs of a training step of which a part is frozen."""

import math

from fm_jax import trees
from fm_jax.finetune import heads, rules
from fm_jax.finetune.tuning import Tuning
from fm_jax.generation import quantise
from fm_jax.models import counts


def per_token(tuning: Tuning, length: int, num_answers: int = 0) -> float:
    """Return training FLOPs per token of a row of `length` tokens, as `counts` does.

    A frozen weight needs no gradient of its own, 2 less of the 6; in layers below all
    that trains no gradient passes either, 4 less, attention's too. Updates of low rank
    cost 6 a parameter. num_answers: rows of a head for answers, which stands in place
    of the vocabulary's; 0: there is none.
    """
    model = tuning.model.config
    params = counts.params(model)
    whole = counts.flops_per_token(model, length)
    attention = whole - 6 * params.matmul
    table = model.vocab_size * model.embed_dim
    in_blocks = params.matmul - table
    head = num_answers * model.embed_dim if num_answers else table
    trained = trees.leaves_by_path(tuning.abstract)
    frozen = trees.leaves_by_path(tuning.frozen_abstract)
    share = 1.0
    if model.num_experts:
        share = model.num_experts_per_token / model.num_experts
    still = sum(
        math.prod(leaf.shape) * (share if "/experts/" in path else 1)
        for path, leaf in frozen.items()
        if path.startswith(rules.BLOCKS) and _is_product(path)
    )
    head_name = "embedding" if model.tied_embeddings else "head"
    if heads.NAME not in tuning.abstract and head_name in frozen:
        still += head
    updates = sum(leaf.size for path, leaf in trained.items() if path[:5] == "lora/")
    below = _layers_below(trained, frozen, model.num_layers) / model.num_layers
    return (
        6.0 * (in_blocks + head + updates)
        + attention
        - 2 * still
        - below * (2 * in_blocks + attention * 2 / 3)
    )


def _is_product(path: str) -> bool:
    """Return whether a frozen leaf is a product's weight; the scale of one is not."""
    name = path.removesuffix("/whole")
    return quantise.summed_dims(name) is not None or name.endswith("router/kernel")


def _layers_below(trained: dict, frozen: dict, num_layers: int) -> int:
    """Return how many layers stand below everything that trains."""
    if not all(name in frozen for name in rules.BOTTOM if name in {*trained, *frozen}):
        return 0
    tops = [leaf.shape[0] for path, leaf in trained.items() if "blocks/" in path]
    return num_layers - max(tops, default=0)
