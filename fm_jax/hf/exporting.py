"""A run of ours becomes a checkpoint folder of theirs."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from fm_jax import checkpoints, configfile, trees
from fm_jax import config as configs
from fm_jax.checkpoints import Checkpoints
from fm_jax.errors import UserError, unknown
from fm_jax.finetune import weights
from fm_jax.finetune.answers import Answers
from fm_jax.hf import (
    carried,
    convert,
    families,
    fields,
    mapping,
    shards,
    theirs,
    vocabulary,
    whole,
)
from fm_jax.hf import verify as verifying
from fm_jax.hf.carried import Origin
from fm_jax.hf.family import Family
from fm_jax.hf.pieces import Held, Reader
from fm_jax.models.config import ModelConfig
from fm_jax.runs import Run
from fm_jax.tokenizers import load as tokenizers
from fm_jax.tokenizers import template
from fm_jax.tokenizers.protocol import Tokenizer

KINDS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def run(
    path: Path,
    out: Path,
    *,
    step: str,
    family: str,
    dtype: str,
    max_shard_size: str,
    verify: bool,
    say: Callable[[str], None],
) -> bool:
    """Write a step of a run as the folder `out`; return whether it calculates the same.

    That is seen with `verify` alone, by both models on the same prompts: False where
    they differ by more than rounding. Raises UserError as `choose` and `write` do.
    """
    if verify:
        theirs.require("--verify")
    chosen = choose(path, step=step, family=family)
    say(f"Exporting step {chosen.step} of {path} as {chosen.family.name}")
    found = {}

    def then(folder: Path) -> None:
        if verify:
            found.update(_verified(chosen, folder, dtype))

    write(chosen, out, dtype=dtype, max_shard_size=max_shard_size, say=say, then=then)
    for line in verifying.lines(found):
        say(line)
    return verifying.agrees(found)


@dataclasses.dataclass(frozen=True)
class Chosen:
    """One step of a run, which part of it is evaluated, and what it is written as.

    origin: None where the run was trained here, or goes to another family than it came
    from. is_part: whether its checkpoint holds only what trained. has_trained: whether
    the weights are others than those that came.
    """

    run: Run
    model: ModelConfig
    tokenizer: Tokenizer
    step: int
    part: str
    family: Family
    origin: Origin | None
    is_part: bool
    has_trained: bool


def choose(path: Path, *, step: str, family: str) -> Chosen:
    """Return what of a run is to be exported; reads no weight.

    step: as `fm generate` takes it. family: "" for the run's own, else the first that
    can hold its model. Raises UserError when there is no such run, step or family, and
    where the run's answers are not text.
    """
    if family and family not in families.FAMILIES:
        raise unknown("--family", family, families.FAMILIES)
    run = Run(path)
    record = configfile.read_run(run)
    if not run.checkpoints.is_dir():
        raise UserError(f"a run must have a checkpoint to read; got none in {path}.")
    config = configs.check(record["config"])
    answers = Answers.from_record(record)
    if answers.labels and not answers.label_ids:
        raise UserError(
            f"a run must answer by its vocabulary to be exported; got {path}, whose "
            f"{len(answers.labels)} labels have a head of their own, for which a "
            "language model has no place. Train with data.label_words, or export the "
            "run that it began from."
        )
    size = record["resolved"]["model"]["vocab_size"]
    model = dataclasses.replace(config.model, vocab_size=size)
    saved = Checkpoints(run.checkpoints)
    try:
        chosen = checkpoints.choose(saved, step, path)
    finally:
        saved.close()
    origin = carried.origin_of(run)
    if origin and family not in ("", origin.family):
        origin = None
    if origin:
        found = _own_family(origin, model)
    elif family:
        found = families.FAMILIES[family]
        families.write(found, model, "float32")  # refuses what does not fit
    else:
        found = families.fitting(model)
    tokenizer = tokenizers.load(
        path / "tokenizer.json",
        end_token=config.data.end_token,
        end_id=record["data"].get("end_id", -1),  # older records have none
    )
    return Chosen(
        run=run,
        model=model,
        tokenizer=tokenizer,
        step=chosen,
        part="ema" if record["config"]["train"]["ema_decay"] else "params",
        family=found,
        origin=origin,
        is_part=weights.has_frozen(weights.tuning_of(config, record)),
        has_trained=chosen > 0 or record["resolved"]["init"] is not None,
    )


def write(
    chosen: Chosen,
    out: Path,
    *,
    dtype: str,
    max_shard_size: str,
    say: Callable[[str], None],
    then: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write the folder `out`: weights, config.json, and the tokenizer's files.

    dtype: of the weights; "": that which they came in, else float32. then: is called
    with the finished folder before it is put in place. Raises UserError on anything
    that would not be the same model; then nothing is left of it.
    """
    if dtype and dtype not in KINDS:
        raise unknown("--dtype", dtype, KINDS)
    max_bytes = shards.size(max_shard_size)
    entries = mapping.entries(chosen.family, chosen.model)
    names, kinds = _names(chosen, list(entries), dtype)
    if chosen.has_trained and not dtype and (lossy := {*kinds.values()} - {"F32"}):
        said = ", ".join(name for name, kind in KINDS.items() if kind in lossy)
        say(f"Rounded to {said}, as its tensors came; --dtype=float32 keeps all bits")
    files = shards.plan(convert.planned(entries, names, kinds), max_bytes)
    with whole.made(out) as folder:
        staged = folder / ".staged"
        staged.mkdir()
        reader = _reader(chosen, beside=staged)
        convert.check_shapes(reader, chosen.model)
        convert.check_own(reader, chosen.model)
        array = convert.array_of(reader, entries, names)
        shards.write(folder, files, lambda name: array(name, kinds[name]), say)
        reader.close()
        staged.rmdir()
        _write_beside(chosen, folder, dtype)
        then(folder)


def _reader(chosen: Chosen, *, beside: Path) -> Reader | Held:
    """Return what reads the weights: piece by piece, or merged in memory."""
    if not chosen.is_part:
        return Reader(chosen.run.checkpoints, chosen.step, chosen.part, beside=beside)
    params = weights.read(chosen.run.path, chosen.step)
    leaves = trees.leaves_by_path(params)
    return Held({path: np.asarray(leaf) for path, leaf in leaves.items()})


def _own_family(origin: Origin, model: ModelConfig) -> Family:
    """Return the family of an imported run, whose config.json still means its model."""
    family, said = families.read(origin.config)
    own = fields.plain(model)
    for name, value in said.items():
        if own[name] != value:
            raise UserError(
                f"{origin.folder / carried.CONFIG} must mean the run's own model; got "
                f"{name} {value!r} there and {own[name]!r} in the run. Give --family "
                "to write another config.json."
            )
    return family


def _names(
    chosen: Chosen, ours: list[str], dtype: str
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Return each tensor's names in the folder, and the dtype by name."""
    origin = chosen.origin
    names = origin.names if origin else {name: [name] for name in ours}
    every = [one for here in names.values() for one in here]
    if dtype or not origin:
        return names, dict.fromkeys(every, KINDS[dtype or "float32"])
    return names, origin.kinds


def _write_beside(chosen: Chosen, folder: Path, dtype: str) -> None:
    """Write config.json and the tokenizer's files; those that came go back as is.

    But for the chat template that a run was tuned with.
    """
    _write_named(chosen, folder, dtype)
    own = chosen.run.path / template.FILE
    if own.is_file():
        shutil.copyfile(own, folder / template.FILE)


def _write_named(chosen: Chosen, folder: Path, dtype: str) -> None:
    if chosen.origin:
        carried.copy(chosen.origin.folder, folder)
        if dtype:
            config = dict(chosen.origin.config)
            config["dtype" if "dtype" in config else "torch_dtype"] = dtype
            carried.write_json(folder / carried.CONFIG, config)
        if not any((folder / name).exists() for name in carried.TOKENIZERS):
            vocabulary.write(
                chosen.tokenizer, folder, max_length=chosen.model.max_length
            )
        return
    ids = vocabulary.write(chosen.tokenizer, folder, max_length=chosen.model.max_length)
    config = families.write(chosen.family, chosen.model, dtype or "float32")
    # Their models never train the embedding of a pad_token_id: the tokenizer says it.
    config |= {name: ids[name] for name in ("bos_token_id", "eos_token_id")}
    carried.write_json(folder / carried.CONFIG, config)


def _verified(chosen: Chosen, folder: Path, dtype: str) -> dict[str, dict[str, float]]:
    """Return how far theirs, of `folder`, is from ours; write it there too.

    Our weights are rounded as those that were written.
    """
    params = weights.read(chosen.run.path, chosen.step)
    if dtype:
        params = jax.tree.map(lambda x: x.astype(dtype).astype(x.dtype), params)
    _, text = vocabulary.sample(chosen.tokenizer)
    found = verifying.compare(
        verifying.ours(chosen.model, params),
        verifying.theirs(folder),
        verifying.prompts(chosen.model, [chosen.tokenizer.end_id, *text]),
    )
    about = {
        "run": chosen.run.path.resolve().name,
        "step": chosen.step,
        "family": chosen.family.name,
        "dtype": dtype or "as imported" if chosen.origin else dtype or "float32",
    }
    verifying.write(folder, found, about)
    return found
