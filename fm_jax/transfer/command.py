"""What fm transfer does: a base and data, given or made, then the study of them."""

import copy
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fm_jax import config as configs
from fm_jax import configfile
from fm_jax.errors import UserError, unknown
from fm_jax.hf import adopt
from fm_jax.prepare import styles, toys
from fm_jax.runs import Run
from fm_jax.transfer import page, study

BASE = configfile.BASE.parent / "toy_pretrain.py"
# Of the toy: its world, documents to pretrain on, and those of a seed's files.
WORLD, NUM_PRETRAIN, NUM_TRAIN, NUM_HELD_OUT = 0, 40_000, 400, 500
FILES = ("train", "valid", "id", "ood")


def transfer(raw: dict, flags: Any, argv: list[str]) -> None:
    """Make a study's runs that are not done; write and print its table.

    Flags: out, methods, rates, seeds, against. Raises UserError before anything is
    made for what is wrong with them.
    """
    out = Path(flags.out).expanduser()
    methods = _methods(flags.methods, flags.against)
    rates = _rates(flags.rates)
    if flags.seeds < 1:
        raise UserError(f"--seeds must be >= 1; got {flags.seeds}.")
    _check_data(raw)
    seeds = range(flags.seeds)
    command = ["fm", *argv]
    raw = copy.deepcopy(raw)
    if raw["init"]["from"]:

        def data_of(seed):
            return {}

        about = "the files of data.paths, the same for all seeds"
    else:
        data_of = _toy(raw, out, methods, seeds)
        about = "toy styles, drawn anew for each seed, training and held-out files"
    planned = study.plan(
        raw, out / "runs", methods=methods, rates=rates, seeds=seeds, data_of=data_of
    )
    names = _names(planned[0].raw)
    for one in planned:
        configs.check(one.raw)
    _say(
        f"{len(planned)} runs of {len(methods)} methods, {len(rates)} rates and "
        f"{len(seeds)} seeds in {out}"
    )
    found = study.run(
        planned,
        names=names,
        train=lambda raw, folder: _train(raw, folder, command),
        say=_say,
    )
    chosen = study.choose(found, names[0])
    made = page.summary(chosen, names=names, rates=rates, against=flags.against)
    missing = [one.name for one in planned if not any(_is_of(f, one) for f in found)]
    lines = page.lines(
        made,
        title=f"Transfer from {raw['init']['from']}",
        about=[
            f"- base: {raw['init']['from']}",
            f"- data: {about}; {', '.join(names[1:]) or 'nothing'} beside "
            f"{names[0]}, which chooses the rates",
            f"- rates: {', '.join(f'{rate:g}' for rate in rates)}, the same for every "
            "method that has one",
            f"- seeds: {len(seeds)}, of the data's order, the head and the adapters",
            *(f"- diverged: {name}" for name in missing),
        ],
    )
    made["runs"] = [vars(one) for one in found]
    made |= {"base": raw["init"]["from"], "diverged": missing, "command": command}
    _write(out, "transfer.json", json.dumps(made, indent=1) + "\n")
    _write(out, "transfer.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


def _methods(given: str, against: str) -> tuple[str, ...]:
    """Return the methods of a list with commas, each once."""
    names = tuple(dict.fromkeys(name for name in given.split(",") if name))
    for name in names:
        if name not in study.METHODS:
            raise unknown("--methods", name, study.METHODS)
    if not names:
        raise UserError(f"--methods must name one; got {given!r}.")
    if against not in names:
        raise UserError(
            f"--against must be one of --methods={','.join(names)}; got {against!r}."
        )
    return names


def _rates(given: str) -> tuple[float, ...]:
    """Return the rates of a list with commas, lowest first, each once."""
    try:
        rates = sorted({float(text) for text in given.split(",") if text})
    except ValueError:
        rates = []
    if not rates or not all(0 < rate < math.inf for rate in rates):
        raise UserError(
            "--rates must be learning rates above 0 with commas between; got "
            f"{given!r}. Example: --rates=3e-4,1e-3,3e-3"
        )
    return tuple(rates)


def _check_data(raw: dict) -> None:
    """Raise UserError where no study can be made of the user's data."""
    data, has_base = raw["data"], bool(raw["init"]["from"])
    for key in ("paths", "eval_paths"):
        if has_base and not data[key]:
            raise UserError(
                f"config.data.{key} must be given with config.init.from; got none. "
                "Leave both out for a base and data of the study's own."
            )
        if data[key] and not has_base:
            raise UserError(
                f"config.data.{key} must be left out without config.init.from; got "
                f"{data[key]}. Give a base: fm train --config=configs/toy_pretrain.py."
            )
    if data["examples"] != "classify":
        raise UserError(
            f"config.data.examples must be classify; got {data['examples']!r}. Start "
            "from configs/finetune_classify.py."
        )
    names = _names(raw)
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(
            f"config.data.eval_paths must be files of different names; got {twice[0]} "
            "twice. Metrics are called after them."
        )


def _names(raw: dict) -> list[str]:
    """Return what held-out files are called in metrics: their stems."""
    return [Path(path).stem for path in raw["data"]["eval_paths"]]


def _is_of(found: study.Found, one: study.Planned) -> bool:
    same = ("method", "rate", "seed")
    return all(getattr(found, name) == getattr(one, name) for name in same)


def _toy(
    raw: dict, out: Path, methods: Sequence[str], seeds: Sequence[int]
) -> Callable[[int], Mapping]:
    """Write the toy and train its base; return what data a seed has.

    `raw` is changed in place: it begins from that base. Raises UserError before the
    base is trained where a run of the study would be refused.
    """
    base = configfile.load(str(BASE)).to_dict()
    for section, key in (("data", "cache_dir"), ("train", "compile_cache")):
        base[section][key] = raw[section][key]
    data, place = out / "data", out / "base"
    base["data"]["paths"] = (str(data / "pretrain.jsonl"),)
    draws = {seed: data / f"draw_{seed}" for seed in seeds}
    raw["init"] |= {"from": str(place), "model": True}
    raw["model"] = base["model"] | {n: raw["model"][n] for n in adopt.OWN}
    raw["data"] |= {"tokenizer": base["data"]["tokenizer"]}

    def of(seed: int) -> dict:
        files = [str(draws[seed] / f"{name}.jsonl") for name in FILES]
        return {"paths": (files[0],), "eval_paths": tuple(files[1:])}

    for method in methods:
        tried = copy.deepcopy(raw)
        tried["finetune"]["method"] = method
        tried["data"] |= of(seeds[0])
        configs.check(tried)
    for seed, folder in draws.items():
        toys.write(_drawn(seed), folder)
    toys.write({"pretrain": _rows(0, num_pretrain=NUM_PRETRAIN)["pretrain"]}, data)
    if not Run(place).is_done():
        _say(f"the base, {place}:")
        _train(base, place, ["fm", "train", f"--config={BASE}", f"--workdir={place}"])
    raw |= adopt.adopted(raw)
    return of


def _drawn(seed: int) -> dict[str, list[dict]]:
    """Return the files of one seed: none shares a document's draw with another."""
    made = _rows(2 * seed + 1, num_train=NUM_TRAIN, num_held_out=NUM_HELD_OUT)
    made["valid"] = _rows(2 * seed + 2, num_held_out=NUM_HELD_OUT)["id"]
    return {name: made[name] for name in FILES}


def _rows(draw: int, **sizes: int) -> dict[str, list[dict]]:
    none = {"num_pretrain": 0, "num_train": 0, "num_held_out": 0}
    return styles.rows(WORLD, draw=draw, spurious=styles.SPURIOUS, **none | sizes)


def _train(raw: dict, folder: Path, command: list[str]) -> None:
    from fm_jax.train import run

    run.train(configs.check(raw), folder, command)


def _write(out: Path, name: str, text: str) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"--out must be a folder that can be written; got {out} ({error.strerror})."
        ) from error


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
