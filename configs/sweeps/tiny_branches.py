"""Trunks at a constant rate with decays of several lengths, tiny, on a known source.

Purpose   a law from fewer FLOPs: the trunk of a size is trained once, and each horizon
          costs its decay alone; the runs are as warmup-stable-decay runs of their own
Paper     Haegele et al. (arXiv 2405.18392), MiniCPM (arXiv 2404.06395)
Command   fm sweep --config=configs/sweeps/tiny_branches.py --workdir=sweeps/branches
          fm fit --runs=sweeps/branches
Hardware  two CPU cores
Time      --dry_run says, best after a few runs have ended there
"""

from ml_collections import ConfigDict

from configs.sweeps import tiny_isoflop


def get_config() -> ConfigDict:
    """Return the sweep: four sizes, four horizons each, a trunk for each size."""
    config = tiny_isoflop.get_config()
    config.design.kind = "branches"
    config.design.budgets = ()
    config.design.sizes = (16, 24, 32, 48)
    config.design.tokens_per_param = (20.0, 40.0, 80.0, 160.0)
    config.design.decay_fraction = 0.2
    config.design.replicates = 1
    return config
