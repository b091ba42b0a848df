"""Adapters beside a base that stays as it is; the variant is a size: toy 1b 7b.

Purpose   fine-tune where the optimizer of all weights does not fit, and keep a small
          file of each task; instructions here, any data.examples elsewhere
Paper     Hu et al. (arXiv 2106.09685); all products, alpha = 2 * rank and a rate ten
          times that of all weights by Biderman et al. (arXiv 2405.09673)
Command   fm train --config=configs/finetune_lora.py --config.init.from=runs/base \
              --config.data.paths=chats.jsonl
          for other rows: --config.data.examples=text, completion, preference or
          classify; for a base in eight bits: --config.lora.base=int8
Hardware  toy: two CPU cores; 1b and 7b: one GPU of 80 GB
Expect    on configs/toy_pretrain.py with model.activation=swiglu, fm data toy
          --kind=chat: held-out loss of answers 0.32 nats per token
"""

from ml_collections import ConfigDict

from configs import _finetune

# Peak learning rate (QLoRA, arXiv 2305.14314: 2e-4 at 7B); tokens in a row; rows in a
# step, and how often they are cut. The larger ones are not run yet.
BASES = {
    "toy": {"rate": 5e-3, "length": 256, "batch_size": 8, "accumulation": 1},
    "1b": {"rate": 2e-4, "length": 2048, "batch_size": 32, "accumulation": 8},
    "7b": {"rate": 2e-4, "length": 2048, "batch_size": 32, "accumulation": 32},
}


def get_config(size: str = "toy") -> ConfigDict:
    """Return the config for a base of one size; the base itself is init.from."""
    config = _finetune.start(size, **BASES[size])
    config.data.examples = "chat"
    config.finetune.method = "lora"
    config.lora.rank = 16
    config.lora.alpha = 32.0  # and no weight decay: it would pull updates to the base
    config.schedule.warmup_fraction = 0.03
    config.train.epochs = 10.0 if size == "toy" else 3.0
    return config
