"""Before the first step: may this run begin here, and what it says of itself."""

import dataclasses
import shutil
from pathlib import Path

import jax

from fm_jax import configfile, machine, trees
from fm_jax.checkpoints import Checkpoints, size_bytes
from fm_jax.errors import UserError
from fm_jax.finetune import weights
from fm_jax.models import counts
from fm_jax.prepare import opened
from fm_jax.prepare.opened import Data
from fm_jax.runs import Run
from fm_jax.train import aims, feeds
from fm_jax.train.beginning import Beginning
from fm_jax.train.compose import Parts


def earlier_record(run: Run, raw: dict) -> dict | None:
    """Return config.json of the run that is to go on, or None in a new folder.

    Raises UserError when the folder holds something else, or a run begun with other
    values of keys that may not change.
    """
    run.check_free()
    if not run.exists():
        return None
    record = configfile.read_run(run)
    changed = {
        key: pair
        for key, pair in configfile.difference(record["config"], raw).items()
        # A folder may have moved; a random beginning is no folder.
        if not configfile.may_change(key) or (key == "init.from" and not all(pair))
    }
    if changed:
        shown = "; ".join(
            f"{key}: {old!r} there, {new!r} here" for key, (old, new) in changed.items()
        )
        raise UserError(
            f"--workdir must be this run's; got {run.path}, begun with other values: "
            f"{shown}. Choose another --workdir."
        )
    return record


def identity(raw: dict, workdir: Path) -> dict[str, object]:
    """Return what must be the same in all processes of one run."""
    return configfile.flat(raw) | {
        "--workdir": str(workdir.absolute()),
        "code": machine.code_digest(),
        "commit": machine.git_state().get("commit", ""),
        **{f"version of {name}": v for name, v in machine.versions().items()},
    }


def data_record(data: Data) -> dict[str, str | int | list]:
    """Return digests of the tokenizer and of both splits' text, and the end id.

    Of examples also what stands before a text and ends an answer, and the labels.
    """
    told = {
        "tokenizer": data.tokenizer.fingerprint,
        "end_id": data.tokenizer.end_id,
        "train_store": data.train.name,
        "eval_store": data.eval.name,
    }
    if data.kind != "text":
        told["begin_ids"] = list(data.begin_ids)
        told["end_ids"] = list(data.end_ids)
        told |= aims.answers_of(data).to_json()
    return told


def refuse_other_data(run: Run, old: dict, new: dict) -> None:
    """Raise UserError when the data is not what the run was begun with."""
    changed = [name for name in new if old.get(name) != new[name]]
    if changed:
        raise UserError(
            f"the data must be what {run.path} was begun with; got another "
            f"{', '.join(changed)}. Restore the files, or choose another --workdir."
        )


def saved_steps(run: Run) -> list[int]:
    """Return the steps of a run's checkpoints; all processes ask together."""
    if not run.checkpoints.is_dir():
        return []
    saved = Checkpoints(run.checkpoints)
    try:
        return saved.steps()
    finally:
        saved.close()


def refuse_shorter(run: Run, num_steps: int, saved: list[int]) -> None:
    """Raise UserError when a checkpoint lies beyond the steps that are asked for."""
    if saved and saved[-1] > num_steps:
        raise UserError(
            f"the duration must reach the last checkpoint; got {num_steps} steps, and "
            f"{run.path} has {saved[-1]}. Raise it, or choose another --workdir."
        )


def refuse_no_steps(num_steps: int, begins: Beginning | None) -> None:
    """Raise UserError when a run that goes on from another's step ends there."""
    if begins and num_steps and begins.start >= num_steps:
        raise UserError(
            f"the duration must go beyond config.init.from, step {begins.start} of "
            f"{begins.path}; got {num_steps} steps, counted from that run's first. "
            "Raise it, or set --config.init.optimizer=False to count from 0."
        )


def refuse_no_gpu(promised: str) -> None:
    """Raise UserError when there are no GPUs where something promised them.

    jax itself goes on with the CPU.
    """
    if promised and jax.default_backend() == "cpu":
        raise UserError(
            f"a GPU must be visible where {promised} says that there is one; jax sees "
            "a CPU alone. See what nvidia-smi lists and that jax was installed with "
            "FM_ACCELERATOR=cuda, or set JAX_PLATFORMS=cpu to train on the CPU."
        )


def require_room(path: Path, needed: int) -> None:
    """Raise UserError when the disk under `path` cannot hold twice `needed` bytes."""
    folder = path.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < 2 * needed:
        raise UserError(
            "the disk under --workdir must have room for two checkpoints "
            f"({2 * needed / 1e6:,.0f} MB); got {free / 1e6:,.0f} MB free at {folder}."
        )


def record(
    parts: Parts,
    data: Data,
    command: list[str],
    earlier: dict | None,
    path: Path,
    init: dict | None,
) -> dict:
    """Return config.json: every key, what follows from them, and each start so far.

    path: the run's folder; init: what it keeps of the run that it began from.
    """
    raw = parts.config.raw
    run_id = configfile.run_id(path, raw, init)
    start = {
        **machine.started(command),
        "devices": [str(device) for device in jax.devices()],
        "mesh": dict(parts.layout.mesh.shape),
    }
    if earlier:
        run_id = earlier["resolved"]["run_id"]  # rows of the table bear it
        start["changed"] = configfile.difference(earlier["config"], raw)
    return {
        "config": raw,
        "fingerprint": configfile.fingerprint(raw),
        "changed_from_base": configfile.difference(configfile.load_base(), raw),
        "resolved": {
            "run_id": run_id,
            "init": init,
            "steps": parts.num_steps,
            "model": dataclasses.asdict(parts.config.model),
            "params": vars(counts.params(parts.config.model)),
            "trained_params": num_trained(parts),
            "tokens_per_step": parts.tokens_per_step,
            "flops_per_token": parts.flops_per_token,
            "flops_per_token_6n": counts.flops_per_token_6n(parts.config.model),
        },
        "data": data_record(data),
        "history": [*(earlier["history"] if earlier else []), start],
    }


def plan(parts: Parts, data: Data, run: Run) -> list[str]:
    """Return lines that say what is about to happen."""
    config = parts.config
    params = counts.params(config.model)
    tokens = feeds.tokens(data, parts.num_steps, config.train.batch_size)
    full = parts.num_steps * config.train.batch_size * config.data.max_length
    places = "tokens"
    if tokens < full:
        places = f"places, {tokens / full:.1%} of them tokens,"
    corpus = data.train.num_targets
    held_out = data.eval
    rate = data.chain.entropy_rate() if data.chain else None
    known = "" if rate is None else f"; entropy rate {rate:.4f} nats/token"
    plan = (
        f"plan    {parts.num_steps:,} steps of {config.train.batch_size} x "
        f"{config.data.max_length} {places} = {tokens:,.0f} tokens "
        f"({tokens / corpus:.2f} epochs, {tokens / params.total:.2f} per parameter), "
        f"{tokens * parts.flops_per_token:.2e} FLOPs"
    )
    return [
        f"model   {params.total:,} parameters ({params.non_embedding:,} without "
        f"embedding and head), {config.model.vocab_size:,} ids",
        f"data    {corpus:,} tokens to train on, {held_out.num_targets:,} held out "
        f"({held_out.num_bytes:,} bytes){known}",
        *([plan] if parts.num_steps else []),
        *_tuning(parts),
        f"memory  {size_bytes(parts.abstract) / 1e6:,.0f} MB of parameters and "
        f"optimizer, over mesh {dict(parts.layout.mesh.shape)}",
        *_mixture(parts, data),
        *([f"kernel  attention: {parts.attention()}"] if parts.num_steps else []),
        *(f"flags   {name}={said}" for name, said in machine.xla_flags().items()),
        f"run     {run.path}",
    ]


def num_trained(parts: Parts) -> int:
    """Return how many parameters a step changes."""
    return sum(leaf.size for leaf in jax.tree.leaves(parts.abstract.params))


def _tuning(parts: Parts) -> list[str]:
    """Return what trains, where that is not everything."""
    if not parts.num_steps:
        return [f"trains  nothing: {parts.config.finetune.method}"]
    if not weights.has_frozen(parts.tuning):
        return []
    first, *rest = parts.tuning.lines()
    return [first.replace("trains ", "trains  ", 1), *(f"        {r}" for r in rest)]


def _mixture(parts: Parts, data: Data) -> list[str]:
    """Return the share and epochs of each store, where several are mixed."""
    if len(data.train.windows) == 1:
        return []
    size = parts.config.train.batch_size
    return list(opened.repeats(data, parts.num_steps, size))


def decayed(parts: Parts) -> list[str]:
    """Return the paths of the parameters under weight decay."""
    by_path = trees.leaves_by_path(parts.decay_mask)
    return [name for name, decays in by_path.items() if decays]
