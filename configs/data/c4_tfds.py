"""GPT-2's small size on C4, prepared by TensorFlow Datasets.

Purpose   pretraining on a large dataset that others prepared, read by rows
Paper     Raffel et al., 2019 (arXiv 1910.10683); the rates are GPT-3's (2005.14165)
Command   fm data build --config=configs/data/c4_tfds.py \
              --config.data.tfds_dir=/data/tensorflow_datasets
          fm train --config=configs/data/c4_tfds.py \
              --config.data.tfds_dir=/data/tensorflow_datasets --workdir=runs/c4
Hardware  a disk with C4 as ArrayRecord and as much room again for its tokens, about a
          terabyte in all; one GPU of 80 GB to train. To prepare C4 takes TFDS with
          TensorFlow and Beam: tfds.builder("c4/en:3.1.0", file_format="array_record")
          .download_and_prepare(); a prepared one is read without them
Expect    not run yet: it is checked as a config alone. With data.split="train[:1%]" a
          first try takes a hundredth of the disk
"""

from ml_collections import ConfigDict

from configs import base
from fm_jax.models import presets


def get_config() -> ConfigDict:
    """Return the config on `c4/en`; 20 tokens for each parameter are seen."""
    config = base.get_config()
    config.model.update(presets.preset("gpt2-124m"))
    config.model.dtype = "bfloat16"
    config.model.residual_dtype = "bfloat16"
    config.model.remat = "names"
    config.data.source = "tfds"
    config.data.name = "c4/en:3.1.0"
    config.data.split = "train"
    config.data.eval_split = "validation"
    config.data.on_bad_text = "replace"  # one bad document stops nothing
    config.data.tokenizer = "r50k_base.tiktoken"
    config.data.max_length = 1024
    config.optimizer.learning_rate = 6e-4
    config.train.batch_size = 512
    config.train.accumulation = 16
    config.train.loss_chunk = 128
    config.train.tokens_per_param = 20.0
    config.eval.every = 500
    config.eval.max_batches = 40
    config.checkpoint.every = 500
    config.sample.prompt = "The "
    return config
