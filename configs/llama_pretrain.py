"""Llama 3 from scratch on your own text; the variant is a size: 1b 1b_h100 8b 70b.

Purpose   a modern decoder: grouped queries, rotary positions, SwiGLU
Paper     arXiv 2407.21783
Command   fm train --config=configs/llama_pretrain.py:1b \
              --config.data.paths='("corpus/*.jsonl.zst",)' --workdir=runs/llama
Hardware  see configs/plans.md: 16 TPU v5e for 1b, 64 v5p for 8b, 512 v5p for 70b;
          1b_h100 is 1b for one GPU of 80 GB, by ./launch/local.sh
Expect    not run yet: the data floor and the step are those of quickstart.py
"""

from ml_collections import ConfigDict

from configs import base
from fm_jax.models import presets
from fm_jax.models.config import REMAT_NAMES

# Peak learning rates of arXiv 2407.21783, table 3 (1b: that of 8b); rows in a step, and
# how often they are cut for the machines above.
SIZES = {
    "1b": {"learning_rate": 3e-4, "batch_size": 256, "accumulation": 8},
    "1b_h100": {"learning_rate": 3e-4, "batch_size": 256, "accumulation": 64},
    "8b": {"learning_rate": 3e-4, "batch_size": 512, "accumulation": 2},
    "70b": {"learning_rate": 1.5e-4, "batch_size": 1024, "accumulation": 2},
}


def get_config(size: str = "1b") -> ConfigDict:
    """Return the config of one size; the tokenizer is a BPE trained on the text."""
    config = base.get_config()
    config.model.update(presets.preset(f"llama3-{size.removesuffix('_h100')}"))
    chosen = SIZES[size]
    config.model.dtype = "bfloat16"
    config.model.residual_dtype = "bfloat16"
    config.model.remat = "full"
    if size == "1b_h100":  # there is room for all but what costs no product
        config.model.remat = "names"
        config.model.remat_names = REMAT_NAMES
    config.data.source = "text"
    config.data.vocab_size = 128_000
    config.data.max_length = 4096
    config.optimizer.learning_rate = chosen["learning_rate"]
    config.train.batch_size = chosen["batch_size"]
    config.train.accumulation = chosen["accumulation"]
    config.train.loss_chunk = 256
    config.train.tokens_per_param = 20.0
    config.mesh.preset = "fsdp"
    config.eval.every = 500
    config.eval.batch_size = chosen["batch_size"] // chosen["accumulation"]
    config.eval.max_batches = 20
    config.checkpoint.every = 500
    return config
