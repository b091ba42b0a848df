"""fm plan: the very step that fm train would run, compiled abstractly and read."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax

from fm_jax import checkpoints
from fm_jax import config as configs
from fm_jax.accelerators import Chip
from fm_jax.compiled import estimates
from fm_jax.compiled.estimates import Estimate
from fm_jax.errors import UserError
from fm_jax.models import counts
from fm_jax.planning import topologies
from fm_jax.planning.topologies import Topology
from fm_jax.prepare import opened
from fm_jax.tokenizers import load as tokenizers
from fm_jax.tokenizers import plain
from fm_jax.train import compose
from fm_jax.train.compose import Parts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """The devices that a plan is made for, and what one of them can do.

    `chip` is None where nothing is known of its speed, `capacity` the bytes that a
    program may use on it. `is_simulated` devices stand in for others: their compiler is
    XLA's for CPUs.
    """

    name: str
    devices: list
    num_slices: int
    chip: Chip | None
    capacity: int | None
    devices_per_host: int
    is_simulated: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A step compiled for a machine, or the bytes it needs where it does not fit."""

    config: configs.Config
    machine: Machine
    parts: Parts
    corpus_tokens: int | None
    compile_seconds: float
    estimate: Estimate | None
    needed: int | None

    @property
    def fits(self) -> bool:
        """Whether a device has the memory that the step needs."""
        if self.estimate is None:
            return False
        capacity = self.machine.capacity
        return capacity is None or self.estimate.memory.total <= capacity

    @property
    def bytes_needed(self) -> int:
        """Bytes of a device that the step needs."""
        return self.needed or self.estimate.memory.total


def machine_of(topology: Topology | None, devices: list, chip: Chip | None) -> Machine:
    """Return the machine of a topology, or of this process's own devices."""
    own = topology is None
    is_simulated = not own and topology.is_simulated
    stats = devices[0].memory_stats() if own else None
    limit = (stats or {}).get("bytes_limit")
    return Machine(
        name=topology.name if topology else f"{len(devices)} {devices[0].device_kind}",
        devices=devices,
        num_slices=_num_networks(topology, chip) if topology else 1,
        chip=chip,
        capacity=limit or (chip.usable_hbm_bytes if chip else None),
        devices_per_host=chip.devices_per_host if chip else jax.local_device_count(),
        is_simulated=is_simulated,
    )


def _num_networks(topology: Topology, chip: Chip | None) -> int:
    """Return how many parts of a machine talk over the slower network.

    Slices of TPUs; of GPUs the hosts, for NVLink ends with them.
    """
    if chip is None or not topology.is_simulated:
        return topology.num_slices
    return max(topology.num_slices, topology.num_devices // chip.devices_per_host)


def corpus_of(config: configs.Config) -> tuple[configs.Config, int | None]:
    """Return the config with its vocabulary, and the tokens to train on where known.

    What fm train has prepared is looked up; nothing is built. Without it a BPE is taken
    to have the ids that it is asked for. Raises UserError when another
    tokenizer cannot be read, or has more ids than the model, and on stores that are
    not there.
    """
    try:
        data = opened.open_data(config, lambda line: None, may_build=False)
    except UserError:
        named = config.data.tokenizer
        if named == "store":  # its vocabulary is the stores'
            raise
        if named == "bytes":
            return compose.resolve(config, plain.ByteTokenizer()), None
        if named != "bpe":
            path = Path(named).expanduser()
            found = tokenizers.load(path, end_token=config.data.end_token)
            return compose.resolve(config, found), None
        size = config.model.vocab_size or -(-config.data.vocab_size // 64) * 64
        model = dataclasses.replace(config.model, vocab_size=size)
        return dataclasses.replace(config, model=model), None
    return compose.resolve(config, data.tokenizer), data.train.num_targets


def make(config: configs.Config, machine: Machine, corpus_tokens: int | None) -> Plan:
    """Return the plan of a resolved config on a machine; compiles its step.

    Rows are taken to be full: data.packing=single has more steps in an epoch.
    Raises UserError when config and machine do not fit each other in anything but
    memory.
    """
    if config.train.epochs and corpus_tokens is None:
        raise UserError(
            "train.epochs needs a corpus of known size to plan; got one that is not "
            "prepared yet. Give --corpus_tokens, or set train.steps or train.tokens."
        )
    layout = compose.open_layout(config, machine.devices)
    mixed = config.data.paths if config.data.source == "store" else ()
    parts = compose.build(
        config, layout, corpus_tokens=corpus_tokens or 0, train_names=mixed
    )
    batch = parts.abstract_batch(config.train.batch_size)
    began = time.perf_counter()
    estimate = needed = None
    with layout.active():
        lowered = parts.train_step.lower(parts.abstract, batch)
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            found = topologies.out_of_memory(str(error))
            if found is None:
                raise
            needed = found[0]
    if needed is None:
        estimate = parts.estimate(
            compiled,
            machine.chip,
            num_slices=machine.num_slices,
            is_own_compiler=not machine.is_simulated,
        )
    return Plan(
        config=config,
        machine=machine,
        parts=parts,
        corpus_tokens=corpus_tokens,
        compile_seconds=time.perf_counter() - began,
        estimate=estimate,
        needed=needed,
    )


def record(plan: Plan, *, mfu: float) -> dict[str, Any]:
    """Return everything that a plan says, as JSON-able values. Times are for `mfu`."""
    parts, machine, config = plan.parts, plan.machine, plan.config
    tokens = parts.num_steps * parts.tokens_per_step
    params = counts.params(config.model)
    devices = len(machine.devices)
    exact = parts.tokens_per_step * parts.flops_per_token
    state = checkpoints.size_bytes(parts.state_parts(parts.abstract))
    on_device = estimates.device_bytes(parts.abstract)
    found: dict[str, Any] = {
        "machine": machine.name,
        "devices": devices,
        "mesh": {a: n for a, n in parts.layout.mesh.shape.items() if n > 1},
        "params": vars(params),
        "vocab_size": config.model.vocab_size,
        "steps": parts.num_steps,
        "batch_size": config.train.batch_size,
        "length": config.data.max_length,
        "micro_batches": config.train.accumulation,
        "remat": config.model.remat,
        "attention": _attention(plan),
        "tokens": tokens,
        "epochs": tokens / plan.corpus_tokens if plan.corpus_tokens else None,
        "flops_per_step": {
            "6n": parts.tokens_per_step * counts.flops_per_token_6n(config.model),
            "exact": exact,
            "compiled": plan.estimate.flops * devices if plan.estimate else None,
        },
        "memory": estimates.state_memory(
            parts.abstract, parts.abstract_batch(config.train.batch_size)
        )
        | {
            "needed": plan.bytes_needed,
            "capacity": machine.capacity,
            "fits": plan.fits,
            "is_cpu_estimate": machine.is_simulated and machine.chip is not None,
        },
        "checkpoint": {
            "bytes": state,
            "host_bytes": min(state, on_device * machine.devices_per_host),
        },
        "compile_seconds": plan.compile_seconds,
    }
    if plan.estimate:
        memory = plan.estimate.memory
        found["memory"] |= vars(memory)
        found["collectives"] = [vars(t) for t in plan.estimate.traffic]
    chip = machine.chip
    if chip is not None:
        peak = devices * chip.flops.get(config.model.dtype, chip.flops["bfloat16"])
        found["at_mfu"] = _times(exact / peak / mfu, plan, tokens) | {"mfu": mfu}
        if plan.estimate:
            seconds = plan.estimate.seconds
            found["roofline"] = _times(seconds, plan, tokens) | {
                "mfu": exact / peak / seconds,
                "compute_seconds": plan.estimate.compute_seconds,
                "memory_seconds": plan.estimate.memory_seconds,
                "network_seconds": plan.estimate.network_seconds,
            }
    return found


def _attention(plan: Plan) -> dict[str, str]:
    """Return how attention is done in the `compiled` step, and on the machine `there`.

    Devices of a CPU that stand in for GPUs have none of their kernels.
    """
    chip, compiled = plan.machine.chip, plan.parts.attention()
    if not (plan.machine.is_simulated and chip):
        return {"compiled": compiled, "there": compiled}
    gpu = {"platform": "gpu", "capability": chip.capability}
    return {"compiled": compiled, "there": plan.parts.attention(gpu)}


def _times(step_seconds: float, plan: Plan, tokens: int) -> dict[str, float]:
    rate = plan.parts.tokens_per_step / step_seconds
    return {
        "step_seconds": step_seconds,
        "tokens_per_second": rate,
        "hours": tokens / rate / 3600,
    }
