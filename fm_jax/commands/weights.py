"""Commands about other people's checkpoints: weights in, weights out, who is known."""

import sys
from pathlib import Path

from fm_jax.commands.command import Command
from fm_jax.errors import UserError, reason


def bring(flags, raw, argv) -> None:
    """Make a run of a Hugging Face checkpoint folder, or of an adapter of one."""
    from fm_jax.hf import adapters, importing, tuned

    folder, out = (Path(path).expanduser() for path in (flags.hf, flags.out))
    command = ["fm", *argv]
    if not adapters.is_adapter(folder):
        if flags.base:
            raise UserError(
                f"--base must be given with an adapter's folder; got {flags.base} for "
                f"{folder}, which has no {adapters.CONFIG}."
            )
        run = importing.bring(
            folder, out, tokenizer=flags.tokenizer, command=command, say=_say
        )
    else:
        if flags.tokenizer or not flags.base:
            raise UserError(
                "an adapter must be imported with --base=RUN, the run that it is an "
                f"adapter of, and its tokenizer; got {folder} with "
                f"{'--tokenizer' if flags.tokenizer else 'no --base'}."
            )
        base = Path(flags.base).expanduser()
        run = tuned.bring(folder, base, out, command=command, say=_say)
    print(run.path)


def export(flags, raw, argv) -> int:
    """Write a run's weights as a Hugging Face checkpoint folder, or as an adapter."""
    from fm_jax.hf import exporting, tuned

    path, out = (Path(path).expanduser() for path in (flags.run, flags.out))
    is_lora = tuned.is_lora(path)
    if is_lora and not flags.merge_lora:
        for name in ("dtype", "verify"):
            if flags.values[name]:
                raise UserError(
                    f"--{name} must be given with a whole model; got an adapter's run, "
                    f"{path}. Give --merge_lora too."
                )
        tuned.export(path, out, step=flags.step, family=flags.family, say=_say)
        print(flags.out)
        return 0
    if flags.merge_lora and not is_lora:
        raise UserError(
            f"--merge_lora must be left out for a run without adapters; got {path}, "
            "whose weights are whole already."
        )
    is_good = exporting.run(
        path,
        out,
        step=flags.step,
        family=flags.family,
        dtype=flags.dtype,
        max_shard_size=flags.max_shard_size,
        verify=flags.verify,
        say=_say,
    )
    print(flags.out)
    if not is_good:
        _say("fm: the export does not compute what the run does; see its parity.json.")
    return 0 if is_good else 1


def families(flags, raw, argv) -> int:
    """Print the families of checkpoints; with --check, each beside transformers."""
    from fm_jax.hf import families as every

    if not flags.check:
        _print(every.table(), flags.out)
        return 0
    from fm_jax.hf import parity

    rows = parity.table(_say)
    _print(parity.markdown(rows), flags.out)
    bad = [row.sample for row in rows if not row.is_good]
    if bad:
        _say(f"fm: not the same as transformers: {', '.join(bad)}; see their rows.")
    return 1 if bad else 0


def _print(page: str, out: str) -> None:
    """Print a page, or write it to a file and print the file's name."""
    if not out:
        print(page, end="")
        return
    try:
        Path(out).expanduser().write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"--out must be a file to write; got {out} ({reason(error)})."
        ) from error
    print(out)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


COMMANDS = {
    "import": Command(
        bring,
        "make a run of a Hugging Face checkpoint folder, without torch",
        "fm import --hf=checkpoints/llama-3.2-1b --out=runs/llama-3.2-1b",
        {
            "hf": (None, "a folder with config.json and safetensors"),
            "out": (None, "the run folder to make: a new or an empty one"),
            "tokenizer": ("", "a tokenizer's file, or bytes; default: the folder's"),
            "base": ("", "where the folder is an adapter of peft's: the base's run"),
        },
    ),
    "export": Command(
        export,
        "write a run as a Hugging Face checkpoint folder, without torch",
        "fm export --run=runs/quickstart-1a2b3c4d --out=exports/mine --verify",
        {
            "run": (None, "the run folder"),
            "out": (None, "the folder to write: a new or an empty one"),
            "step": ("latest", "which checkpoint: a step, latest or best"),
            "family": ("", "as fm families lists them; default: the first that fits"),
            "dtype": (
                "",
                "float32, bfloat16 or float16; default: as imported, else float32",
            ),
            "max_shard_size": ("5GB", "of a file; a larger tensor has one to itself"),
            "verify": (False, "compare both forward passes; needs fm_jax[parity]"),
            "merge_lora": (False, "the whole model of a run of LoRA; not its adapter"),
        },
    ),
    "families": Command(
        families,
        "print the families of checkpoints that import and export know",
        "fm families --check --out=configs/families.md",
        {
            "check": (False, "compare each with transformers; 1 where one differs"),
            "out": ("", "a Markdown file to write instead"),
        },
    ),
}
