"""A run read back: its config, its tokenizer, its weights."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

from fm_jax import config as configs
from fm_jax import configfile, jsonfiles, meshes, sharding
from fm_jax.checkpoints import Checkpoints, choose
from fm_jax.errors import UserError
from fm_jax.evaluation import likelihood
from fm_jax.finetune import answers as asked
from fm_jax.finetune import weights
from fm_jax.finetune.answers import Answers
from fm_jax.hf import carried
from fm_jax.models.zoo import Model
from fm_jax.prepare import opened
from fm_jax.runs import Run
from fm_jax.tokenizers import load as tokenizers
from fm_jax.tokenizers.jsonfile import JsonTokenizer
from fm_jax.tokenizers.protocol import Tokenizer
from fm_jax.train import aims, compose, feeds, tuned


@dataclasses.dataclass(frozen=True)
class Restored:
    """The weights of one step of a run, on the mesh of `layout`.

    `params` are the averaged weights where the run keeps an average. `begin_ids` stand
    before each text that the model is given, `end_ids` end one. A model that was
    fine-tuned to classify has its head, whose logits are of `answers.labels`.
    """

    config: configs.Config
    tokenizer: Tokenizer
    model: Model
    params: dict
    step: int
    layout: sharding.Layout
    begin_ids: tuple[int, ...]
    end_ids: tuple[int, ...]
    answers: Answers

    def prompts(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Return the ids of prompts, with what the model wants before them.

        Raises UserError on a text that the tokenizer does not take, or of no ids.
        """
        rows = self.tokenizer.encode_batch(texts)
        found = [(*self.begin_ids, *map(int, ids)) for ids in rows]
        if not all(found):
            raise UserError(
                "a prompt must not be empty, for the run's tokenizer puts nothing "
                "before a text; got ''. Give --prompt."
            )
        return found


def load(
    path: Path, step: str = "latest", *, mesh: Mapping[str, int] | None = None
) -> Restored:
    """Return the weights of a run's step: a number, `latest`, or `best` (eval/loss).

    mesh: sizes of axes to cut weights over, as in a config's mesh; by default each
    device has whole weights, whatever the run's own mesh was. Raises UserError when
    there is no such run or step, or the mesh does not fit.
    """
    run = Run(path)
    record = configfile.read_run(run)
    config = configs.check(record["config"])
    tokenizer = tokenizers.load(
        path / "tokenizer.json",
        end_token=config.data.end_token,
        end_id=record["data"].get("end_id", -1),  # older records have none
    )
    config = compose.resolve(config, tokenizer)
    if not run.checkpoints.is_dir():
        raise UserError(f"a run must have a checkpoint to read; got none in {path}.")
    # Not the run's own: it may be a stranger's, and what is kept there is run.
    compose.use_compile_cache(config.train.compile_cache and configfile.own_cache())
    answers = Answers.from_record(record)
    layout = _layout(mesh or {})
    saved = Checkpoints(run.checkpoints)
    chosen = choose(saved, step, path)
    saved.close()
    return Restored(
        config,
        tokenizer,
        asked.model(config.model, answers),
        weights.read(path, chosen, layout=layout),
        chosen,
        layout,
        begin_ids=_begin_ids(run, record, tokenizer),
        end_ids=_end_ids(run, record, tokenizer),
        answers=answers,
    )


def evaluate(path: Path, step: str = "latest") -> dict[str, float]:
    """Return the metrics of a run's step over all its held-out text.

    Raises UserError also when the run's data is no longer what it was trained with, and
    when it was imported and has none.
    """
    store = Run(path).read_config()["data"]["eval_store"]
    if not store:
        raise UserError(
            f"a run must have held-out text to be evaluated; got {path}, which was "
            "imported without any data. Train from it: --config.init.from."
        )
    held = load(path, step)
    config = held.config
    data = opened.open_data(config, lambda line: None)
    if store != data.eval.name:
        raise UserError(
            f"the held-out text must be what {path} was trained with; got "
            "another. Restore the files."
        )
    layout = held.layout
    count = layout.mesh.size
    rows = -(-config.eval.batch_size // count) * count
    held_out = data.eval
    if aims.has_reference(config):
        record = configfile.read_run(Run(path))
        base, base_step = weights.base_of(Run(path), record)
        held_out = tuned.referenced(
            held_out,
            held.model,
            weights.read(base, base_step, layout=layout),
            config,
            layout=layout,
            num_segments=data.num_segments,
            run_id=record["resolved"]["init"]["run_id"],
            step=base_step,
            say=lambda line: None,
        )
    answers, names = aims.answers_of(data), data.eval.names
    how = {"is_training": False, "is_plain": True}
    sums_of = aims.objective(config, held.model, answers, names, **how)
    with layout.active():
        return likelihood.evaluate(
            jax.jit(lambda params, batch: sums_of(params, batch)[1]),
            held.params,
            feeds.held_out(held_out.windows, rows, layout),
            bayes=feeds.held_out_bayes(data, rows),
            names=names,
        )


def _layout(given: Mapping[str, int]) -> sharding.Layout:
    """Return the layout in which devices that nothing is said of have rows."""
    given = {axis: size for axis, size in given.items() if size}
    if given and "data" not in given:
        given["data"] = -1
    return sharding.layout(meshes.make(meshes.sizes("ddp", given, jax.device_count())))


def _begin_ids(run: Run, record: dict, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return what stands before a text: of our runs the end id, as in training.

    Of a run that was trained on examples what stood before those.
    Of an imported one what its tokenizer.json puts there, as the `tokenizers` library
    does; where it has another kind of file, the id that the record calls the beginning.
    """
    if "begin_ids" in record["data"]:
        return tuple(record["data"]["begin_ids"])
    if carried.origin_of(run) is None:
        return (tokenizer.end_id,)
    if not isinstance(tokenizer, JsonTokenizer):
        begin_id = record["data"].get("begin_id")
        return () if begin_id is None else (begin_id,)
    import tokenizers as library

    inner = library.Tokenizer.from_str(tokenizer.to_json())
    plain = inner.encode("a", add_special_tokens=False).ids
    found = inner.encode("a").ids
    starts = range(len(found) - len(plain) + 1)
    at = next((i for i in starts if found[i : i + len(plain)] == plain), 0)
    return tuple(found[:at])


def _end_ids(run: Run, record: dict, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the tokenizer's end id, and those that an import's files name beside it.

    A model tuned to chat ends a turn with another id than a document.
    """
    found = {tokenizer.end_id, *record["data"].get("end_ids", ())}
    for name in (carried.CONFIG, carried.GENERATION):
        said = jsonfiles.read(run.path / "hf" / name, must=False)
        ids = said.get("eos_token_id")
        ids = ids if isinstance(ids, list) else [ids]
        found |= {index for index in ids if type(index) is int and index >= 0}
    return tuple(sorted(found))
