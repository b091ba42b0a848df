"""GPT-2's small size on ten billion tokens of FineWeb, from the Hugging Face hub.

Purpose   pretraining on filtered web text
Paper     Penedo et al., 2024 (arXiv 2406.17557); the rates are GPT-3's (2005.14165)
Command   pip install 'fm_jax[hf]'
          curl -O https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken
          fm data build --config=configs/data/fineweb_hf.py
          fm train --config=configs/data/fineweb_hf.py --workdir=runs/fineweb
Hardware  a network and about 120 GB of disk to build; one GPU of 80 GB to train
Expect    not run yet: it is checked as a config alone. Ten documents in ten thousand,
          by a hash of their text, are held out: about ten million tokens
"""

from ml_collections import ConfigDict

from configs import base
from fm_jax.models import presets


def get_config() -> ConfigDict:
    """Return the config on `sample-10BT`; the tokenizer is GPT-2's."""
    config = base.get_config()
    config.model.update(presets.preset("gpt2-124m"))
    config.model.dtype = "bfloat16"
    config.model.residual_dtype = "bfloat16"
    config.model.remat = "names"
    config.data.source = "hf"
    config.data.name = "HuggingFaceFW/fineweb:sample-10BT"
    config.data.split = "train"
    config.data.eval_split = "train"
    config.data.eval_fraction = 0.001
    config.data.on_bad_text = "replace"  # one bad document stops nothing
    config.data.tokenizer = "r50k_base.tiktoken"
    config.data.max_length = 1024
    config.optimizer.learning_rate = 6e-4
    config.train.batch_size = 512
    config.train.accumulation = 16
    config.train.loss_chunk = 128
    config.train.epochs = 1.0
    config.eval.every = 500
    config.eval.max_batches = 40
    config.checkpoint.every = 500
    config.sample.prompt = "The "
    return config
