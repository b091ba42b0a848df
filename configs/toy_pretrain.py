"""A small decoder on toy text: the base that fine-tuning is tried on in minutes.

Purpose   pretrain what configs/finetune_*.py go on from, with nothing to download
Command   fm data toy --kind=styles --out=toys/styles
          fm train --config=configs/toy_pretrain.py --workdir=runs/toy \
              --config.data.paths=toys/styles/pretrain.jsonl
Hardware  two CPU cores
Time      75 s of CPU
Expect    2.45 bits per byte held out, gzip -9 3.90
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Return the config: bytes for tokens, so that any toy can be read."""
    config = base.get_config()
    config.model.num_layers = 3
    config.model.embed_dim = 64
    config.model.num_heads = 2
    config.model.activation = "relu2"
    config.model.qk_norm = True
    config.data.source = "text"
    config.data.tokenizer = "bytes"
    config.data.max_length = 64
    config.data.packing = "best_fit"
    config.optimizer.learning_rate = 4e-3
    config.schedule.warmup_fraction = 0.05
    config.train.batch_size = 32
    config.train.steps = 800
    config.eval.every = 400
    config.eval.max_batches = 8
    config.checkpoint.every = 200
    config.checkpoint.keep = 1
    config.sample.num_tokens = 0
    return config
