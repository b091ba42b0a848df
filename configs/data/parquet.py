"""A decoder on a column of Parquet tables, cleaned on the way.

Purpose   text as web corpora come: a column of many tables, with bad rows and repeats
Command   fm data build --config=configs/data/parquet.py \
              --config.data.paths='("tables/*.parquet",)'
          fm train --config=configs/data/parquet.py \
              --config.data.paths='("tables/*.parquet",)'
Hardware  two CPU cores; more of them build faster
Time      as configs/data/text.py
Expect    the build ends with how many rows had no text, were not UTF-8 or were damaged,
          with the first places of each, and how many repeated a text. A column that is
          not there stops it, with the known ones named.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Return the base config on the column `text` of all tables under `tables`."""
    config = base.get_config()
    config.data.source = "text"
    config.data.paths = ("tables/*.parquet",)
    config.data.text_field = "text"  # the column
    config.data.on_bad_text = "skip"
    config.data.deduplicate = True
    config.data.packing = "best_fit"  # no document is cut that fits into a row
    config.train.steps = 400
    config.eval.every = 100
    config.sample.prompt = "The "
    return config
