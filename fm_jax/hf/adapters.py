"""Adapter folders of the `peft` library, read and written without it.

adapter_config.json and adapter_model.safetensors, as github.com/huggingface/peft has
them. What of its config has no meaning here is refused by its name.
"""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from fm_jax import jsonfiles, patterns
from fm_jax.errors import UserError, unknown
from fm_jax.hf import carried, header
from fm_jax.hf.lowrank import Low
from fm_jax.hf.tensors import Tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
PREFIX = "base_model.model."
NAME = re.compile(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.weight")
HANDLED = ("peft_type", "r", "lora_alpha", "use_rslora", "lora_dropout", "rank_pattern",
           "alpha_pattern", "fan_in_fan_out", "base_model_name_or_path", "task_type",
           "init_lora_weights", "bias")  # fmt: skip
# Which modules there are is seen in the tensors; the others say how it was trained.
IGNORED = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
           "auto_mapping", "revision", "inference_mode", "peft_version",
           "megatron_config", "megatron_core", "loftq_config", "eva_config",
           "corda_config", "lora_ga_config", "qalora_group_size", "runtime_config",
           "ensure_weight_tying")  # fmt: skip
# What else an update may be there: null, false or empty, or it is refused.
REFUSED = {
    "modules_to_save": "Whole modules are no update of low rank.",
    "use_dora": "DoRA also scales each output.",
    "lora_bias": "An update has no bias here.",
    "trainable_token_indices": "Rows of embeddings are no update of low rank.",
    "layer_replication": "It makes another model of the base.",
    "target_parameters": "Experts have no updates here.",
    "alora_invocation_tokens": "An update is always on here.",
    "use_qalora": "It pools what A reads.",
    "use_bdlora": "Its parts are of another kind.",
    "velora_config": "Its updates are of another kind.",
    "monteclora_config": "Its updates are drawn.",
    "arrow_config": "Its updates are routed.",
    "kasa_config": "Its updates are of another kind.",
}
MOST_LETTERS, MOST_REPEATS = 256, 2  # of a module's name, and of a pattern
# By others the base's own weights change before training.
STARTS = (None, True, False, "gaussian", "orthogonal", "eva")


@dataclasses.dataclass(frozen=True)
class Adapter:
    """Updates by module, and what all of them share.

    rank, alpha: of those that are not said otherwise. root: the scale is alpha /
    sqrt(r) (rsLoRA), not alpha / r. is_turned: the base's weights are [in, out].
    """

    lows: dict[str, Low]
    rank: int
    alpha: float
    root: bool
    dropout: float
    is_turned: bool
    base: str

    def scale(self, alpha: float, rank: int) -> float:
        """Return what B A is multiplied by."""
        return alpha / (math.sqrt(rank) if self.root else rank)


def is_adapter(folder: Path) -> bool:
    """Return whether a folder is an adapter's."""
    return (folder / CONFIG).is_file()


def write(folder: Path, adapter: Adapter, known: list[str]) -> None:
    """Write an adapter's files; known: all modules of the base that may have one."""
    odd = _odd(adapter)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base,
        "r": adapter.rank,
        "lora_alpha": _number(adapter.alpha),
        "use_rslora": adapter.root,
        "lora_dropout": adapter.dropout,
        "rank_pattern": {key: rank for key, (rank, _) in odd.items()},
        "alpha_pattern": {key: _number(alpha) for key, (_, alpha) in odd.items()},
        "target_modules": _targets(list(adapter.lows), known),
        "fan_in_fan_out": adapter.is_turned,
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "modules_to_save": None,
        "use_dora": False,
        "auto_mapping": None,
        "revision": None,
    }
    carried.write_json(folder / CONFIG, config)
    arrays = {
        f"{PREFIX}{name}.lora_{letter}.weight": array
        for name, low in sorted(adapter.lows.items())
        for letter, array in (("A", low.a_RI), ("B", low.b_OR))
    }
    with open(folder / WEIGHTS, "wb") as stream:
        stream.write(header.write({n: ("F32", x.shape) for n, x in arrays.items()}))
        for array in arrays.values():
            stream.write(np.ascontiguousarray(array, np.float32).tobytes())


def read(folder: Path) -> Adapter:
    """Return what an adapter's folder holds.

    Raises UserError, which names the key, module or tensor, on all that is no plain
    LoRA of products.
    """
    config = jsonfiles.read(folder / CONFIG)
    _check(config)
    rank = _whole(config, "r")
    alpha = _real(config, "lora_alpha", config.get("lora_alpha", 8))
    ranks, alphas = (_pattern(config, f"{key}_pattern") for key in ("rank", "alpha"))
    lows = {}
    for name, (a_RI, b_OR) in _matrices(folder).items():
        said = _matched(ranks, name, rank)
        if not len(a_RI) == b_OR.shape[1] == said:
            raise UserError(
                f"module {name!r} of {folder} must have the rank of {CONFIG}, {said}; "
                f"got A {list(a_RI.shape)} and B {list(b_OR.shape)}."
            )
        one = _real(config, "alpha_pattern", _matched(alphas, name, alpha))
        lows[name] = Low(a_RI, b_OR, one)
    return Adapter(
        lows=lows,
        rank=rank,
        alpha=alpha,
        root=bool(config.get("use_rslora")),
        dropout=_real(config, "lora_dropout", config.get("lora_dropout") or 0),
        is_turned=bool(config.get("fan_in_fan_out")),
        base=str(config.get("base_model_name_or_path") or ""),
    )


def _odd(adapter: Adapter) -> dict[str, tuple[int, float]]:
    """Return rank and alpha of modules with others than the adapter's, by pattern.

    A pattern is a name within layers where they are alike in all of them.
    """
    usual = (adapter.rank, adapter.alpha)
    groups: dict[str, dict[str, tuple]] = {}
    for name, low in adapter.lows.items():
        here = groups.setdefault(_within(name), {})
        here[name] = (len(low.a_RI), low.alpha)
    found = {}
    for within, here in groups.items():
        alike = len(set(here.values())) == 1
        for name, pair in here.items():
            if pair != usual:
                found[within if alike else name] = pair
    return found


def _check(config: dict[str, Any]) -> None:
    """Raise UserError on a config that says more than a plain LoRA of products."""
    if config.get("peft_type") != "LORA":
        raise UserError(
            f"{CONFIG}'s peft_type must be LORA; got {config.get('peft_type')!r}."
        )
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise UserError(
            f"{CONFIG}'s task_type must be CAUSAL_LM; got {config['task_type']!r}."
        )
    if config.get("bias", "none") != "none":
        raise UserError(
            f"{CONFIG}'s bias must be none; got {config['bias']!r}. Biases of the "
            "base that trained are no update of low rank."
        )
    start = config.get("init_lora_weights")
    if start not in STARTS:
        raise UserError(
            f"{CONFIG}'s init_lora_weights must leave the base's weights as they are; "
            f"got {start!r}. Convert it by peft's save_pretrained with "
            "path_initial_model_for_weight_conversion."
        )
    for key, why in REFUSED.items():
        if config.get(key):
            raise UserError(f"{CONFIG} must not have {key}; got {config[key]!r}. {why}")
    known = {*HANDLED, *IGNORED, *REFUSED}
    for key, value in config.items():
        if key not in known and value:
            raise unknown(f"a key of {CONFIG}", key, known)


def _matrices(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return A and B of each module, float32. Raises UserError on anything besides."""
    file = folder / WEIGHTS
    if not file.is_file():
        is_pickle = (folder / PICKLE).exists()
        got = (
            f"only {PICKLE}, which runs code when it is read," if is_pickle else "none"
        )
        raise UserError(f"an adapter must have {WEIGHTS}; got {got} in {folder}.")
    found = Tensors(folder, header.read(file))
    pairs: dict[str, dict[str, np.ndarray]] = {}
    for name, info in found.infos.items():
        match = NAME.fullmatch(name)
        is_long = len(name) > MOST_LETTERS  # what patterns are matched with
        if not match or len(info.shape) != 2 or is_long:
            raise UserError(
                "an adapter must hold A and B of products alone; got "
                f"{name[:MOST_LETTERS]!r} of shape {list(info.shape)} in {file}."
            )
        pairs.setdefault(match[1], {})[match[2]] = np.array(
            found.read(name), np.float32
        )
    for name, pair in pairs.items():
        if len(pair) != 2:
            raise UserError(
                f"module {name!r} of {file} must have both A and B; got "
                f"{', '.join(pair)} alone."
            )
    if not pairs:
        raise UserError(f"an adapter must have a module; got none in {file}.")
    return {name: (pair["A"], pair["B"]) for name, pair in pairs.items()}


def _matched(pattern: dict, name: str, default):
    """Return what the first key of a pattern that ends a module's name says."""
    for key, value in pattern.items():
        patterns.compiled(key, f"{CONFIG}'s patterns", most=MOST_REPEATS)
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def _targets(names: list[str], known: list[str]) -> list[str]:
    """Return the shortest ends of names that find these of the known and no others."""
    wanted = set(names)
    for depth in (1, None):
        ends = sorted({_end(name, depth) for name in names})
        found = {n for n in known if any(f".{n}".endswith(f".{end}") for end in ends)}
        if found == wanted:
            return ends
    return sorted(names)


def _end(name: str, depth: int | None) -> str:
    return name.rpartition(".")[2] if depth else _within(name)


def _within(name: str) -> str:
    """Return a module's name within its layer."""
    return re.split(r"\.\d+\.", name, maxsplit=1)[-1]


def _whole(config: dict, key: str) -> int:
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise UserError(f"{CONFIG}'s {key} must be a whole number >= 1; got {value!r}.")
    return value


def _real(config: dict, key: str, value) -> float:
    if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
        raise UserError(f"{CONFIG}'s {key} must be a number >= 0; got {value!r}.")
    return float(value)


def _pattern(config: dict, key: str) -> dict:
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise UserError(f"{CONFIG}'s {key} must be an object; got {value!r}.")
    return value


def _number(value: float) -> int | float:
    """Return a whole number as one: so people write alpha."""
    return int(value) if value == int(value) else value
