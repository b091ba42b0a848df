"""A decoder on a folder of your own text.

Purpose   from files to a falling loss: .txt, .md, source code, .jsonl, each also .gz or
          .zst, .parquet and .array_record, here or under a URL
Command   fm data build --config=configs/data/text.py --config.data.paths='("corpus",)'
          fm train --config=configs/data/text.py --config.data.paths='("corpus",)'
Hardware  two CPU cores; the same text on an accelerator with a larger model
Time      building goes at tens of MB/s on two cores, training takes minutes
Expect    the build ends with what it found: documents, tokens, bytes per token. A file
          that is not UTF-8 is named, and stops it: --config.data.on_bad_text=skip goes
          on without such documents and counts them. A twentieth of the documents, by a
          hash of their text, is held out.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Return the base config on the text under `corpus`, for a few hundred steps."""
    config = base.get_config()
    config.data.source = "text"
    config.data.paths = ("corpus",)
    config.data.text_field = "text"  # of .jsonl and .parquet
    config.train.steps = 400
    config.eval.every = 100
    config.sample.prompt = "The "
    return config
