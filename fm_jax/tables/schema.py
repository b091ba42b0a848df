"""The run table: its columns, versioned, a row per run and evaluated checkpoint.

A run appends its rows to `table.jsonl` in its folder, one JSON object a line. A run
that goes on from a checkpoint may write a step again: the last row of a (run_id, step)
is the one that holds. What is not known is null, never a number.
"""

import math
import numbers
from typing import Any

FORMAT = 1
FILE = "table.jsonl"  # in the run folder
STATUSES = ("running", "final", "diverged")
NEVER_NULL = ("format", "run_id", "status", "step")
COUNTS = ("total", "non_embedding", "matmul")  # of parameters, for a law's N

COLUMNS: dict[str, tuple[type, str]] = {
    "format": (int, "version of these columns"),
    "run_id": (str, "names the run among all runs of a table"),
    "parent_id": (str, "the run that this one branched from"),
    "branch_step": (int, "the step of the parent that it branched at"),
    "status": (str, "running, final (came to its end) or diverged"),
    "step": (int, "optimizer steps done, those of the parent included"),
    "steps": (int, "steps of the whole run"),
    "seed": (int, "of weights and data order"),
    "config_hash": (str, "fingerprint of the resolved config"),
    "commit": (str, "of the source tree"),
    "params_total": (int, "all parameters"),
    "params_non_embedding": (int, "without embedding tables and head"),
    "params_embedding": (int, "token and position tables"),
    "params_head": (int, "of an untied output projection"),
    "params_matmul": (int, "that multiply each token, the head included"),
    "tokens": (int, "trained on so far"),
    "unique_tokens": (int, "different ones among them"),
    "epochs": (float, "passes over the train split"),
    "max_length": (int, "tokens in a row"),
    "batch_tokens": (int, "tokens in a batch"),
    "flops_exact": (float, "training FLOPs so far, every product counted"),
    "flops_6n_total": (float, "6 * params_total * tokens"),
    "flops_6n_non_embedding": (float, "6 * params_non_embedding * tokens"),
    "flops_6n_matmul": (float, "6 * params_matmul * tokens"),
    "learning_rate": (float, "peak of the schedule"),
    "learning_rate_now": (float, "at this step"),
    "schedule": (str, "its name"),
    "schedule_fraction": (float, "of the schedule's steps that are done"),
    "is_final": (bool, "the schedule ended at this step"),
    "warmup_tokens": (int, "tokens of the warm-up"),
    "beta2": (float, "of the optimizer"),
    "weight_decay": (float, "of the optimizer"),
    "train_loss": (float, "nats per token"),
    "loss": (float, "held out, nats per token"),
    "loss_se": (float, "standard error of loss, nats per token"),
    "bits_per_byte": (float, "held out"),
    "bayes_loss": (float, "the best that any model can have, nats per token"),
    "tokenizer": (str, "its name"),
    "dataset": (str, "its name"),
    "wall_seconds": (float, "since the run was begun or last gone on with"),
    "device": (str, "kind of device"),
    "num_devices": (int, "devices"),
    "embed_dim": (int, "width of the model"),
    "num_layers": (int, "depth of the model"),
}

# What a sweep knows of its runs stands after the columns that a run writes.
PLANNED: dict[str, tuple[type, str]] = {
    "name": (str, "the run's folder"),
    "budget_flops": (float, "the isoFLOP budget that the run was planned for"),
    "replicate": (int, "which repetition of the same plan"),
}
WRITTEN = {**COLUMNS, **PLANNED}

_KINDS = {
    int: (numbers.Integral, "an integer"),
    float: (numbers.Real, "a number"),
    str: (str, "a string"),
    bool: (bool, "true or false"),
}


def row(**values: Any) -> dict[str, Any]:
    """Return a row of the table with the columns in order, ready for json.dumps.

    Every column must be named; None where nothing is known. `format` may be left out.
    Raises ValueError for other names, for another type and for a number that is not
    finite: a diverged run's loss is None and its status says why.
    """
    values = {"format": FORMAT, **values}
    strange = sorted(values.keys() - COLUMNS.keys())
    missing = [name for name in COLUMNS if name not in values]
    if strange or missing:
        raise ValueError(
            "a row must have exactly the columns of the run table; got "
            f"strange {strange}, missing {missing}. COLUMNS lists them."
        )
    made = {name: _value(name, values[name]) for name in COLUMNS}
    if made["format"] != FORMAT:
        raise ValueError(f"format must be {FORMAT}; got {made['format']}.")
    if made["status"] not in STATUSES:
        raise ValueError(
            f"status must be one of {', '.join(STATUSES)}; got {made['status']!r}."
        )
    return made


def _value(name: str, value: Any) -> Any:
    """Return a value as the plain Python type of its column."""
    kind = COLUMNS[name][0]
    accepted, said = _KINDS[kind]
    if value is None:
        if name in NEVER_NULL:
            raise ValueError(f"{name} must be {said}; got None.")
        return None
    wrong = not isinstance(value, accepted)
    # Python's True is an integer, but a column of integers has no truths.
    if wrong or (kind is not bool and isinstance(value, bool)):
        raise ValueError(f"{name} must be {said} or None; got {value!r}.")
    if kind is float and not math.isfinite(value):
        raise ValueError(
            f"{name} must be finite; got {value}. Give None and a status instead."
        )
    return kind(value)
