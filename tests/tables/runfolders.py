"""Run folders and sweeps as a trainer and a planner leave them, with chosen rows."""

import json

from fm_jax.tables import schema

LETTERS = {"a": 3, "b": 5, "c": 7, "trunk": 11}  # a size for each name


def row(run_id, step, *, steps=40, status=None, loss=3.5, **given):
    """Return a row whose numbers follow from the run's name and its step."""
    size = LETTERS.get(run_id, 13)
    ended = step == steps
    params = {
        "total": size * 1000,
        "non_embedding": size * 600,
        "embedding": size * 300,
        "head": size * 100,
        "matmul": size * 700,
    }
    tokens = step * 640
    values = dict.fromkeys(schema.COLUMNS) | {
        "format": schema.FORMAT,
        "run_id": run_id,
        "status": status or ("final" if ended else "running"),
        "step": step,
        "steps": steps,
        "seed": 1,
        **{f"params_{name}": number for name, number in params.items()},
        "tokens": tokens,
        "flops_exact": 5.5 * params["total"] * tokens,
        "learning_rate": 1e-3,
        "schedule": 'wsd, "long"',
        "is_final": ended,
        "loss": loss,
        "dataset": "stories",
    }
    return schema.row(**values | given)


def run(folder, rows, *, end="\n", **files):
    """Write a run folder with its rows, and other files by name."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "log.txt").write_text("")
    if rows:
        text = "\n".join(json.dumps(each) for each in rows) + end
        (folder / "table.jsonl").write_text(text)
    for name, content in files.items():
        (folder / name).write_text(content)


def plan(folder, *plans):
    """Write a sweep.jsonl of plans: name, parent, budget, replicate."""
    names = ("name", "parent", "budget_flops", "replicate")
    lines = [json.dumps(dict(zip(names, each, strict=True))) + "\n" for each in plans]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sweep.jsonl").write_text("".join(lines))


def sweep(folder):
    """Write a sweep of a trunk, two branches, a replicate, and what did not end."""
    plan(
        folder,
        ("trunk", "", None, 0),
        ("a", "trunk", 1e15, 0),
        ("b", "trunk", 2e15, 0),
        ("c", "", 4e15, 0),
        ("c-again", "", 4e15, 1),
        ("blown", "", None, 0),
        ("stopped", "", None, 0),
        ("waiting", "", None, 0),
        ("far", "", None, 0),
    )
    runs = folder / "runs"
    run(runs / "trunk", [row("trunk", 20, loss=4.0), row("trunk", 30, loss=3.8)])
    run(runs / "a", [row("a", 30, loss=3.9), row("a", 40, loss=3.25)])
    run(runs / "b", [row("b", 40, loss=3.125, bayes_loss=1.5)])
    run(runs / "c", [row("c", 40, loss=3.0)])
    run(runs / "c-again", [row("c-again", 40, loss=2.875)])
    run(
        runs / "blown",
        [row("blown", 10), row("blown", 11, status="diverged", loss=None)],
        FAILED="DivergedError: the loss is nan",
    )
    run(runs / "stopped", [row("stopped", 10)], FAILED="OSError: the disk is full")
    run(runs / "waiting", [])
