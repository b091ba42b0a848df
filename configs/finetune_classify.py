"""Labels of texts, by a probe, all weights or LoRA; the variant is a size: toy 1b 7b.

Purpose   a classifier on a base's features, and how far each way of making one moves
          them; finetune.method is probe, full, lp_ft or lora
Paper     Kumar et al. (arXiv 2202.10054)
Command   fm train --config=configs/finetune_classify.py --config.init.from=runs/base \
              --config.data.paths=train.jsonl \
              --config.data.eval_paths='("valid.jsonl","ood.jsonl")' \
              --config.finetune.method=lp_ft
          a line has text and label; fm transfer studies all methods
Hardware  toy: two CPU cores; 1b: one GPU of 80 GB; 7b: eight, cut by fsdp
Expect    configs/toy_pretrain.py, fm data toy --kind=styles: accuracy in and out of the
          styles of training 86.7 and 60.3 % (probe), 89.8 and 62.4 (full), 90.5 and
          61.9 (lp_ft), with a rate of 3e-3 87.5 and 63.4 (lora)
"""

from ml_collections import ConfigDict

from configs import _finetune

# Peak learning rate (2e-5 to 5e-5 in arXiv 1810.04805, appendix A.3); tokens in a row;
# rows in a step, and how often they are cut. The larger ones are not run yet.
BASES = {
    "toy": {"rate": 1e-3, "length": 128, "batch_size": 4, "accumulation": 1},
    "1b": {"rate": 2e-5, "length": 512, "batch_size": 32, "accumulation": 1},
    "7b": {"rate": 1e-5, "length": 512, "batch_size": 32, "accumulation": 2},
}


def get_config(size: str = "toy") -> ConfigDict:
    """Return the config for a base of one size; the base itself is init.from."""
    config = _finetune.start(size, **BASES[size])
    config.data.examples = "classify"
    config.finetune.method = "full"
    config.schedule.warmup_fraction = 0.1
    if size == "toy":
        config.train.steps = 150  # about eight times 400 examples
    else:
        config.train.epochs = 3.0
    config.eval.batch_size = 32
    return config
