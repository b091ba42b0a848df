"""A decoder on a Hugging Face dataset that lies in a folder.

Purpose   text of the library `datasets` without a network: what save_to_disk wrote, or
          a folder of its data files
Command   pip install 'fm_jax[hf]'
          fm train --config=configs/data/hf_local.py --config.data.name=my_dataset
Hardware  two CPU cores
Time      the column is read at hundreds of MB/s; what a build takes is the tokenizer's
Expect    one split is enough: a hundredth of the documents, by a hash of their text, is
          held out. A split or column that is not there stops it, with the known ones
          named. Rows without text are counted.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Return the base config on the split `train` of the folder `my_dataset`."""
    config = base.get_config()
    config.data.source = "hf"
    config.data.name = "my_dataset"
    config.data.split = "train"  # or a slice of it, as train[:10%]
    config.data.eval_split = "train"
    config.data.eval_fraction = 0.01
    config.data.text_field = "text"
    config.data.on_bad_text = "skip"
    config.data.packing = "best_fit"
    config.train.steps = 400
    config.eval.every = 100
    config.sample.prompt = "The "
    return config
