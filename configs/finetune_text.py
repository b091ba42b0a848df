"""A base goes on with your own text, all weights; the variant is a size: toy 1b 7b.

Purpose   continued training: a domain, a language, a style of writing
Paper     Gururangan et al. (arXiv 2004.10964)
Command   fm train --config=configs/finetune_text.py --config.init.from=runs/base \
              --config.data.paths=mine.jsonl
          --config.init.from is a run or a Hugging Face folder; --config.data.eval_paths
          held-out files, without which eval_fraction of the documents is held out
Hardware  toy: two CPU cores; 1b: one GPU of 80 GB; 7b: eight, cut by fsdp
Expect    fm data toy --kind=text: 1.12 bits per byte of held-out text, of the base 14.7
          (the same command with --config.finetune.method=none)
"""

from ml_collections import ConfigDict

from configs import _finetune

# Peak learning rate, a tenth of a base's own; tokens in a row; rows in a step, and how
# often they are cut. The larger ones are not run yet.
BASES = {
    "toy": {"rate": 1e-3, "length": 256, "batch_size": 16, "accumulation": 1},
    "1b": {"rate": 3e-5, "length": 2048, "batch_size": 64, "accumulation": 8},
    "7b": {"rate": 2e-5, "length": 2048, "batch_size": 64, "accumulation": 4},
}


def get_config(size: str = "toy") -> ConfigDict:
    """Return the config for a base of one size; the base itself is init.from."""
    config = _finetune.start(size, **BASES[size])
    config.optimizer.weight_decay = 0.1
    config.schedule.name = "cosine"
    config.schedule.warmup_fraction = 0.03
    config.schedule.final_fraction = 0.1
    config.train.epochs = 1.0
    config.sample.prompt = ""
    config.sample.num_tokens = 128
    return config
