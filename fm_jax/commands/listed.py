"""All commands of fm, in the order in which help lists them."""

from fm_jax.commands import (
    bench,
    checkpoints,
    data,
    laws,
    proofs,
    runs,
    serving,
    tuning,
    watching,
    weights,
)
from fm_jax.commands.command import Command

_ORDER = ("train", "generate", "serve", "import", "export", "families", "eval",
          "classify", "report", "status", "plan", "transfer", "sweep", "sweep run",
          "sweep status", "fit", "predict", "suggest", "data build",
          "data show", "data verify", "data overlap", "data tokenizer", "data pack",
          "data toy", "checkpoint verify",
          "replay", "verify_resume", "bench step", "bench generate",
          "bench data", "bench checkpoint", "bench fit", "bench table",
          "config")  # fmt: skip
_ALL = (
    runs.COMMANDS
    | watching.COMMANDS
    | laws.COMMANDS
    | data.COMMANDS
    | serving.COMMANDS
    | weights.COMMANDS
    | tuning.COMMANDS
    | bench.COMMANDS
    | checkpoints.COMMANDS
    | proofs.COMMANDS
)
COMMANDS: dict[str, Command] = {name: _ALL[name] for name in _ORDER}
