"""Commands about one run: each imports what it needs when it is called."""

import dataclasses
import os
import sys
from pathlib import Path

from fm_jax import machine
from fm_jax.commands.command import Command
from fm_jax.errors import StoppedError, UserError
from fm_jax.watch import Watch


def train(flags, raw, argv) -> None:
    """Train, or go on training."""
    workdir = Path(flags.workdir or _default_workdir(flags.config_file, raw))
    train_in(workdir, raw, flags, argv)


def train_in(workdir: Path, raw: dict, flags, argv: list[str]) -> None:
    """Train the run of a config in its folder; flags: LAUNCH, argv: what was asked."""
    from fm_jax import config as configs

    config = configs.check(raw)
    for name in ("grace", "hang", "rewinds"):
        if not getattr(flags, name) >= 0:
            raise UserError(f"--{name} must be at least 0; got {getattr(flags, name)}.")
    from fm_jax.trackers import named

    track = named.check(flags.track)
    machine.tune_allocator()
    with machine.importing():
        from fm_jax.cluster import launchers, together

    found = launchers.find(
        flags.coordinator, flags.num_processes, flags.process_id, os.environ
    )
    together.start(found, timeout_seconds=flags.join_timeout)
    with Watch(grace_seconds=flags.grace, hang_seconds=flags.hang) as watch:
        if found is None:  # of several one alone must not leave what they do together
            watch.error = StoppedError(None)
        with machine.importing():
            from fm_jax.train import run

        try:
            run.train(config, workdir, ["fm", *argv], watch, flags.rewinds, track)
        except Exception as error:
            raise together.lost(error) from error


def generate(flags, raw, argv) -> None:
    """Print text that a run's model writes."""
    machine.tune_allocator()
    from fm_jax.commands import texts

    texts.run(flags, argv)


def evaluate(flags, raw, argv) -> None:
    """Print a run's metrics on all its held-out text."""
    machine.tune_allocator()
    from fm_jax.evaluation import likelihood
    from fm_jax.train import restore

    found = restore.evaluate(Path(flags.run), flags.step)
    for name, value in found.items():
        print(f"{name} {value:.6g}")
    if said := likelihood.below_bayes(found):
        print(f"WARNING: {said}", file=sys.stderr)


def make_report(flags, raw, argv) -> None:
    """Write report.html of one run, or of several."""
    from fm_jax import report

    if not flags.positional:
        raise UserError("fm report must be given run folders; got none.")
    paths = [Path(p) for p in flags.positional]
    beside = paths[0] / "report.html" if len(paths) == 1 else Path("report.html")
    out = Path(flags.out) if flags.out else beside
    report.write(paths, out)
    print(out)
    if flags.figures:
        for path in report.write_figures(paths, Path(flags.figures)):
            print(path)


def plan(flags, raw, argv) -> None:
    """Print what a run will take, on a machine that need not be there."""
    from fm_jax import config as configs
    from fm_jax.planning import command

    command.run(configs.check(raw), flags)


def show_config(flags, raw, argv) -> None:
    """Print the resolved config, or its difference from another."""
    from fm_jax import config as configs
    from fm_jax import configfile

    config = configs.check(raw)
    if not flags.diff:
        for section in dataclasses.fields(config)[:-1]:  # the last is raw
            values = dataclasses.asdict(getattr(config, section.name))
            for key, value in values.items():
                print(f"{section.name}.{key.rstrip('_')} = {value!r}")
        return
    other = (
        configfile.load_base()
        if flags.diff == "base"
        else configfile.load(flags.diff).to_dict()
    )
    for key, (old, new) in configfile.difference(other, config.raw).items():
        print(f"{key} = {new!r}  (was {old!r})")


def _default_workdir(config_file: str, raw: dict) -> str:
    """Return a folder that is the same for the same config: its name and digest."""
    from fm_jax import config as configs
    from fm_jax import configfile

    raw = configs.check(raw).raw
    stem = Path(config_file.partition(":")[0]).stem
    return os.path.join(
        "runs", f"{stem}-{configfile.fingerprint(raw, with_duration=True)[:8]}"
    )


LAUNCH = {
    "coordinator": ("", "of several processes: HOST:PORT of the first, or auto"),
    "num_processes": (0, "how many there are; default: the launcher's number"),
    "process_id": (-1, "which one this is, from 0; default: the launcher's"),
    "join_timeout": (300, "seconds to wait for the others"),
    "rewinds": (
        0,
        "times that a run which diverges goes back to its last checkpoint and leaves "
        "out the batches since",
    ),
    "track": (
        (),
        "send the metrics there as well: wandb or mlflow; may be repeated",
    ),
    "grace": (120.0, "seconds to save in after SIGTERM; 0: no limit"),
    "hang": (
        3600.0,
        "seconds that a step, a held-out batch or a quarter of a compilation or save "
        "may take; then exit 85; 0: no limit",
    ),
}
_STEP = ("latest", "which checkpoint: a step, latest or best")
COMMANDS = {
    "train": Command(
        train,
        "train a model, or go on training it",
        "fm train --config=configs/quickstart.py --config.model.num_layers=6",
        {
            "workdir": ("", "the run folder; default: runs/<config>-<fingerprint>"),
            **LAUNCH,
        },
        takes_config=True,
    ),
    "generate": Command(
        generate,
        "print text that a run's model writes",
        "fm generate --run=runs/quickstart-1a2b3c4d --prompt='def ' --num_samples=3",
        {
            "run": (None, "the run folder"),
            "step": _STEP,
            "prompt": ((), "what to go on from; may be repeated"),
            "prompts": ("", "a file of them: a line each, or .jsonl with `prompt`"),
            "chat": (False, "a prompt is what a user says; print the answer"),
            "system": ("", "with --chat: what the system says before"),
            "num_samples": (1, "texts for each prompt"),
            "num_tokens": (128, "new tokens at most"),
            "temperature": (0.8, "0: always the likeliest token"),
            "top_k": (0, "choose among this many; 0: all"),
            "top_p": (0.95, "choose among the likeliest of this probability"),
            "min_p": (0.0, "choose among those of this part of the likeliest's"),
            "repetition_penalty": (1.0, "over 1: less of what the text has; 1: none"),
            "stop": ((), "end a text before this; may be repeated"),
            "seed": (0, "the same seed gives the same text"),
            "stream": (True, "print text as it comes; default: one, on a terminal"),
            "json": (False, "print a line of JSON for each text"),
            "logprobs": (-1, "with --json: log-probabilities, and so many likeliest"),
            "int8": (False, "keep the weights of products in eight bits"),
            "mesh.data": (0, "devices to cut rows over; default: all that are left"),
            "mesh.fsdp": (0, "rows and weights"),
            "mesh.tensor": (0, "heads, MLP and vocabulary"),
        },
    ),
    "eval": Command(
        evaluate,
        "print a run's metrics on all its held-out text",
        "fm eval --run=runs/quickstart-1a2b3c4d --step=best",
        {"run": (None, "the run folder"), "step": _STEP},
    ),
    "report": Command(
        make_report,
        "write report.html of a run, or of several side by side",
        "fm report runs/a runs/b --out=compare.html",
        {
            "out": ("", "the file; default: RUN/report.html, report.html for several"),
            "figures": ("", "a folder to write each figure to as well, as SVG"),
        },
        positional="RUN...",
    ),
    "plan": Command(
        plan,
        "print the memory, time and network that a run will take, on any machine",
        "fm plan --config=configs/llama_pretrain.py:8b --topology=v5p:4x4x4",
        {
            "topology": (
                "",
                "v5e:4x4, v5p:4x4x4, h100:8, cpu:8, ...; default: this one",
            ),
            "mfu": (0.4, "the MFU that times are given for, beside the roofline"),
            "tries": (6, "plans to compile in search of one that fits; 0: none"),
            "corpus_tokens": (0.0, "tokens to train on, where no text is prepared yet"),
            "show": ("", "instead: sharding of each parameter, or activations"),
            "json": (False, "print JSON"),
        },
        takes_config=True,
    ),
    "config": Command(
        show_config,
        "print a config with every key, or its difference from another",
        "fm config --config=configs/quickstart.py --diff=base",
        {"diff": ("", "base, a config file or a run folder")},
        takes_config=True,
    ),
}
