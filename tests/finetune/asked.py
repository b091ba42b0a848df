"""Sections of configs for fine-tuning, and rows, for the tests of this folder."""

import jax.numpy as jnp

from fm_jax.sections import FinetuneConfig, LoraConfig

FINETUNE = {
    "method": "full",
    "rules": (),
    "last_layers": 0,
    "layer_decay": 1.0,
    "unfreeze_every": 0,
    "preference": "dpo",
    "beta": 0.1,
}
LORA = {
    "rank": 5,
    "alpha": 15.0,
    "scaling": "lora",
    "dropout": 0.0,
    "targets": "attention|mlp",
    "base": "compute",
}


def finetune(**given) -> FinetuneConfig:
    """Return the section `finetune`, with what is given."""
    return FinetuneConfig(**FINETUNE | given)


def lora(**given) -> LoraConfig:
    """Return the section `lora`, with what is given."""
    return LoraConfig(**LORA | given)


def rows(count: int = 2, length: int = 9) -> tuple:
    """Return tokens, positions and segment ids of rows without padding."""
    tokens_BT = (7 * jnp.arange(count * length)).reshape(count, length) % 37
    positions_BT = jnp.broadcast_to(jnp.arange(length), (count, length))
    return tokens_BT, positions_BT, jnp.ones((count, length), jnp.int32)


def logits(model, params, *given):
    """Return the logits of rows."""
    return model.logits(params, model.hidden(params, *given or rows())[0])
