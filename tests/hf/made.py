"""Checkpoint folders of theirs, made by hand or by transformers' own library."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from fm_jax.hf import families, importing, mapping, vocabulary
from fm_jax.models.config import ModelConfig
from fm_jax.runs import Run
from fm_jax.tokenizers.plain import SymbolTokenizer

DTYPES = {
    "F32": ("float32", np.float32),
    "F16": ("float16", np.float16),
    "BF16": ("bfloat16", ml_dtypes.bfloat16),
}
# Of a model as tests/conftest.py has it: what each family's differs in.
GPT2 = {
    "norm": "layernorm",
    "positions": "learned",
    "activation": "gelu",
    "use_bias": True,
    "tied_embeddings": True,
    "num_kv_heads": 4,
    "head_dim": 3,
}
MIXTRAL = {"num_experts": 3, "num_experts_per_token": 2}
LLAMA3 = {
    "rope_scaling": (
        ("llama3", (4.0,)),
        ("low_frequency", (0.02,)),
        ("high_frequency", (0.8,)),
        ("original_length", (6.0,)),
    )
}


def save(file: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write a file by the format's own library."""
    save_file(tensors, file, {"format": "pt"})


def sharded(folder: Path, tensors: dict[str, np.ndarray], count: int) -> None:
    """Write several files and their index, the tensors dealt out in turns."""
    names, weight_map = list(tensors), {}
    for number in range(count):
        file = f"model-{number + 1:05}-of-{count:05}.safetensors"
        here = names[number::count]
        save(folder / file, {name: tensors[name] for name in here})
        weight_map |= dict.fromkeys(here, file)
    total = sum(x.nbytes for x in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def tensors_of(
    config: ModelConfig, kinds: tuple[str, ...], family: str = ""
) -> tuple[dict, dict[str, np.ndarray]]:
    """Return a config.json and random weights; tensors take the kinds in turns."""
    found = families.FAMILIES[family] if family else families.fitting(config)
    rng = np.random.default_rng(0)
    tensors = {}
    for number, (name, entry) in enumerate(mapping.entries(found, config).items()):
        dtype = DTYPES[kinds[number % len(kinds)]][1]
        tensors[name] = rng.standard_normal(entry.shape, np.float32).astype(dtype)
    written = families.write(found, config, DTYPES[kinds[0]][0])
    return written | {"eos_token_id": 29}, tensors


def checkpoint(
    folder: Path,
    config: ModelConfig,
    *,
    kinds: tuple[str, ...] = ("F32",),
    files: int = 1,
    family: str = "",
) -> dict[str, np.ndarray]:
    """Write a checkpoint folder with a tokenizer of 30 ids; return its tensors."""
    folder.mkdir()
    written, tensors = tensors_of(config, kinds, family)
    (folder / "config.json").write_text(json.dumps(written))
    if files > 1:
        sharded(folder, tensors, files)
    else:
        save(folder / "model.safetensors", tensors)
    vocabulary.write(SymbolTokenizer(29), folder, max_length=11)
    return tensors


def load(folder: Path) -> dict[str, np.ndarray]:
    """Return all tensors of a folder, by the format's own library."""
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def bring(folder: Path, out: Path, tokenizer: str = "") -> Run:
    """Make a run of a folder without a word."""
    return importing.bring(
        folder, out, tokenizer=tokenizer, command=["fm"], say=lambda line: None
    )


def edited(folder: Path, change, name: str = "config.json") -> None:
    """Change a JSON file of a folder."""
    fields = json.loads((folder / name).read_text())
    change(fields)
    (folder / name).write_text(json.dumps(fields))
