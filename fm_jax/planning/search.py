"""Other ways to run a config: ordered by a simple model, tried with the compiler."""

import dataclasses
from collections.abc import Callable, Iterator

from fm_jax import accelerators
from fm_jax import config as configs
from fm_jax.errors import UserError
from fm_jax.models import counts
from fm_jax.planning.plan import Machine, Plan

# Training FLOPs against no recomputation: all of a block but its last products is made
# again under `names`, all of it under `full`. `dots` makes only attention again.
RECOMPUTED = {"none": 1.0, "dots": 1.05, "names": 1.3, "full": 4 / 3}
REACHED = 0.6  # share of the peak rate that products are taken to reach


@dataclasses.dataclass(frozen=True)
class Way:
    """Overrides of a config, and what the model expects of them."""

    overrides: dict[str, object]
    seconds: float
    memory: float


def ways(config: configs.Config, machine: Machine) -> list[Way]:
    """Return the ways to run a config on a machine, the fastest first.

    Varied are the remat policy, the number of micro-batches and the mesh, in sizes that
    divide. Expected memory orders them where speed does not.
    """
    found = [
        Way(
            {
                "model.remat": remat,
                "train.accumulation": accumulation,
                "eval.batch_size": _rounded_up(config.eval.batch_size, mesh),
                **{f"mesh.{axis}": size for axis, size in mesh.items()},
            },
            *_expected(config, machine, remat, accumulation, mesh),
        )
        for mesh in _meshes(config, machine)
        for remat in RECOMPUTED
        for accumulation in _accumulations(config, mesh)
    ]
    return sorted(found, key=lambda way: (way.seconds, way.memory))


def fastest_fitting(
    config: configs.Config,
    machine: Machine,
    make: Callable[[configs.Config], Plan],
    *,
    tries: int,
    say: Callable[[str], None],
) -> tuple[dict[str, object], Plan] | None:
    """Return the first of the ways that fits, with what it changes; None after `tries`.

    A way that is expected to need more than there is, or than one that did not fit, is
    passed over.
    """
    limit = machine.capacity or float("inf")
    for way in ways(config, machine):
        if tries < 1:
            break
        if way.memory >= limit:
            continue
        overrides = {k: v for k, v in way.overrides.items() if v != _value(config, k)}
        try:
            plan = make(overridden(config, overrides))
        except UserError:  # a size of this model that does not divide by this mesh
            continue
        tries -= 1
        shown = " ".join(f"{k}={v}" for k, v in overrides.items())
        say(
            f"  tried {shown}: {plan.bytes_needed / 1e9:,.1f} GB, "
            f"{'fits' if plan.fits else 'does not fit'}"
        )
        if plan.fits:
            return overrides, plan
        limit = way.memory
    return None


def overridden(config: configs.Config, overrides: dict[str, object]) -> configs.Config:
    """Return a resolved config with other values of some keys."""
    for key, value in overrides.items():
        section, name = key.split(".")
        changed = dataclasses.replace(getattr(config, section), **{name: value})
        config = dataclasses.replace(config, **{section: changed})
    return config


def _kept(model, length: int, width: int) -> dict[str, float]:
    """Return the bytes that a token keeps in a layer for the backward pass."""
    stream = model.embed_dim * width
    heads = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    hidden = model.mlp_dim * (2 if model.is_gated else 1)
    # Scores and weights of causal attention, in float32 as the products' results are.
    scores = 2 * 4 * model.num_heads * counts.mean_keys(length, 0)
    products = 4 * (heads + hidden + 2 * model.embed_dim)
    return {
        "none": stream * 4 + products * 2 + scores,
        "dots": stream + products,
        "names": stream * 2 + model.num_heads * model.head_dim * width,
        "full": stream,
    }


def _value(config: configs.Config, key: str) -> object:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def _meshes(config: configs.Config, machine: Machine) -> Iterator[dict[str, int]]:
    """Yield sizes of fsdp, tensor and context that divide the machine and the model."""
    # Between slices go what the config sends there: rows, or weights too.
    data, model = config.mesh.dcn_data, config.model
    count = len(machine.devices) // data
    for tensor in (1, 2, 4, 8):
        if tensor > machine.devices_per_host or model.num_kv_heads % tensor:
            continue
        for context in (1, 2, 4, 8):
            fsdp = count // tensor // context
            rest = fsdp * tensor * context != count or model.embed_dim % fsdp
            if rest or (context > 1 and config.data.max_length % (2 * context * 128)):
                continue
            if fsdp % config.mesh.dcn_fsdp:
                continue
            sizes = {"data": data, "fsdp": fsdp, "tensor": tensor, "context": context}
            yield sizes | {"expert": 0}


def _accumulations(config: configs.Config, mesh: dict[str, int]) -> list[int]:
    """Return the numbers of micro-batches that give every device whole rows."""
    rows = config.train.batch_size
    return [
        n
        for n in (2**power for power in range(rows.bit_length()))
        if rows % n == 0 and rows // n % (mesh["data"] * mesh["fsdp"]) == 0
    ]


def _rounded_up(rows: int, mesh: dict[str, int]) -> int:
    parts = mesh["data"] * mesh["fsdp"]
    return -(-rows // parts) * parts


def _expected(config, machine, remat, accumulation, mesh) -> tuple[float, float]:
    """Return seconds of a step and bytes of a device, by simple counts."""
    model, length = config.model, config.data.max_length
    devices = len(machine.devices)
    params = counts.params(model)
    tokens = config.train.batch_size * length
    width = 2 if model.dtype == "bfloat16" else 4
    # A micro-batch fetches the weights for both passes and gives gradients back.
    fetched = params.total / mesh["tensor"] * (2 * width + 4) * accumulation
    if mesh["fsdp"] == 1:
        fetched = 0.0
    stream = tokens / devices * model.embed_dim * width
    # Both branches of a layer are summed over tensor, in both passes.
    said = fetched + 8 * model.num_layers * stream * (mesh["tensor"] - 1)
    kv = 2 * model.num_kv_heads * model.head_dim * width * tokens / devices
    # Keys go round in both passes, in the second with their gradients in float32.
    pieces = mesh["context"]
    said += kv * model.num_layers * (5 * pieces - 3) * (pieces > 1)
    flops = counts.flops_per_token(model, length) * tokens / devices
    # Of a chip that is not known the order is that of another.
    chip = machine.chip or accelerators.CHIPS["a100"]
    peak = chip.flops.get(model.dtype, chip.flops["bfloat16"])
    work = RECOMPUTED[remat] * flops / peak / REACHED
    seconds = work + 0.5 * said / chip.link_bytes_per_second
    # Each micro-batch reads the weights twice, and reads and writes the gradients.
    swept = params.total / mesh["tensor"] * (2 * width + 8) * accumulation
    seconds += swept / chip.hbm_bytes_per_second

    rows = tokens / accumulation / devices
    held = _kept(model, length, width)
    share = mesh["fsdp"] * mesh["tensor"]
    state = params.total * 16 / share
    activations = rows * model.num_layers * held[remat] / mesh["tensor"]
    # One layer's backward pass holds what `none` would keep of it.
    activations += rows * held["none"] / mesh["tensor"]
    # The head and its gradient are whole on a device, in both dtypes.
    head = model.vocab_size * model.embed_dim * (width + 4) / mesh["tensor"]
    return seconds, state + activations + head
