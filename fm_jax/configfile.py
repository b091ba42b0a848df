"""Config files: loaded, flattened, compared, and named by a fingerprint.

A config file is Python with a `get_config()` or the `config.json` of a run. Imports no
jax.
"""

import functools
import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

from fm_jax import jsonfiles
from fm_jax.errors import UserError, unknown
from fm_jax.runs import RECORD, Run

BASE = Path(__file__).parent.parent / "configs" / "base.py"
DURATIONS = ("steps", "tokens", "epochs", "tokens_per_param")
DURATION_KEYS = tuple(f"train.{name}" for name in DURATIONS)
# What may differ when a run goes on: where and how often, how long, on which mesh, how
# a step fits its memory, which changes rounding alone, and where the run that it began
# from lies by now: which one that was, its record says.
MAY_CHANGE = (
    "checkpoint.",
    "eval.",
    "log.",
    "mesh.",
    "sample.",
    "data.cache_dir",
    "data.num_workers",
    "init.from",
    "model.remat",
    "train.accumulation",
    "train.compile_cache",
    "train.loss_chunk",
    "train.max_skips",
    *DURATION_KEYS,
)
# Keys that are younger than runs and sweeps that are named by a fingerprint, and what
# those did: at that value they are not in it, so that both can go on.
YOUNGER = {
    "model.position_offset": 0,
    "model.rope_local_theta": 0.0,
    "model.rope_fraction": 1.0,
    "model.rope_scaling": (),
    "model.qk_norm_over": "head",
    "model.attention_scale": 0.0,
    "model.attention_sinks": False,
    "model.embed_scale": 1.0,
    "model.embed_norm": False,
    "model.biases": (),
    "model.parallel_norms": 1,
    "model.num_experts": 0,
    "model.num_experts_per_token": 0,
    "model.shared_mlp_dim": 0,
    "model.expert_capacity": 0.0,
    "train.balance_loss": 0.01,
    "train.router_z_loss": 0.001,
    "train.balance_rate": 0.0,
    "data.examples": "text",
    "data.fields": (),
    "data.chat_template": "",
    "data.on_long": "error",
    "data.prompt": "{text}",
    "data.label_words": (),
    "init.model": False,
    "finetune.method": "full",
    "finetune.rules": (),
    "finetune.last_layers": 0,
    "finetune.layer_decay": 1.0,
    "finetune.unfreeze_every": 0,
    "finetune.preference": "dpo",
    "finetune.beta": 0.1,
    "lora.rank": 8,
    "lora.alpha": 16.0,
    "lora.scaling": "lora",
    "lora.dropout": 0.0,
    "lora.targets": "attention|mlp",
    "lora.base": "compute",
}


def load(path: str) -> Any:
    """Return the ConfigDict of `file.py[:variant]`, or of a run's `config.json`.

    Raises UserError when there is no such file or variant, or the file fails.
    """
    from ml_collections import config_dict

    name, _, variant = str(path).partition(":")
    file = Path(name)
    try:
        file = file / "config.json" if file.is_dir() else file
        is_there = file.is_file()
    except OSError:  # a name that no disk takes
        is_there = False
    if not is_there:
        known = sorted(str(p) for p in file.parent.glob("*.py"))
        if known:
            raise unknown("--config", name, known)
        raise UserError(f"--config must be a file; got {name!r}, which does not exist.")
    if file.suffix == ".json":
        record = _json(file)
        if not isinstance(record, dict) or not isinstance(record.get("config"), dict):
            raise UserError(
                f"--config must be a config file or a run; got {name!r}, whose JSON "
                "holds no config."
            )
        return config_dict.ConfigDict(_of_run(record, name))
    if file.suffix != ".py":
        raise UserError(f"--config must be a .py or .json file; got {name!r}.")
    module_spec = importlib.util.spec_from_file_location(f"config_{file.stem}", file)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        found = module.get_config(variant) if variant else module.get_config()
    except UserError:
        raise
    except Exception as error:
        # A KeyError shows its message in quotes.
        reason = error.args[0] if isinstance(error, KeyError) and error.args else error
        raise UserError(
            f"--config must be a file whose get_config({variant and repr(variant)}) "
            f"returns a ConfigDict; got {path!r}, which raised "
            f"{type(error).__name__}: {reason}"
        ) from error
    if not isinstance(found, config_dict.ConfigDict):
        raise UserError(
            f"get_config must return a ConfigDict; got {type(found)} from {path!r}."
        )
    return found


def load_base() -> dict:
    """Return the nested dict of every key's default."""
    return {name: dict(keys) for name, keys in _sections(str(BASE)).items()}


@functools.cache  # a sweep's file asks for it with each line
def _sections(path: str) -> dict:
    return load(path).to_dict()


def read_run(run: Run) -> dict[str, Any]:
    """Return config.json of a run, what is newer than the run at its default.

    Raises UserError when there is none to read.
    """
    record = run.read_config()
    jsonfiles.check(record["resolved"], {"model": dict}, f"{run.path}/config.json")
    config, resolved = _filled(record["config"]), record["resolved"]
    resolved = {"run_id": run_id(run.path, config), "init": None} | resolved
    resolved["model"] = config["model"] | resolved["model"]
    return record | {"config": config, "resolved": resolved}


def run_id(path: Path, raw: dict, init: dict | None = None) -> str:
    """Return what a new run in folder `path` is called among all runs.

    init: what its record keeps of the run that it begins from.
    """
    return f"{path.resolve().name}-{fingerprint(raw | {'began': init or {}})[:8]}"


def read_json(path: Path) -> dict:
    """Return a JSON object from a file of ours; raises UserError on anything else."""
    found = _json(Path(path))
    jsonfiles.check(found, dict, str(path))
    return found


def flat(raw: dict, prefix: str = "") -> dict[str, Any]:
    """Return nested dicts as `{"section.key": value}`."""
    items: dict[str, Any] = {}
    for name, value in raw.items():
        if isinstance(value, dict):
            items |= flat(value, f"{prefix}{name}.")
        else:
            items[f"{prefix}{name}"] = value
    return items


def difference(old: dict, new: dict) -> dict[str, tuple[Any, Any]]:
    """Return `{"section.key": (old, new)}` where two nested dicts differ."""
    a, b = flat(_tupled(old)), flat(_tupled(new))
    return {
        key: (a.get(key), b.get(key))
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key)
    }


def may_change(key: str) -> bool:
    """Return whether a run may go on with another value of this key."""
    return key.startswith(MAY_CHANGE)


def fingerprint(raw: dict, *, with_duration: bool = False) -> str:
    """Return a digest of the keys that may not change.

    with_duration: also of how long and from where, which tell two new runs apart.
    """
    asked = (*DURATION_KEYS, "init.from") if with_duration else ()
    fixed = {
        key: value
        for key, value in flat(_tupled(raw)).items()
        if (not may_change(key) or key in asked)
        and not (key in YOUNGER and value == YOUNGER[key])
    }
    text = json.dumps(fixed, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _json(path: Path) -> Any:
    try:
        return jsonfiles.parse(jsonfiles.text(path))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} must be a JSON file written by a run; got {error}."
        ) from error


def _of_run(record: dict, name: str) -> dict:
    """Return the config of JSON; of a run's, which may be a stranger's, with care."""
    if record.keys() >= RECORD:
        return of_stranger(record["config"], name)
    return _named(record["config"], name)


def of_stranger(config: dict, name: str) -> dict:
    """Return a config that the file `name` holds as JSON, with keys that there can be.

    Programs that are kept are run, so where they are kept is not for it to say; that
    none are kept is. Raises UserError on keys that are no names.
    """
    config = _named(config, name)
    train = config.get("train")
    if isinstance(train, dict) and train["compile_cache"]:
        train["compile_cache"] = own_cache()
    return config


def _named(config: dict, name: str) -> dict:
    for section, keys in config.items():
        for key in [section, *(keys if isinstance(keys, dict) else ())]:
            if not key.isidentifier():
                raise UserError(
                    f"a key of {name} must be a name; got {key[:40]!r}. See "
                    "configs/base.py."
                )
    return _filled(config)


def own_cache() -> str:
    """Return where this installation keeps compiled programs unless told otherwise."""
    return load_base()["train"]["compile_cache"]


def _filled(config: dict) -> dict:
    """Return a written config with the keys that it lacks at their defaults."""
    base = load_base()
    return _tupled(
        {
            name: base.get(name, {}) | keys if isinstance(keys, dict) else keys
            for name, keys in (base | config).items()
        }
    )


def _tupled(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tupled(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_tupled(inner) for inner in value)
    return value
