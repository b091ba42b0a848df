"""A decoder on a TFDS dataset that you packed from your own text.

Purpose   text as a dataset of TensorFlow Datasets: its rows are read by number, by us
          and by anything that calls tfds.data_source("my_text", data_dir="datasets")
Command   fm data pack --config=configs/data/text.py \
              --config.data.paths='("corpus",)' --out=datasets --name=my_text
          fm train --config=configs/data/tfds_local.py
Hardware  two CPU cores
Time      packing goes at tens of MB/s, in one process
Expect    the same documents are held out as by configs/data/text.py: packing puts them
          into the split `validation`. No TensorFlow is imported, or needed.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Return the base config on `my_text` of the folder `datasets`."""
    config = base.get_config()
    config.data.source = "tfds"
    config.data.name = "my_text"
    config.data.tfds_dir = "datasets"
    config.data.split = "train"
    config.data.eval_split = "validation"
    config.train.steps = 400
    config.eval.every = 100
    config.sample.prompt = "The "
    return config
