"""IsoFLOP slices of tiny decoders on a source whose best loss is known.

Purpose   the whole way from plan to law in minutes: sweep, fit, and an irreducible loss
          E to compare with the source's own entropy
Paper     approach 2 and 3 of Hoffmann et al. (arXiv 2203.15556)
Command   fm sweep --config=configs/sweeps/tiny_isoflop.py --workdir=sweeps/tiny
          fm fit --runs=sweeps/tiny
Hardware  two CPU cores
Time      --dry_run says, best after a few runs have ended there
Expect    each budget has its minimum between its sizes, at 1.2e11 FLOPs near 2e4
          parameters; a symbol depends on the one before alone, so that one layer is
          enough and width is what limits
"""

from ml_collections import ConfigDict

from configs.sweeps import base


def get_config() -> ConfigDict:
    """Return the sweep: five budgets, six sizes each."""
    config = base.get_config()
    run = config.base
    run.data.source = "synthetic"
    run.data.tokenizer = "symbols"
    run.data.max_length = 64
    # Sharp enough, and symbols alike enough, that width and tokens both limit.
    run.synthetic.num_symbols = 127  # 128 ids with the end
    run.synthetic.concentration = 0.04
    run.synthetic.zipf = 0.5
    run.synthetic.num_tokens = 16_000_000  # no run sees a token twice
    # The anchor of the learning rate; every size has its depth.
    run.model.num_layers = 1
    run.model.embed_dim = 32
    run.model.num_heads = 4
    run.model.activation = "relu2"
    run.model.qk_norm = True
    run.optimizer.learning_rate = 0.02
    run.schedule.name = "wsd"
    run.schedule.warmup_fraction = 0.05
    run.schedule.final_fraction = 0.0
    run.train.batch_size = 32
    run.eval.every = 0
    run.eval.batch_size = 64
    run.checkpoint.every = 0
    run.checkpoint.keep = 1
    run.sample.num_tokens = 0

    config.design.budgets = (1e11, 2.5e11, 6e11, 1.5e12, 3e12)
    config.design.points = 6
    # Further from the optimum than this the law bends: few steps, or width 8.
    config.design.width = 2.2
    config.design.centre = 70.0
    config.design.replicates = 3
    config.size.num_layers = 1
    config.size.head_dim = 4
    config.size.round_to = 8
    config.size.limits = (8, 192)
    config.budget.learning_rate = "porian"
    return config
