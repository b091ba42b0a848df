"""Published decoders as values of ModelConfig's fields. Imports no jax."""

from fm_jax.errors import unknown

_GPT2 = {
    "vocab_size": 50_257,
    "max_length": 1024,
    "head_dim": 64,
    "norm": "layernorm",
    "norm_epsilon": 1e-5,
    "positions": "learned",
    "activation": "gelu",
    "tied_embeddings": True,
    "use_bias": True,
}
_LLAMA3 = {
    "vocab_size": 128_256,
    "max_length": 8192,
    "norm_epsilon": 1e-5,
    "rope_theta": 500_000.0,
    "activation": "swiglu",
}


def _sizes(layers: int, embed: int, heads: int, kv_heads: int, mlp: int) -> dict:
    return {
        "num_layers": layers,
        "embed_dim": embed,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "mlp_dim": mlp,
    }


# Sizes and the exact parameter counts that the tests hold them to: GPT-2 (Radford et
# al., 2019, as released), Llama 3.2 1B, Llama 3 8B and 70B (arXiv 2407.21783, as
# released).
PRESETS: dict[str, dict] = {
    "gpt2-124m": _GPT2 | _sizes(12, 768, 12, 12, 3072),
    "gpt2-355m": _GPT2 | _sizes(24, 1024, 16, 16, 4096),
    "gpt2-774m": _GPT2 | _sizes(36, 1280, 20, 20, 5120),
    "gpt2-1558m": _GPT2 | _sizes(48, 1600, 25, 25, 6400),
    "llama3-1b": _LLAMA3
    | _sizes(16, 2048, 32, 8, 8192)
    | {"head_dim": 64, "tied_embeddings": True},
    "llama3-8b": _LLAMA3 | _sizes(32, 4096, 32, 8, 14_336) | {"head_dim": 128},
    "llama3-70b": _LLAMA3 | _sizes(80, 8192, 64, 8, 28_672) | {"head_dim": 128},
}


def preset(name: str) -> dict:
    """Return the fields of a published decoder, to update a config's model with.

    Raises UserError on a name that is not known.
    """
    if name not in PRESETS:
        raise unknown("model preset", name, PRESETS)
    return dict(PRESETS[name])
