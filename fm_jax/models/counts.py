"""Parameters and FLOPs from ModelConfig alone, beside the layers that imply them.

No jax here: a sweep is planned before a device is touched. The tests hold the counts
against the real tree.
"""

import dataclasses

from fm_jax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Params:
    """Parameter counts: `total` = `non_embedding` + `embedding` + `head`.

    `embedding` is token and position tables, `head` an untied output projection (0 when
    tied), `matmul` what multiplies each token: all products' weights and the head.
    """

    total: int
    non_embedding: int
    embedding: int
    head: int
    matmul: int


def params(config: ModelConfig) -> Params:
    """Return the parameter counts of the decoder that `config` describes."""
    c = config
    heads, kv_heads = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    products = c.embed_dim * (heads + 2 * kv_heads) + heads * c.embed_dim
    products += (3 if c.is_gated else 2) * c.embed_dim * c.mlp_dim
    biases = 0
    if c.use_bias:
        biases = heads + 2 * kv_heads + c.embed_dim
        biases += (2 if c.is_gated else 1) * c.mlp_dim + c.embed_dim
    per_norm = 2 if c.norm == "layernorm" and c.use_bias else 1
    num_norms = 1 if c.parallel_block else 4 if c.norm_position == "sandwich" else 2
    norms = per_norm * (num_norms * c.embed_dim + (2 * c.head_dim if c.qk_norm else 0))
    table = c.vocab_size * c.embed_dim
    learned = c.max_length * c.embed_dim if c.positions == "learned" else 0
    head = 0 if c.tied_embeddings else table
    body = c.num_layers * (products + biases + norms) + per_norm * c.embed_dim
    return Params(
        total=body + table + learned + head,
        non_embedding=body,
        embedding=table + learned,
        head=head,
        matmul=c.num_layers * products + table,
    )


def flops_per_token_6n(config: ModelConfig) -> int:
    """Return 6 * total parameters: the rule of thumb (Kaplan et al., 2001.08361)."""
    return 6 * params(config).total


def flops_per_token(config: ModelConfig, length: int) -> float:
    """Return training FLOPs per token of a row of `length` tokens, exactly.

    Forward and backward (3x forward) of every product: 6 per weight that multiplies,
    and attention's scores and weighted sum over the keys that a query really sees:
    causal, so half of a square, and less under a window. Norms, activations, softmax
    and the optimizer are left out, as in every published MFU. A row of several
    documents sees fewer keys still; that saving is not counted.
    """
    per_layer = [mean_keys(length, window) for window in config.windows()]
    attention = 2 * 2 * config.num_heads * config.head_dim * sum(per_layer)
    return 6.0 * params(config).matmul + 3 * attention


def mean_keys(length: int, window: int) -> float:
    """Return how many keys a query sees on average in a causal row of `length`."""
    if not window or window >= length:
        return (length + 1) / 2
    seen = window * (window + 1) / 2 + (length - window) * window
    return seen / length
