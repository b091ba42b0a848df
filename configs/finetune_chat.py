"""Instructions and dialogues, all weights; the variant is a size: toy 1b 7b.

Purpose   a base that goes on with text becomes one that answers
Paper     Ouyang et al. (arXiv 2203.02155); the recipe is Tulu 3's (arXiv 2411.15124)
Command   fm train --config=configs/finetune_chat.py --config.init.from=runs/base \
              --config.data.paths=chats.jsonl
          a line is {"messages": [{"role": "user", "content": "..."}, ...]}; for lines
          with prompt and completion add --config.data.examples=completion. Then
          fm generate --run=RUN --chat
Hardware  toy: two CPU cores; 1b: one GPU of 80 GB; 7b: eight, cut by fsdp
Expect    a base of configs/toy_pretrain.py, fm data toy --kind=chat: held-out loss of
          answers 0.074 nats per token at step 600, 0.0006 at 1,125
"""

from ml_collections import ConfigDict

from configs import _finetune

# Peak learning rate (2e-5 of Alpaca's 7B, 5e-6 of Tulu 3's 8B); tokens in a row; rows
# in a step, and how often they are cut. The larger ones are not run yet.
BASES = {
    "toy": {"rate": 3e-3, "length": 256, "batch_size": 8, "accumulation": 1},
    "1b": {"rate": 2e-5, "length": 2048, "batch_size": 32, "accumulation": 4},
    "7b": {"rate": 1e-5, "length": 2048, "batch_size": 32, "accumulation": 4},
}


def get_config(size: str = "toy") -> ConfigDict:
    """Return the config for a base of one size; the base itself is init.from."""
    config = _finetune.start(size, **BASES[size])
    config.data.examples = "chat"
    config.schedule.warmup_fraction = 0.03
    config.train.epochs = 10.0 if size == "toy" else 3.0
    return config
