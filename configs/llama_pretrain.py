"""Llama 3 from scratch on your own text; the variant is a size: 1b 8b.

Purpose   a modern decoder: grouped queries, rotary positions, SwiGLU
Paper     arXiv 2407.21783
Command   fm train --config=configs/llama_pretrain.py:1b \
              --config.data.paths='("corpus/*.jsonl.zst",)' --workdir=runs/llama
Hardware  eight accelerators of 80 GB for 8b, over mesh.fsdp
Expect    not run yet: the data floor and the step are those of quickstart.py
"""

from ml_collections import ConfigDict

from configs import base
from fm_jax.models import presets


def get_config(size: str = "1b") -> ConfigDict:
    """Return the config of one size; the tokenizer is a BPE trained on the text."""
    config = base.get_config()
    config.model.update(presets.preset(f"llama3-{size}"))
    config.model.dtype = "bfloat16"
    config.model.residual_dtype = "bfloat16"
    config.model.remat = "full"
    config.data.source = "text"
    config.data.vocab_size = 128_000
    config.data.max_length = 4096
    config.optimizer.learning_rate = 3e-4
    config.train.batch_size = 256
    config.train.accumulation = 8
    config.train.loss_chunk = 256
    config.train.tokens_per_param = 20.0
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.eval.every = 500
    config.eval.batch_size = 32
    config.eval.max_batches = 20
    config.checkpoint.every = 500
    return config
