"""Plans as text: the table of one, of its parameters, of its activations."""

import contextlib
import dataclasses
import importlib.metadata
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from fm_jax import trees
from fm_jax.compiled import estimates
from fm_jax.compiled.estimates import Memory, Traffic, size
from fm_jax.planning.plan import Plan

MEMORY_PARTS = [field.name for field in dataclasses.fields(Memory)]


def lines(found: dict[str, Any]) -> list[str]:
    """Return the record of a plan as lines of text."""
    params, flops, memory = found["params"], found["flops_per_step"], found["memory"]
    mesh = " * ".join(f"{axis}={n}" for axis, n in found["mesh"].items()) or "1 device"
    epochs = found["epochs"]
    corpus = "corpus not prepared yet" if epochs is None else f"{epochs:.2f} epochs"
    per_param = found["tokens"] / params["total"]
    compiled = flops["compiled"]
    shown = "" if compiled is None else f", {compiled:.3g} as compiled"
    if compiled is not None:
        shown += f" ({compiled / flops['exact']:.2f} of exactly)"
    text = [
        f"machine   {found['machine']}: {found['devices']} devices, mesh {mesh}",
        f"model     {params['total']:,} parameters ({params['non_embedding']:,} "
        f"without embedding and head), {found['vocab_size']:,} ids",
        f"steps     {found['steps']:,} of {found['batch_size']} x {found['length']} "
        f"tokens = {found['tokens']:.3g} tokens ({corpus}, {per_param:.2f} per "
        "parameter)",
        f"batch     {found['micro_batches']} micro-batches, remat {found['remat']}",
        f"attention {_attention(found['attention'])}",
        f"FLOPs     a step: {flops['6n']:.3g} by 6N, {flops['exact']:.3g} exactly"
        f"{shown}",
    ]
    text += ["memory    of a device" + _caveat(memory)]
    kept = {part: memory[part] for part in MEMORY_PARTS if part in memory}
    if "activations" in kept:
        text += estimates.memory_lines(Memory(**kept), memory["capacity"])
        text += ["network   what a device says in a step"]
        said = [Traffic(**t) for t in found["collectives"]]
        text += estimates.traffic_lines(said)
    else:  # the compiler gave up: what is there before it begins
        text += [f"  {part:26}{size(n):>12}" for part, n in kept.items() if n]
    if not memory["fits"]:
        needed, there = memory["needed"], memory["capacity"]
        text.append(
            f"DOES NOT FIT: needs {size(needed)} of {size(there)} on each device, "
            f"{size(needed - there)} too much"
        )
    text += _times(found)
    saved = found["checkpoint"]
    text += [
        f"saves     checkpoints of {size(saved['bytes'])}, through "
        f"{size(saved['host_bytes'])} of memory on each host",
        f"compiled  in {found['compile_seconds']:.1f} s",
    ]
    return text


def instead(found: dict[str, Any]) -> str:
    """Return the line that says what to give for the plan that was found to fit."""
    words = found["instead"]["overrides"].items()
    return "This fits: " + " ".join(f"--config.{key}={v}" for key, v in words)


def _attention(found: dict[str, str]) -> str:
    compiled, there = found["compiled"], found["there"]
    if compiled == there:
        return compiled
    return f"{there} on the GPU, {compiled} in what was compiled here"


def _caveat(memory: dict[str, Any]) -> str:
    if not memory["is_cpu_estimate"]:
        return ""
    return (
        " (an estimate: XLA's compiler for CPUs laid this out, not the GPU's; it has "
        "not been compared with one)"
    )


def _times(found: dict[str, Any]) -> list[str]:
    text = []
    if "roofline" in found:
        roofline = found["roofline"]
        parts = ", ".join(
            f"{name} {'unknown' if alone is None else _seconds(alone)}"
            for name in ("compute", "memory", "network")
            for alone in [roofline[f"{name}_seconds"]]
        )
        text.append(f"roofline  {_rate(roofline)}; alone: {parts}")
    if "at_mfu" in found:
        too_fast = (
            "roofline" in found
            and found["at_mfu"]["step_seconds"] < found["roofline"]["step_seconds"]
        )
        note = "; beyond the roofline of this program" if too_fast else ""
        text.append(f"at --mfu  {_rate(found['at_mfu'])}{note}")
    return text


def _rate(times: dict[str, float]) -> str:
    return (
        f"{_seconds(times['step_seconds'])} a step, MFU {times['mfu']:.0%}: "
        f"{times['tokens_per_second']:,.0f} tokens/s, "
        f"{_duration(times['hours'])} in all"
    )


def _duration(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.1f} h"
    return f"{hours * 60:.1f} min" if hours * 60 >= 1 else _seconds(hours * 3600)


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def sharding(plan: Plan) -> list[str]:
    """Return each parameter's shape, logical axes, spec and bytes per device."""
    axes = trees.leaves_by_path(
        plan.parts.model.axes, is_leaf=lambda x: isinstance(x, tuple)
    )
    rows = [("parameter", "shape", "logical axes", "cut over", "bytes a device")]
    total = 0
    for name, leaf in trees.leaves_by_path(plan.parts.abstract.params).items():
        held = int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        total += held
        cut = [_entry(entry) for entry in leaf.sharding.spec]
        rows.append(
            (
                name,
                "x".join(map(str, leaf.shape)),
                ",".join(axes[name]),
                ",".join(cut) or "-",
                f"{held:,}",
            )
        )
    rows.append(("all", "", "", "", f"{total:,}"))
    return table(rows)


def _entry(entry) -> str:
    if entry is None:
        return "-"
    return entry if isinstance(entry, str) else "*".join(entry)


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows of cells as aligned lines; the last column to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if index == len(widths) - 1 else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def versions() -> str:
    """Return the versions of the compilers that made a plan."""
    found = [f"jax {jax.__version__}"]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found.append(f"libtpu {importlib.metadata.version('libtpu')}")
    return ", ".join(found)
