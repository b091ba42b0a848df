"""What is demanded of each key of a config by itself: ranges and choices, as tables.

Imports no jax.
"""

from typing import Any

from fm_jax.corpora import chains, documents, sources
from fm_jax.data import windows
from fm_jax.errors import UserError
from fm_jax.sections import Config

POSITIVE = (
    "optimizer.learning_rate",
    "optimizer.epsilon",
    "synthetic.concentration",
    "finetune.layer_decay",
    "finetune.beta",
    "lora.alpha",
)
AT_LEAST_ONE = (
    "train.batch_size",
    "train.accumulation",
    "data.max_length",
    "data.max_document_bytes",
    "eval.batch_size",
    "checkpoint.keep",
    "log.every",
    "mesh.dcn_data",
    "mesh.dcn_fsdp",
    "sample.num_samples",
    "synthetic.num_states",
    "synthetic.num_components",
    "synthetic.num_tokens",
    "synthetic.num_eval_tokens",
    "lora.rank",
)
NOT_NEGATIVE = (
    "data.num_workers",
    "eval.every",
    "eval.max_batches",
    "checkpoint.every",
    "checkpoint.keep_best",
    "checkpoint.keep_every",
    "train.loss_chunk",
    "train.z_loss",
    "train.balance_loss",
    "train.router_z_loss",
    "train.balance_rate",
    "train.max_skips",
    "train.seed",
    "optimizer.clip_norm",
    "optimizer.weight_decay",
    "sample.num_tokens",
    "sample.temperature",
    "sample.top_k",
    "synthetic.zipf",
    "synthetic.seed",
    "finetune.last_layers",
    "finetune.unfreeze_every",
)
FRACTIONS = (
    "schedule.warmup_fraction",
    "schedule.decay_fraction",
    "schedule.final_fraction",
    "finetune.layer_decay",
)
NOT_EMPTY = ("data.tokenizer", "data.text_field", "data.cache_dir",
             "lora.targets")  # fmt: skip
# What names files, here or under URLs.
PATHS = ("data.paths", "data.eval_paths", "data.name", "data.tfds_dir",
         "data.tokenizer", "data.chat_template", "data.cache_dir",
         "train.compile_cache", "init.from")  # fmt: skip
BELOW_ONE = ("optimizer.beta1", "optimizer.beta2", "train.ema_decay", "lora.dropout")
CHOICES = {
    "data.source": sources.KINDS,
    "data.on_bad_text": documents.ON_BAD_TEXT,
    "data.packing": windows.PACKINGS,
    "synthetic.kind": chains.KINDS,
    # As in optimizers.py, which this file cannot import: it brings jax.
    "optimizer.name": ("adamw",),
    "optimizer.mu_dtype": ("float32", "bfloat16"),
    "optimizer.nu_dtype": ("float32", "bfloat16"),
    "data.examples": ("text", "completion", "chat", "classify", "preference"),
    "data.on_long": ("error", "truncate", "drop"),
    "finetune.method": ("full", "bias", "lora", "probe", "lp_ft", "none"),
    "finetune.preference": ("dpo", "ipo", "orpo"),
    "lora.scaling": ("lora", "rslora"),
    "lora.base": ("compute", "int8"),
    "schedule.name": ("cosine", "linear", "constant", "wsd", "inverse_sqrt"),
    # As in meshes.py, likewise.
    "mesh.preset": ("ddp", "fsdp", "hsdp", "tensor", "fsdp_tensor", "context"),
}


def value(config: Config, key: str) -> Any:
    """Return the value of a key as `train.steps`."""
    section, name = key.split(".")
    return getattr(getattr(config, section), name + "_" * (name == "from"))


def must(config: Config, key: str, holds: bool, wanted: str) -> None:
    """Raise UserError naming the key, what is wanted and the value, unless it holds."""
    if not holds:
        raise UserError(f"config.{key} must be {wanted}; got {value(config, key)!r}.")
