"""What all tests share: eight simulated devices, quick compiles, tiny models."""

import gc
import os
import pathlib

import jax
import numpy as np
import pytest

from fm_jax import trees
from fm_jax.models.config import ModelConfig

# Tiny models spend their time in the compiler: less of LLVM halves a cold run.
os.environ["XLA_FLAGS"] = " ".join(
    ["--xla_backend_optimization_level=0", os.environ.get("XLA_FLAGS", "")]
)
# Devices that are threads wait for each other in collectives: with a thread for each
# and no more, two collectives at once wait for ever.
os.environ.setdefault("PJRT_NPROC", "64")
CACHE = pathlib.Path(__file__).parent.parent / ".pytest_cache" / "jax"
MOST_MAPS = 15_000
jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS") or "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# Odd and all different, so that no dim passes for another. The epsilon and theta are
# large, so that a wrong place for either shows in float32.
TINY = {
    "vocab_size": 37,
    "max_length": 11,
    "num_layers": 3,
    "embed_dim": 12,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 6,
    "mlp_dim": 20,
    "norm": "rmsnorm",
    "norm_position": "pre",
    "norm_epsilon": 1e-2,
    "positions": "rope",
    "position_offset": 0,
    "rope_theta": 100.0,
    "rope_local_theta": 0.0,
    "rope_fraction": 1.0,
    "rope_scaling": (),
    "qk_norm": False,
    "qk_norm_over": "head",
    "window": 0,
    "window_pattern": "L",
    "attention_scale": 0.0,
    "attention_softcap": 0.0,
    "attention_sinks": False,
    "logits_softcap": 0.0,
    "activation": "swiglu",
    "embed_scale": 1.0,
    "embed_norm": False,
    "tied_embeddings": False,
    "use_bias": False,
    "biases": (),
    "parallel_block": False,
    "parallel_norms": 1,
    "num_experts": 0,
    "num_experts_per_token": 0,
    "shared_mlp_dim": 0,
    "expert_capacity": 0.0,
    "embed_init_std": 0.5,
    "init_scale": 1.3,
    "dtype": "float32",
    "residual_dtype": "float32",
    "remat": "none",
    "remat_names": ("mixed", "attention_out"),
}

# Together they hold every value of every field that changes the mathematics, and the
# combinations in which one part depends on two fields.
ARCHITECTURES = {
    "llama": {},
    "llama3": {
        "rope_scaling": (
            ("llama3", (4.0,)),
            ("low_frequency", (0.02,)),
            ("high_frequency", (0.8,)),
            ("original_length", (6.0,)),
        ),
        "attention_scale": 0.7,
    },
    "gpt2": {
        "norm": "layernorm",
        "positions": "learned",
        "activation": "gelu",
        "use_bias": True,
        "tied_embeddings": True,
        "num_kv_heads": 4,
    },
    "opt": {
        "norm": "layernorm",
        "positions": "learned",
        "position_offset": 2,
        "activation": "relu",
        "use_bias": True,
        "tied_embeddings": True,
        "num_kv_heads": 4,
    },
    "gemma2": {
        "norm": "rmsnorm_1p",
        "norm_position": "sandwich",
        "activation": "geglu",
        "window": 3,
        "window_pattern": "LG",
        "attention_scale": 0.3,
        "attention_softcap": 1.5,
        "logits_softcap": 2.5,
        "tied_embeddings": True,
        "embed_scale": 1.75,
    },
    "gemma3": {
        "norm": "rmsnorm_1p",
        "norm_position": "sandwich",
        "activation": "geglu",
        "window": 4,
        "window_pattern": "LLG",
        "qk_norm": True,
        "num_kv_heads": 1,
        "rope_local_theta": 30.0,
        "rope_scaling": (("linear", (2.5,)),),
        "embed_scale": 1.25,
    },
    "nanochat": {
        "activation": "relu2",
        "qk_norm": True,
        "logits_softcap": 3.5,
        "num_kv_heads": 1,
    },
    "gptj": {
        "norm": "layernorm",
        "activation": "gelu",
        "biases": ("mlp", "norm", "head"),
        "parallel_block": True,
        "num_kv_heads": 4,
        "rope_fraction": 2 / 3,
    },
    "neox": {
        "norm": "layernorm",
        "activation": "gelu_exact",
        "use_bias": True,
        "parallel_block": True,
        "parallel_norms": 2,
        "num_kv_heads": 4,
        "rope_fraction": 1 / 3,
    },
    "bloom": {
        "norm": "layernorm",
        "positions": "alibi",
        "activation": "gelu",
        "use_bias": True,
        "embed_norm": True,
        "tied_embeddings": True,
        "num_heads": 6,
        "num_kv_heads": 6,
    },
    "grouped_alibi": {
        "positions": "alibi",
        "num_heads": 6,
        "num_kv_heads": 3,
        "window": 4,
        "attention_scale": 0.6,
        "qk_norm": True,
    },
    "olmo2": {
        "norm_position": "post",
        "qk_norm": True,
        "qk_norm_over": "heads",
    },
    "qwen2": {
        "biases": ("qkv",),
        "tied_embeddings": True,
        "rope_scaling": (
            ("yarn", (4.0,)),
            ("original_length", (8.0,)),
            ("beta_fast", (1.0,)),
            ("beta_slow", (0.1,)),
            ("magnitude", (0.0,)),
            ("truncate", (1.0,)),
        ),
    },
    "phi3": {
        "window": 5,
        "rope_fraction": 2 / 3,
        "rope_scaling": (
            ("longrope", (2.0,)),
            ("original_length", (7.0,)),
            ("short", (1.0, 1.5)),
            ("long", (1.25, 3.0)),
            ("magnitude", (0.0,)),
        ),
    },
    "sinks": {
        "attention_sinks": True,
        "activation": "swiglu_clamped",
        "biases": ("qkv", "attention_out", "mlp"),
        "window": 3,
        "window_pattern": "LG",
        "rope_scaling": (
            ("yarn", (3.0,)),
            ("original_length", (9.0,)),
            ("beta_fast", (0.9,)),
            ("beta_slow", (0.1,)),
            ("magnitude", (1.2,)),
            ("truncate", (0.0,)),
        ),
    },
    "mixtral": {"num_experts": 5, "num_experts_per_token": 2},
    "gpt_oss": {
        "num_experts": 3,
        "num_experts_per_token": 2,
        "attention_sinks": True,
        "activation": "swiglu_clamped",
        "biases": ("qkv", "attention_out", "mlp", "router"),
        "window": 3,
        "window_pattern": "LG",
    },
    "shared_expert": {
        "num_experts": 4,
        "num_experts_per_token": 1,
        "shared_mlp_dim": 7,
        "norm": "layernorm",
        "activation": "gelu",
        "use_bias": True,
        "parallel_block": True,
    },
    "parallel_local": {
        "parallel_block": True,
        "positions": "learned",
        "window": 2,
        "qk_norm": True,
    },
    "no_positions": {
        "norm": "layernorm",
        "positions": "none",
        "activation": "swiglu",
        "qk_norm": True,
        "qk_norm_over": "heads",
        "tied_embeddings": True,
        "attention_sinks": True,
        "attention_softcap": 2.5,
    },
    "all_biases": {
        "norm": "layernorm",
        "norm_position": "sandwich",
        "activation": "geglu",
        "use_bias": True,
        "qk_norm": True,
        "attention_softcap": 2.0,
    },
    "rms_biases": {"use_bias": True, "activation": "relu2", "head_dim": 10},
}


@pytest.fixture(scope="module", autouse=True)
def _room():
    """Forget compiled programs before they fill a process's memory maps.

    Each takes several, a process may have 65,530 (vm.max_map_count), and one more ends
    it with a segmentation fault. What is forgotten is in CACHE.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def model_config():
    """Return `model_config(**overrides)`, a tiny ModelConfig."""
    return lambda **overrides: ModelConfig(**TINY | overrides)


@pytest.fixture(scope="session", params=ARCHITECTURES)
def architecture(request):
    """Return each of the architectures in turn, as a ModelConfig."""
    return ModelConfig(**TINY | ARCHITECTURES[request.param])


@pytest.fixture(scope="session")
def architectures():
    """Return all the architectures, as a list of ModelConfigs."""
    return [ModelConfig(**TINY | fields) for fields in ARCHITECTURES.values()]


@pytest.fixture(scope="session")
def random_params():
    """Return `random_params(abstract, seed)`: nothing hides at its zero or one."""

    def draw(abstract, seed=0):
        rng = np.random.default_rng(seed)

        def leaf(path, struct):
            noise = rng.standard_normal(struct.shape)
            last = trees.path_name(path).rsplit("/", maxsplit=1)[-1]
            if last == "scale":
                noise = 1 + 0.3 * noise
            elif last in ("kernel", "bias"):
                noise = 0.3 * noise
            elif last == "balance":  # beside probabilities
                noise = 0.1 * noise
            else:
                noise = 0.5 * noise
            return noise.astype(np.float32)

        return jax.tree_util.tree_map_with_path(leaf, abstract)

    return draw


@pytest.fixture(scope="session")
def equations():
    """Return `equations(jaxpr)`: all its equations, those of inner jaxprs too."""

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            yield equation
            for value in equation.params.values():
                for inner in value if isinstance(value, list | tuple) else [value]:
                    if hasattr(inner, "eqns"):
                        yield from walk(getattr(inner, "jaxpr", inner))

    return walk
