"""Heads of classifiers: a model whose logits are classes, at the last token of a text.

Legend beside the usual dims: C classes.
"""

import dataclasses
from collections.abc import Sequence
from typing import NoReturn

import jax
import jax.numpy as jnp

from fm_jax.errors import UserError
from fm_jax.models.config import ModelConfig
from fm_jax.models.zoo import Model
from fm_jax.products import matmul

NAME = "classifier"  # of the head's own part of the params


def with_classifier(model: Model, num_classes: int) -> Model:
    """Return the model with a new head of classes instead of its head of tokens.

    Params gain `classifier`: `kernel` [C, D] and `bias` [C], which `head` and
    `head_bias` return; logits are not soft-capped, whatever the model's own are. The
    token head stays in the params, for an import and an export know no model without.

    The kernel is drawn as the decoder's own head is, the bias is 0. Small, so that all
    classes are about as likely at first; not 0, for then the first step would have no
    gradient in the features, and what probing first is compared with is fine-tuning
    from a random head (Kumar et al. 2022, arXiv 2202.10054).

    The model writes no text: what makes an empty cache or decodes raises UserError.
    Raises UserError on fewer than two classes.
    """
    if num_classes < 2:
        raise UserError(
            "a classifier must have at least 2 classes; got "
            f"{num_classes}. Give data with another label."
        )
    assert NAME not in model.abstract, "the model has a classifier's head already"
    config = dataclasses.replace(model.config, logits_softcap=0.0)
    shape = (num_classes, config.embed_dim)

    def init(rng):
        rng_model, rng_head = jax.random.split(rng)
        return model.init(rng_model) | {NAME: _drawn(config, num_classes, rng_head)}

    abstract = {
        "kernel": jax.ShapeDtypeStruct(shape, jnp.float32),
        "bias": jax.ShapeDtypeStruct((num_classes,), jnp.float32),
    }
    # Whatever the mesh cuts words over, classes are too few to be cut.
    axes = {"kernel": (None, "embed"), "bias": (None,)}
    return _headed(
        dataclasses.replace(
            model,
            config=config,
            init=init,
            hidden=lambda params, *rows: model.hidden(without(params), *rows),
            head=lambda params: params[NAME]["kernel"],
            head_bias=lambda params: params[NAME]["bias"],
            prefill=lambda params, *rows: model.prefill(without(params), *rows),
            axes=model.axes | {NAME: axes},
            abstract=model.abstract | {NAME: abstract},
        )
    )


def with_label_words(model: Model, ids: Sequence[int]) -> Model:
    """Return the model as a classifier by what it takes for the next token.

    The head is the rows of the token head at `ids`, one for each label, likewise its
    bias; logits are soft-capped as the model's are. So the probabilities are those of
    the next token among the label words: a verbalizer (Schick and Schuetze, arXiv
    2001.07676), which needs no training. Params are the model's own. It writes no text.
    Raises UserError on fewer than two ids, equal ones, or one not in the vocabulary.
    """
    ids = tuple(int(index) for index in ids)
    vocab = model.config.vocab_size
    if len(ids) < 2 or len(set(ids)) < len(ids):
        raise UserError(
            "label words must be at least 2 different tokens; got the ids "
            f"{list(ids)}. Change data.label_words."
        )
    if not 0 <= min(ids) <= max(ids) < vocab:
        raise UserError(
            f"ids of label words must be from 0 to {vocab - 1}; got {list(ids)}. "
            "Use the model's own tokenizer."
        )
    rows_C = jnp.array(ids, jnp.int32)

    def head_bias(params):
        bias_V = model.head_bias(params)
        return None if bias_V is None else bias_V[rows_C]

    def head(params):
        return model.head(params)[rows_C]

    return _headed(dataclasses.replace(model, head=head, head_bias=head_bias))


def without(params: dict) -> dict:
    """Return params, stacked or not, without a classifier's head: the bare model's."""
    return {name: leaf for name, leaf in params.items() if name != NAME}


def _drawn(config: ModelConfig, num_classes: int, rng: jax.Array) -> dict:
    kernel_CD = jax.random.normal(rng, (num_classes, config.embed_dim))
    bias_C = jnp.zeros(num_classes, jnp.float32)
    return {"kernel": config.embed_init_std * kernel_CD, "bias": bias_C}


def _headed(model: Model) -> Model:
    """Return the model with logits by its own `head`, and nothing that writes text."""
    return dataclasses.replace(
        model, logits=_logits(model), empty_cache=_refuse, decode=_refuse
    )


def _logits(model: Model):
    config = model.config

    def logits(params, x_BTD):
        """Return float32 logits [B, T, C]."""
        table_CD, bias_C = model.head(params), model.head_bias(params)
        x = x_BTD.reshape(-1, config.embed_dim)
        flat = matmul(x, table_CD.T, jnp.dtype(config.dtype))
        if bias_C is not None:
            flat = flat + bias_C
        if config.logits_softcap:
            flat = config.logits_softcap * jnp.tanh(flat / config.logits_softcap)
        return flat.reshape(*x_BTD.shape[:-1], len(table_CD))

    return logits


def _refuse(*_, **__) -> NoReturn:
    raise UserError(
        "a run must have a head of tokens to write text; got a classifier's. "
        "Use fm classify."
    )
