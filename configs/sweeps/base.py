"""Every key of a sweep, with its default. Other sweeps start from this one.

A sweep is many runs of one config with other sizes, durations, batches and rates. A
`dial` is what size.rule makes a decoder from: a width or a number of layers.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Return a sweep without points: set design.kind and the lists that it needs."""
    config = ConfigDict()

    # The run that all are made from; its duration is design's. Its batch size, learning
    # rate and warm-up are what rules of config.budget begin with.
    config.base = base.get_config()

    config.design = design = ConfigDict()
    # isoflop: sizes around the centre of each budget | grid: sizes x tokens
    # ladder: sizes x tokens_per_param | random: points between bounds
    # branches: a trunk for each size, and a decay for each of tokens_per_param
    design.kind = "isoflop"
    design.budgets = ()  # isoflop: training FLOPs
    design.sizes = ()  # dials; isoflop: () chooses; random: (low, high)
    design.tokens = ()  # grid; random: (low, high)
    design.tokens_per_param = ()  # ladder, branches: horizons, by size.count
    design.points = 7  # isoflop: sizes in a budget; random: runs
    design.width = 4.0  # isoflop: from centre / width parameters to centre * width
    design.centre = 20.0  # isoflop: tokens per parameter in the middle of a budget
    design.decay_fraction = 0.2  # branches: of a whole run, at its end
    design.replicates = 1  # runs of each point of the smallest size, seeds apart
    design.flops = "6n"  # how they are counted: 6n (6 * size.count * tokens) | exact
    design.seed = 0  # random

    config.size = size = ConfigDict()
    size.rule = "width"  # what the dial is: width | layers
    size.aspect = 64.0  # width per layer
    size.num_layers = 0  # rule width: of every size; 0: width / aspect
    size.head_dim = 64  # widths are multiples of it
    size.group = 1  # query heads that share a key/value head, where they divide
    size.mlp_ratio = 4.0  # mlp_dim / width
    size.round_to = 64  # mlp_dim is a multiple of it
    size.count = "total"  # of parameters, as N: total | non_embedding | matmul
    size.limits = (0, 0)  # smallest and largest dial that isoflop chooses; 0: none

    config.budget = budget = ConfigDict()
    # fixed: base's | absolute laws: steplaw deepseek | exponents from the anchor:
    # porian (of parameters), power_lines (of tokens)
    budget.batch = "fixed"
    budget.batch_multiple = 1  # rows of a step are a multiple of it
    budget.micro_rows = 0  # rows of a micro-batch at most; 0: base's train.accumulation
    # fixed: base's | absolute: steplaw deepseek | from the anchor: porian (of
    # parameters), width (1 / width, from base's model)
    budget.learning_rate = "fixed"
    budget.warmup = "fraction"  # base's | porian: tokens = parameters, at most base's
    budget.anchor_params = 0.0  # where base's values were tuned; 0: base's own model
    budget.anchor_tokens = 0.0  # power_lines: tokens that base's batch was tuned at
    budget.min_steps = 20  # a run with fewer is none

    config.target_flops = 0.0  # that the answer is for; 0: 100 times the largest run's
    config.noise = 0.003  # assumed sd of ln loss from run to run, for planning alone
    return config
