"""Of two answers the better becomes likelier; the variant is a size: toy 1b 7b.

Purpose   after instructions, what people like rather than what they wrote
Paper     Rafailov et al. (arXiv 2305.18290); rate and warm-up of Zephyr (arXiv
          2310.16944)
Command   fm train --config=configs/finetune_dpo.py --config.init.from=runs/chat \
              --config.data.paths=pairs.jsonl
          a line has prompt, chosen and rejected. The first weights are the reference;
          with adapters, --config.finetune.method=lora and ten times the rate.
          --config.finetune.preference=ipo or orpo for those losses
Hardware  toy: two CPU cores; 1b: one GPU of 80 GB; 7b: eight, cut by fsdp
Expect    fm data toy --kind=preference, after 40 epochs of its sft.jsonl: held-out loss
          0.349, and all 200 held-out pairs right
"""

from ml_collections import ConfigDict

from configs import _finetune

# Peak learning rate, far below that of instructions; tokens in a row; rows in a step,
# and how often they are cut. The larger ones are not run yet.
BASES = {
    "toy": {"rate": 2e-4, "length": 256, "batch_size": 8, "accumulation": 1},
    "1b": {"rate": 1e-6, "length": 2048, "batch_size": 32, "accumulation": 8},
    "7b": {"rate": 5e-7, "length": 2048, "batch_size": 32, "accumulation": 4},
}


def get_config(size: str = "toy") -> ConfigDict:
    """Return the config for a base of one size; the base itself is init.from."""
    config = _finetune.start(size, **BASES[size])
    config.data.examples = "preference"
    config.finetune.preference = "dpo"
    config.finetune.beta = 0.1
    config.schedule.warmup_fraction = 0.1
    config.train.epochs = 1.0
    return config
