"""Steps to time; the variant is a size: tiny small tiny_bf16 small_bf16 124m 1b.

Purpose   a step to compare: with PyTorch, with the machine, with last month
Command   fm bench step --config=configs/bench.py:tiny --vs=nanogpt_like
Hardware  two CPU cores for tiny and small; one GPU of 80 GB for 124m and 1b
Expect    configs/benchmarks.md
"""

from ml_collections import ConfigDict

from configs import base
from fm_jax.models import presets

# GPT-2's shape at layers, width, heads, length, batch, vocabulary.
ON_CPU = {
    "tiny": (4, 256, 4, 256, 16, 512),
    "small": (12, 768, 12, 512, 2, 50_304),
}
# Models as released, in rows of so many tokens and batches of so many rows.
ON_GPU = {"124m": ("gpt2-124m", 1024, 64), "1b": ("llama3.2-1b", 2048, 16)}


def get_config(variant: str = "tiny") -> ConfigDict:
    """Return the config of a variant; _bf16: products of bfloat16, state of float32."""
    config = base.get_config()
    config.optimizer.weight_decay = 0.1
    config.train.steps = 1000
    if variant in ON_GPU:
        name, length, rows = ON_GPU[variant]
        config.model.update(presets.preset(name))
        config.model.residual_dtype = "bfloat16"
        config.model.remat = "names"
        config.train.loss_chunk = 128
    else:
        size = variant.removesuffix("_bf16")
        layers, width, heads, length, rows, vocab = ON_CPU[size]
        config.model.norm = "layernorm"
        config.model.norm_epsilon = 1e-5
        config.model.positions = "learned"
        config.model.activation = "gelu"
        config.model.tied_embeddings = True
        config.model.num_layers = layers
        config.model.embed_dim = width
        config.model.num_heads = heads
        config.model.vocab_size = vocab
        if vocab > 4096:
            config.train.loss_chunk = 128
    config.model.dtype = "float32" if variant in ON_CPU else "bfloat16"
    config.data.vocab_size = min(config.model.vocab_size, 4096)
    config.data.max_length = length
    config.train.batch_size = rows
    config.eval.batch_size = rows
    return config
