"""IsoFLOP slices of GPT-2-like decoders on your own text, 1e17 to 1e19 FLOPs a run.

Purpose   the compute-optimal size for a corpus, from small runs
Paper     Hoffmann et al. (arXiv 2203.15556); batch and rate after Porian et al. (arXiv
          2406.19146), warm-up of as many tokens as parameters
Command   fm sweep --config=configs/sweeps/gpt2_isoflop.py --workdir=sweeps/gpt2 \
              --config.base.data.paths='("corpus/*.jsonl.zst",)' --parallel=8
Hardware  one GPU of 80 GB or more; one run on each with --parallel
Time      --dry_run on that machine says
Expect    not run yet
"""

from ml_collections import ConfigDict

from configs.sweeps import base


def get_config() -> ConfigDict:
    """Return the sweep: five budgets, seven sizes each, three seeds of the smallest."""
    config = base.get_config()
    run = config.base
    run.data.source = "text"
    run.data.vocab_size = 32_768
    run.data.max_length = 1024
    # The anchor, 12 layers of 768: GPT-2 small with this vocabulary, 134M parameters.
    run.model.num_layers = 12
    run.model.embed_dim = 768
    run.model.num_heads = 12
    run.model.dtype = "bfloat16"
    run.model.residual_dtype = "bfloat16"
    run.model.activation = "relu2"
    run.model.qk_norm = True
    run.model.remat = "names"
    run.optimizer.learning_rate = 1e-3
    run.schedule.name = "cosine"
    run.schedule.warmup_fraction = 0.2  # at most
    run.train.batch_size = 256
    run.train.loss_chunk = 128
    run.eval.every = 0
    run.eval.batch_size = 16
    run.checkpoint.every = 1000
    run.checkpoint.keep = 1
    run.sample.num_tokens = 0

    config.design.budgets = (1e17, 3e17, 1e18, 3e18, 1e19)
    config.design.points = 7
    config.design.width = 4.0
    config.design.centre = 20.0
    config.design.replicates = 3
    config.size.aspect = 64.0
    config.size.head_dim = 64
    config.size.limits = (128, 2048)
    config.budget.batch = "porian"
    config.budget.batch_multiple = 16
    config.budget.micro_rows = 16
    config.budget.learning_rate = "porian"
    config.budget.warmup = "porian"
    config.target_flops = 1e21
    return config
