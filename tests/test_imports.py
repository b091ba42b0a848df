"""The floors: a file imports only from lower floors, or downward in its own folder."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent / "fm_jax"

FLOORS = [
    [
        "errors",
        "durations",
        "listing",
        "jsonfiles",
        "patterns",
        "redact",
        "machine",
        "caches",
        "sealed",
        "watch",
    ],
    [
        "trees",
        "digests",
        "cluster",
        "accelerators",
        "meshes",
        "sharding",
        "products",
        "logits",
        "objectives",
        "runs",
        "corpora",
    ],
    ["tokenizers", "generation"],
    [
        "models",
        "data",
        "optimizers",
        "metrics",
        "events",
        "life",
        "checkpoints",
        "compiled",
    ],
    ["evaluation", "sections", "demands", "combinations", "config", "configfile"],
    ["report", "status", "tables", "prepare", "finetune", "trackers"],
    ["hf"],
    ["scaling"],
    ["sweeps"],
    ["train"],
    ["planning", "serve", "transfer"],
    ["flags", "bench"],
    ["commands"],
    ["cli"],
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}

# Within a floor or a folder, a file may use those that stand before it here.
ORDER = {
    "": ["errors", "durations", "listing", "jsonfiles", "patterns", "redact", "machine",
         "caches", "sealed", "watch", "trees", "digests", "accelerators", "meshes",
         "sharding", "products", "logits", "objectives", "runs", "optimizers",
         "metrics", "events", "life", "checkpoints", "configfile", "sections",
         "demands", "combinations", "config", "report", "status", "flags", "cli"],
    "bench": ["ratios", "race", "versus", "nanogpt_like", "overhead", "step", "child",
              "startup", "generate", "checkpoint", "fit", "table"],
    "commands": ["command", "bench", "texts", "runs", "watching", "laws", "data",
                 "serving", "weights", "verdicts", "tuning", "checkpoints", "proofs",
                 "listed"],
    "prepare": ["vocabulary", "ready", "tuned", "opened", "show", "rates", "styles",
                "toys", "command"],
    "finetune": ["rules", "lora", "parts", "tuning", "heads", "answers", "flops",
                 "weights", "preferences", "reference", "features", "probe", "drift"],
    "transfer": ["paired", "study", "page", "command"],
    "cluster": ["launchers", "meeting", "together"],
    "compiled": ["text", "kernels", "program", "estimates"],
    "models": ["config", "presets_table", "presets_gpt", "presets_llama",
               "presets_gemma", "presets", "counts", "layers", "positions", "attend",
               "cache", "flash", "fused", "ring", "attention", "routing", "grouped",
               "experts", "moe", "draws", "decoder", "zoo"],
    "corpora": ["paths", "remote", "files", "streams", "fields", "arrow", "documents",
                "digests", "plain", "lines", "columns", "records", "formats", "chains",
                "rows", "synthetic", "tfds", "huggingface", "sources", "packed"],
    "generation": ["request", "text", "sampling", "quantise", "steps", "engine",
                   "batch"],
    "tokenizers": ["protocol", "splits", "fast", "plain", "jsonfile", "sentence",
                   "ranks", "load", "training", "special", "limits", "jinja",
                   "template"],
    "data": ["headers", "visible", "dedup", "progress", "arrays", "store", "shards",
             "lanes", "hands", "worker", "crew", "joined", "site", "build", "verify",
             "overlap", "summary", "packing", "windows", "chats", "labels", "sides",
             "examples",
             "example_store", "example_rows", "mixtures", "batches",
             "prefetch"],
    "evaluation": ["likelihood"],
    "trackers": ["rows", "board", "child", "feed", "named", "on_mlflow", "on_wandb",
                 "process"],
    "tables": ["schema", "rows", "cells", "results", "table"],
    "hf": ["rules", "fields", "leaves", "mapping", "rope", "windows", "family", "gated",
           "plain", "llama", "gpt", "neox", "gemma", "experts", "families", "header",
           "tensors", "pieces", "shards", "whole", "carried", "vocabulary", "described",
           "convert", "importing", "adopt", "lowrank", "adapters", "samples", "theirs",
           "verify", "exporting", "tuned", "parity"],
    "scaling": ["starts", "lawfile", "laws", "misfit", "descent", "solver",
                "resamples", "problem", "frontier", "information", "lines",
                "valleys", "slices", "bias", "envelope", "rates", "checks", "optimum",
                "files", "fit", "show", "axes", "drawn", "plot", "page", "predict",
                "suggest", "command"],
    "sweeps": ["ladder", "costs", "designs", "sweep", "plans", "variants", "lines",
               "workdir", "progress", "arrays", "outlook", "recipe", "labpage",
               "children", "records", "task", "standing", "runner", "command"],
    "serve": ["refused", "fields", "requests", "replies", "chat", "served", "worker",
              "gate", "streams", "app", "opened", "command"],
    "planning": ["topologies", "plan", "search", "show", "shipped", "command"],
    "train": ["gradients", "step", "loop", "progress", "aims", "compose", "feeds",
              "autopsy", "beginning", "tuned", "restore", "opening", "closing", "rows",
              "held_out", "first", "ending", "rewinding", "trainer", "run", "replay",
              "proof"],
}  # fmt: skip

FILES = sorted(p for p in ROOT.rglob("*.py") if p.name != "__init__.py")


def _place(path: pathlib.Path) -> tuple[str, str]:
    """Return the folder ("" at the top) and the name of a file of fm_jax."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return (parts[0], parts[1]) if len(parts) == 2 else ("", parts[0])


def _imports(path: pathlib.Path) -> set[tuple[str, str]]:
    """Return the places in fm_jax that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] != "fm_jax" or len(parts) < 2:
                continue
            if (ROOT / parts[1]).is_dir():
                found.add((parts[1], parts[2]))
            elif (ROOT / f"{parts[1]}.py").exists():
                found.add(("", parts[1]))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: "/".join(_place(p)))
def test_a_file_imports_only_what_stands_below_it(path):
    folder, name = _place(path)
    for other_folder, other in _imports(path):
        mine, its = FLOOR[folder or name], FLOOR[other_folder or other]
        if folder == other_folder:
            order = ORDER[folder]
            assert order.index(other) < order.index(name), f"{name} imports {other}"
        else:
            assert its < mine, f"{folder}/{name} imports {other_folder}/{other}"


def test_every_file_has_a_place():
    for path in FILES:
        folder, name = _place(path)
        assert (folder or name) in FLOOR
        assert name in ORDER[folder]


def test_models_know_nothing_of_data_training_or_losses():
    for path in FILES:
        if _place(path)[0] == "models":
            tops = {folder or name for folder, name in _imports(path)}
            assert tops <= {"models", "errors", "products", "sharding"}


def test_nothing_imports_the_configs():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.module.split(".")[0] != "configs"


WITHOUT_JAX = ["fm_jax.cli", "fm_jax.flags", "fm_jax.config", "fm_jax.configfile",
               "fm_jax.runs", "fm_jax.machine", "fm_jax.errors", "fm_jax.report",
               "fm_jax.status", "fm_jax.commands.watching",
               "fm_jax.accelerators", "fm_jax.cluster.launchers",
               "fm_jax.compiled.text", "fm_jax.compiled.program",
               "fm_jax.models.config", "fm_jax.models.presets",
               "fm_jax.models.counts", "fm_jax.corpora.sources",
               "fm_jax.corpora.packed", "fm_jax.data.worker", "fm_jax.data.prefetch",
               "fm_jax.data.verify", "fm_jax.data.overlap", "fm_jax.prepare.command",
               "fm_jax.tokenizers.load", "fm_jax.tokenizers.training",
               "fm_jax.data.store", "fm_jax.hf.adopt",
               "fm_jax.corpora.synthetic", "fm_jax.tables.table",
               "fm_jax.scaling.command",
               "fm_jax.scaling.fit", "fm_jax.scaling.page", "fm_jax.scaling.suggest",
               "fm_jax.scaling.predict", "fm_jax.sweeps.command",
               "fm_jax.sweeps.runner", "fm_jax.sweeps.recipe",
               "fm_jax.trackers.named", "fm_jax.trackers.process"]  # fmt: skip


def test_planning_and_help_import_neither_jax_nor_tensorflow():
    code = "import sys\n" + "".join(f"import {name}\n" for name in WITHOUT_JAX)
    code += "print([m for m in ('jax', 'tensorflow', 'flax') if m in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"


def test_the_whole_house_imports_no_tensorflow_or_torch():
    """But for the yardstick, which is PyTorch itself and runs by its name alone."""
    files = [path for path in FILES if path.stem != "nanogpt_like"]
    names = [".".join(("fm_jax", *filter(None, _place(path)))) for path in files]
    code = "import sys\n" + "".join(f"import {name}\n" for name in names)
    code += "print([m for m in ('tensorflow', 'torch') if m in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"
