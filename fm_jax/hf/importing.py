"""A checkpoint folder of theirs becomes a run of ours."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from fm_jax import config as configs
from fm_jax import configfile, machine
from fm_jax.errors import UserError
from fm_jax.hf import carried, convert, described, mapping, tensors, whole
from fm_jax.hf.carried import Origin
from fm_jax.hf.described import Described
from fm_jax.models import counts
from fm_jax.runs import Run

STEP = 0  # of the weights: no step of ours has been taken


def bring(
    folder: Path,
    out: Path,
    *,
    tokenizer: str,
    command: list[str],
    say: Callable[[str], None],
) -> Run:
    """Make the run `out` of a checkpoint folder; return it.

    tokenizer: a tokenizer's file, or bytes, where the folder's is not to be used.
    Raises UserError on anything that would not be the same model in the run; then
    nothing is left of it.
    """
    found = tensors.open_folder(folder)
    said = described.read(folder, tokenizer)
    theirs, family, text = said.theirs, said.family, said.tokenizer
    raw = _raw(said, tokenizer, out)
    model = configs.check(raw).model
    if model.vocab_size < text.vocab_size:
        raise UserError(
            f"the model's vocabulary must hold the tokenizer's ids; got "
            f"{model.vocab_size} for {text.vocab_size} ids. Give another --tokenizer."
        )
    entries = mapping.entries(family, model)
    names = convert.match(found, family, entries)
    with whole.made(out) as beside:
        run = Run(beside)
        kept = beside / "hf"
        # Beside another tokenizer the folder's files of its own would be wrong.
        carried.copy(folder, kept, but=carried.TEXTS if tokenizer else ())
        kinds = {one: found.infos[one].kind for here in names.values() for one in here}
        carried.keep(Origin(kept, family.name, theirs, names, kinds))
        run.write("tokenizer.json", text.to_json())
        convert.bring(
            found, entries, names, model, into=run.checkpoints, step=STEP, say=say
        )
        run.write("DONE", f"{STEP}\n")
        run.write_config(_record(raw, model, text, folder, theirs, out, command))
    left = len(found.infos) - len(kinds)
    if left:
        say(f"Left out {left} tensors that {family.name} makes by itself")
    return Run(out)


def _raw(said: Described, given: str, out: Path) -> dict:
    """Return every key of the run's config: the base's, but for model and tokenizer.

    With it a run can be trained that begins from this one.
    """
    raw = configfile.load_base()
    raw["model"] = said.model()
    raw["train"]["steps"] = 1  # a duration must be set; nothing is trained here
    file = str(out.absolute() / "tokenizer.json")
    raw["data"]["tokenizer"] = "bytes" if given == "bytes" else file
    raw["data"]["end_token"] = said.end_token
    length = raw["model"]["max_length"]
    raw["data"]["max_length"] = min(raw["data"]["max_length"], length)
    return raw


def _record(raw, model, text, folder: Path, theirs: dict, out: Path, command) -> dict:
    """Return config.json of the run, as training writes it."""
    length = raw["data"]["max_length"]
    return {
        "config": raw,
        "fingerprint": configfile.fingerprint(raw),
        "changed_from_base": configfile.difference(configfile.load_base(), raw),
        "resolved": {
            "run_id": configfile.run_id(out, raw),
            "init": None,
            "steps": STEP,
            "model": dataclasses.asdict(model),
            "params": vars(counts.params(model)),
            "tokens_per_step": 0,
            "flops_per_token": counts.flops_per_token(model, length),
            "flops_per_token_6n": counts.flops_per_token_6n(model),
        },
        "data": {
            "tokenizer": text.fingerprint,
            "end_id": text.end_id,
            "begin_id": carried.special_id(folder, theirs, "bos_token_id"),
            "train_store": "",
            "eval_store": "",
        },
        "history": [
            {
                **machine.started(command),
                "devices": [],
                "mesh": {},
                "imported": str(folder.absolute()),
            }
        ],
    }
