"""What the configs of fine-tuning have in common."""

from ml_collections import ConfigDict

from configs import base


def start(
    size: str, *, rate: float, length: int, batch_size: int, accumulation: int
) -> ConfigDict:
    """Return a config that begins with another run's weights, by default on examples.

    rate: the peak of the learning rate; length: tokens in a row; batch_size: rows in a
    step, cut into `accumulation` parts. Sizes other than `toy` are held as they fit
    GPUs: in bfloat16, activations made anew, weights cut over devices.
    """
    config = base.get_config()
    config.init.model = True
    config.data.source = "text"
    config.data.max_length = length
    config.data.packing = "best_fit"
    config.optimizer.learning_rate = rate
    config.optimizer.weight_decay = 0.0
    config.schedule.name = "linear"
    config.schedule.final_fraction = 0.0
    config.train.batch_size = batch_size
    config.train.accumulation = accumulation
    config.eval.every = 100
    config.eval.batch_size = batch_size // accumulation
    config.checkpoint.every = 100
    config.checkpoint.keep = 1
    config.sample.num_tokens = 0
    if size != "toy":
        config.model.dtype = "bfloat16"
        config.model.residual_dtype = "bfloat16"
        config.model.remat = "full"
        config.train.loss_chunk = 256
        config.mesh.preset = "fsdp"
    return config
