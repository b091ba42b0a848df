"""Commands about fine-tuned runs."""

from fm_jax import machine
from fm_jax.commands.command import Command


def classify(flags, raw, argv) -> None:
    """Print the labels of texts, by a run that was tuned to classify."""
    machine.tune_allocator()
    from fm_jax.commands import verdicts

    verdicts.run(flags)


def transfer(flags, raw, argv) -> None:
    """Compare methods of fine-tuning on one base, in and out of distribution."""
    machine.tune_allocator()
    from fm_jax.transfer import command

    command.transfer(raw, flags, argv)


COMMANDS = {
    "classify": Command(
        classify,
        "print the label of each text, by a run that was tuned to classify",
        "fm classify --run=runs/reviews-1a2b3c4d --text='What a film!'",
        {
            "run": (None, "the run folder"),
            "step": ("latest", "which checkpoint: a step, latest or best"),
            "text": ((), "a text; may be repeated"),
            "input": ("", "a file of them: a line each, or .jsonl with `text`"),
            "json": (False, "print all labels' probabilities, an object for each text"),
        },
    ),
    "transfer": Command(
        transfer,
        "compare ways to fine-tune one base, in and out of distribution, over seeds",
        "fm transfer --out=studies/styles",
        {
            "out": (None, "a folder for the base, the runs and the table"),
            "methods": ("probe,full,lp_ft,lora", "of them, also bias; with commas"),
            "rates": (
                "1e-4,3e-4,1e-3,3e-3,1e-2",
                "learning rates that each method tries",
            ),
            "seeds": (5, "runs of each method and rate; of the toy also draws of data"),
            "against": ("full", "the method that the others are compared with"),
        },
        takes_config=True,
        config="finetune_classify.py",
    ),
}
