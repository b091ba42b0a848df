"""GPT-2 from scratch on your own text; the variant is a size: 124m 355m 774m 1558m.

Purpose   the baseline that everyone knows
Paper     Radford et al., 2019; the schedule and rates are GPT-3's (arXiv 2005.14165)
Command   fm train --config=configs/gpt2_pretrain.py:124m \
              --config.data.paths='("corpus/*.jsonl.zst",)' --workdir=runs/gpt2
Hardware  one GPU of 80 GB for 124m; set mesh.fsdp for more
Expect    not run yet: the data floor and the step are those of quickstart.py
"""

from ml_collections import ConfigDict

from configs import base
from fm_jax.models import presets

# GPT-3's peak learning rates by size (arXiv 2005.14165, table 2.1).
LEARNING_RATES = {"124m": 6e-4, "355m": 3e-4, "774m": 2.5e-4, "1558m": 2e-4}


def get_config(size: str = "124m") -> ConfigDict:
    """Return the config of one size; the tokenizer is a BPE trained on the text."""
    config = base.get_config()
    config.model.update(presets.preset(f"gpt2-{size}"))
    config.model.dtype = "bfloat16"
    config.model.residual_dtype = "bfloat16"
    config.model.remat = "names"
    config.data.source = "text"
    config.data.vocab_size = 50_257
    config.data.max_length = 1024
    config.optimizer.learning_rate = LEARNING_RATES[size]
    config.train.batch_size = 512
    config.train.accumulation = 16
    config.train.loss_chunk = 128
    config.train.tokens_per_param = 20.0
    config.eval.every = 500
    config.eval.max_batches = 40
    config.checkpoint.every = 500
    return config
