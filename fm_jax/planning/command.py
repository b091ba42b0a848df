"""What fm plan does: one config on one machine, and what to change if it is too big."""

import datetime
import json
import sys
from typing import Any

from fm_jax import accelerators, meshes
from fm_jax import config as configs
from fm_jax.errors import UserError, unknown
from fm_jax.planning import plan as plans
from fm_jax.planning import search, show, topologies

SHOWS = ("", "sharding", "activations")
POLICIES = ("none", "dots", "names", "offload", "full")


def run(config: configs.Config, flags: Any) -> None:
    """Print the plan. Raises UserError on what cannot be planned.

    Flags: topology ("": this machine), mfu, tries, corpus_tokens, show, json.
    """
    if flags.show not in SHOWS:
        raise unknown("--show", flags.show, SHOWS[1:])
    if not 0 < flags.mfu <= 1:
        raise UserError(f"--mfu must be above 0 and at most 1; got {flags.mfu}.")
    if not 0 <= flags.corpus_tokens < float("inf"):
        raise UserError(f"--corpus_tokens must be >= 0; got {flags.corpus_tokens}.")
    if flags.tries < 0:
        raise UserError(f"--tries must be >= 0; got {flags.tries}.")
    if flags.show and flags.json:
        raise UserError(f"--json must be without --show; got --show={flags.show}.")
    machine = machine_of(flags.topology)
    config, known = plans.corpus_of(config)
    corpus = int(flags.corpus_tokens) or known

    def make(changed):
        return plans.make(changed, machine, corpus)

    if flags.show == "activations":
        _print(_activations(config, machine, make))
        return
    plan = make(config)
    if flags.show == "sharding":
        _print(show.sharding(plan))
        return
    found = plans.record(plan, mfu=flags.mfu) | {
        "date": datetime.date.today().isoformat(),
        "versions": show.versions(),
    }
    text = show.lines(found)
    if not plan.fits and flags.tries:
        if not flags.json:
            _print(text)
        other = search.fastest_fitting(
            config, machine, make, tries=flags.tries, say=_say
        )
        text = [
            "no other way was found to fit, with --tries="
            f"{flags.tries}; raise it, or take more devices"
        ]
        if other is not None:
            overrides, plan = other
            found["instead"] = plans.record(plan, mfu=flags.mfu) | {
                "overrides": overrides
            }
            text = [show.instead(found), *show.lines(found["instead"])]
    _print([json.dumps(found, indent=1)] if flags.json else text)


def machine_of(name: str) -> plans.Machine:
    """Return the machine of that topology, or the one that this process runs on.

    Must come before anything else of jax.
    """
    if not name:
        import jax

        devices = jax.devices()
        chip = accelerators.by_kind(devices[0].device_kind)
        return plans.machine_of(None, devices, chip)
    topology = topologies.parse(name)
    topologies.prepare(topology)
    chip = accelerators.CHIPS.get(topology.chip)
    return plans.machine_of(topology, topologies.devices(topology), chip)


def _activations(config: configs.Config, machine: plans.Machine, make) -> list[str]:
    """Return the bytes of activations by policy, and by rows and length on a device."""
    given = {axis: getattr(config.mesh, axis) for axis in meshes.AXES}
    sizes = meshes.sizes(config.mesh.preset, given, len(machine.devices))
    groups = sizes["data"] * sizes["fsdp"] * sizes["expert"]
    whole = config.data.max_length
    unit = 2 * sizes["context"] if sizes["context"] > 1 else 1
    parts = [length // unit * unit or unit for length in (whole // 4, whole // 2)]
    shapes = [*((1, length) for length in parts), (1, whole), (2, whole), (4, whole)]
    table = [("remat", *(f"{rows} x {length}" for rows, length in shapes))]
    for remat in POLICIES:
        cells = []
        for rows, length in shapes:
            changed = {
                "model.remat": remat,
                "data.max_length": length,
                "train.accumulation": 1,
                "train.batch_size": rows * groups,
                "train.loss_chunk": min(config.train.loss_chunk, length),
                "eval.batch_size": groups,
            }
            one = make(search.overridden(config, changed))
            cells.append(
                show.size(one.estimate.memory.activations)
                if one.estimate
                else f"over {show.size(one.bytes_needed)} in all"
            )
        table.append((remat, *cells))
        _say(f"  compiled remat={remat}")
    return [
        "activations and the rest of a device's temporaries, by its rows x length",
        *show.table(table),
    ]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _print(lines: list[str]) -> None:
    print("\n".join(lines))
