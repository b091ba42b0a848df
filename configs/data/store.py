"""A decoder on two ready token stores, mixed by weights that change on the way.

Purpose   mix corpora by tokens, and bring in more of one towards the end
Command   fm data tokenizer --config=configs/data/text.py \
              --config.data.paths='("web", "code")' --out=tokenizer.json
          fm data build --config=configs/data/text.py --config.data.paths='("web",)' \
              --config.data.tokenizer=tokenizer.json --out=stores/web
          fm data build --config=configs/data/text.py --config.data.paths='("code",)' \
              --config.data.tokenizer=tokenizer.json --out=stores/code
          fm train --config=configs/data/store.py
Hardware  two CPU cores
Time      a store opens at once: nothing is read of the text again
Expect    train/loss and eval/loss of the whole and of each store by itself, in the
          shares given: of the first 300 steps' tokens nine in ten are of the first
          store, then one in two. Stores of two tokenizers are refused.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Return the base config on `stores/web` and `stores/code`."""
    config = base.get_config()
    config.data.source = "store"
    config.data.paths = ("stores/web", "stores/code")
    config.data.tokenizer = "store"
    config.data.weights = (0.9, 0.1)
    config.data.weights_at = ((300, (0.5, 0.5)),)
    config.train.steps = 400
    config.eval.every = 100
    return config
