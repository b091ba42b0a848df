"""A run of LoRA becomes an adapter folder of theirs, and such a folder a run."""

import math
import re
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from fm_jax import config as configs
from fm_jax import configfile, machine, trees
from fm_jax.checkpoints import Checkpoints, abstract_of
from fm_jax.errors import UserError
from fm_jax.finetune import weights
from fm_jax.hf import adapters, adopt, exporting, leaves, lowrank, whole
from fm_jax.hf.adapters import Adapter
from fm_jax.hf.exporting import Chosen
from fm_jax.hf.lowrank import Low, Module, Update
from fm_jax.runs import Run

STEP = 0  # of what came: no step of ours has been taken
TREE = "lora/"  # of the parameters that train


def is_lora(path: Path) -> bool:
    """Return whether a run trains updates of low rank; raises UserError on no run."""
    record = configfile.read_run(Run(path))
    return record["config"]["finetune"]["method"] == "lora"


def export(
    path: Path, out: Path, *, step: str, family: str, say: Callable[[str], None]
) -> None:
    """Write the updates of a run of LoRA as the adapter folder `out`, float32.

    Their base is the run that this one began from. Raises UserError as
    `exporting.choose` does, and where more than updates trained.
    """
    chosen = exporting.choose(path, step=step, family=family)
    record = configfile.read_run(chosen.run)
    config = configs.check(record["config"])
    if config.lora.base == "int8":
        say("It trained beside a base in eight bits, and will stand beside a whole one")
    known = lowrank.modules(chosen.family, chosen.model)
    adapter = Adapter(
        lows=lowrank.theirs(
            _updates(chosen, config, record),
            known,
            alpha=config.lora.alpha,
            root=config.lora.scaling == "rslora",
        ),
        rank=config.lora.rank,
        alpha=config.lora.alpha,
        root=config.lora.scaling == "rslora",
        dropout=config.lora.dropout,
        is_turned=any(module.is_turned for module in known.values()),
        base=_base_name(chosen.run, record),
    )
    with whole.made(out) as folder:
        adapters.write(folder, adapter, list(known))
        adopt.carry_template(chosen.run.path, folder)
    say(
        f"Exported step {chosen.step} of {path} as an adapter of {chosen.family.name}: "
        f"{len(adapter.lows)} modules, rank {adapter.rank}, for {adapter.base}"
    )


def bring(
    folder: Path,
    base: Path,
    out: Path,
    *,
    command: list[str],
    say: Callable[[str], None],
) -> Run:
    """Make the run `out` of an adapter folder and the run that it is an adapter of.

    It is one of LoRA at step 0, from which another can begin. Raises UserError on all
    that such a run does not hold; then nothing is left of it.
    """
    adapter = adapters.read(folder)
    if adopt.is_checkpoint(base):
        raise UserError(
            f"--base must be a run; got a checkpoint of theirs, {base}. Import it "
            f"first: fm import --hf={base} --out=RUN"
        )
    chosen = exporting.choose(base, step="latest", family="")
    known = lowrank.modules(chosen.family, chosen.model)
    lows = _checked(adapter, known, chosen.family)
    shapes = leaves.shapes(chosen.model)
    updates = lowrank.ours(lows, known, shapes, rank=adapter.rank)
    record = _record(chosen, adapter, updates, folder, out, command)
    with whole.made(out) as beside:
        run = Run(beside)
        run.write("tokenizer.json", (base / "tokenizer.json").read_text("utf-8"))
        adopt.carry(base, beside)
        adopt.carry_template(folder, beside)
        saved = Checkpoints(run.checkpoints, writes=True)
        saved.save(STEP, {"params": _tree(updates)}, None)
        saved.close()
        run.write("DONE", f"{STEP}\n")
        run.write_config(record)
    say(f"Brought an adapter of {len(lows)} modules, rank {adapter.rank}")
    return Run(out)


def _updates(chosen: Chosen, config, record: dict) -> dict[str, Update]:
    """Return the updates of a run by their kernels' paths."""
    tuning = weights.tuning_of(config, record)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    places = jax.tree.map(lambda leaf: place, tuning.abstract)
    saved = Checkpoints(chosen.run.checkpoints)
    try:
        part = {chosen.part: abstract_of(tuning.abstract, places)}
        trained = saved.restore(chosen.step, part)[chosen.part]
    finally:
        saved.close()
    found = trees.leaves_by_path(trained)
    others = [path for path in found if not path.startswith(TREE)]
    if others:
        raise UserError(
            f"a run's updates must be all that trained, to be an adapter; got "
            f"{', '.join(others[:3])} besides. Give --merge_lora for the whole model."
        )
    updates = {}
    for path in found:
        at = path.removeprefix(TREE).rpartition("/")[0]
        a, b = (np.asarray(found[f"{TREE}{at}/{name}"]) for name in "ab")
        updates[f"{at}/kernel"] = Update(a, b, chosen.model.num_layers - len(a))
    return updates


def _tree(updates: dict[str, Update]) -> dict:
    """Return updates as what trains of a run of LoRA."""
    return trees.nested(
        {
            TREE + path.removesuffix("kernel") + name: getattr(update, name)
            for path, update in updates.items()
            for name in "ab"
        }
    )


def _base_name(run: Run, record: dict) -> str:
    """Return where a run's base came from: a folder of theirs, or a run."""
    path, _ = weights.base_of(run, record)
    first = configfile.read_run(Run(path))["history"][0]
    return first.get("imported", str(path))


def _checked(adapter: Adapter, known: dict[str, Module], family) -> dict[str, Low]:
    """Return an adapter's updates by the names that a family's modules have here.

    Raises UserError on a module that has none here, is of another size, or is scaled
    otherwise than the others.
    """
    found = {}
    usual = adapter.scale(adapter.alpha, adapter.rank)
    for given, low in adapter.lows.items():
        names = [n for n in (given, f"{family.prefix}{given}") if n in known]
        if not names:
            raise UserError(
                f"an adapter must be of products in attention and MLPs of "
                f"{family.name}; got module {given!r}. Embeddings, heads and experts "
                "have no update here."
            )
        module = known[names[0]]
        shape = (len(low.b_OR), low.a_RI.shape[1])
        wanted = (sum(map(len, module.rows)), len(module.columns))
        if shape != wanted:
            raise UserError(
                f"module {given!r} must have the sizes of the base, {wanted[1]} in and "
                f"{wanted[0]} out; got {shape[1]} and {shape[0]}. Give its own --base."
            )
        scale = adapter.scale(low.alpha, len(low.a_RI))
        if not math.isclose(scale, usual, rel_tol=1e-6):
            raise UserError(
                f"an adapter's modules must have one scale, {usual:g}; got {scale:g} "
                f"for {given!r}."
            )
        found[names[0]] = low
    return found


def _record(chosen: Chosen, adapter: Adapter, updates, folder, out, command) -> dict:
    """Return config.json of the run: its base's, but for what trains and its base."""
    base = configfile.read_run(chosen.run)
    raw = {name: dict(section) for name, section in base["config"].items()}
    start = f"{chosen.run.path.absolute()}@{chosen.step}"
    plain = configfile.load_base()
    raw["init"] = plain["init"] | {"from": start, "model": True}
    first = next(iter(updates.values())).first
    raw["finetune"] = plain["finetune"] | {
        "method": "lora",
        "last_layers": chosen.model.num_layers - first if first else 0,
    }
    raw["lora"] = plain["lora"] | {
        "rank": adapter.rank,
        "alpha": adapter.alpha,
        "scaling": "rslora" if adapter.root else "lora",
        "dropout": adapter.dropout,
    }
    raw["train"]["ema_decay"] = 0.0
    raw["lora"]["targets"] = _targets(updates, chosen, plain["lora"]["targets"])
    configs.check(raw)
    resolved = base["resolved"]
    init = {
        "path": str(chosen.run.path.absolute()),
        "run_id": resolved["run_id"],
        "step": chosen.step,
        "tokens": 0.0,
        "with_optimizer": False,
    }
    return {
        "config": raw,
        "fingerprint": configfile.fingerprint(raw),
        "changed_from_base": configfile.difference(plain, raw),
        "resolved": resolved
        | {
            "run_id": configfile.run_id(out, raw, init),
            "init": init,
            "steps": STEP,
        },
        "data": base["data"] | {"train_store": "", "eval_store": ""},
        "history": [
            {
                **machine.started(command),
                "devices": [],
                "mesh": {},
                "imported": str(folder.absolute()),
            }
        ],
    }


def _targets(updates: dict[str, Update], chosen: Chosen, usual: str) -> str:
    """Return a pattern that finds these kernels of a model and no others."""
    able = [p for p in leaves.leaves(chosen.model) if lowrank.is_able(p)]
    if {p for p in able if re.search(usual, p)} == set(updates):
        return usual
    inner = [p.removeprefix("blocks/").removesuffix("/kernel") for p in sorted(updates)]
    return f"^blocks/({'|'.join(inner)})/kernel$"
