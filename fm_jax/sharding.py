"""The mesh, the table from logical axes to mesh axes, and arrays placed by it."""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fm_jax import trees
from fm_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")

# One table. A weight's embed dim is cut over fsdp; an activation's is not, because its
# batch dim, which comes first, has already taken that mesh axis.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "length": (),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "positions": (),
    "layers": (),
}


def make_mesh(*, data: int, fsdp: int, tensor: int) -> Mesh:
    """Return the mesh of all devices; one size may be -1 and takes what is left.

    Raises UserError when the sizes do not multiply to the number of devices.
    """
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    count = jax.device_count()
    free = [name for name, size in sizes.items() if size == -1]
    said = [size for size in sizes.values() if size != -1]
    fixed = math.prod(said)
    shown = " * ".join(f"{name}={size}" for name, size in sizes.items())
    if len(free) > 1 or min(said, default=1) < 1 or (free and count % fixed):
        raise UserError(
            f"mesh must have sizes >= 1, at most one -1, that divide the {count} "
            f"devices; got {shown}. Set --config.mesh.data=-1 and the others to 1."
        )
    if free:
        sizes[free[0]] = count // fixed
    if math.prod(sizes.values()) != count:
        raise UserError(
            f"mesh must multiply to the {count} devices; got {shown}. "
            "Set one of the sizes to -1 to take what is left."
        )
    # Auto, said aloud: the default has become Explicit, under which optax and gathers
    # on sharded tables fail.
    return jax.make_mesh(
        tuple(sizes[name] for name in AXES), AXES, axis_types=(AxisType.Auto,) * 3
    )


def spec(
    axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh, name: str = ""
) -> PartitionSpec:
    """Return the PartitionSpec of an array from its logical axes.

    A mesh axis is given to the first dim that asks for it. Raises UserError when a dim
    does not divide by its mesh axes, KeyError for a logical name not in the table.
    """
    assert len(axes) == len(shape), (name, axes, shape)
    entries: list = []
    used: set[str] = set()
    for axis, dim in zip(axes, shape, strict=True):
        wanted = () if axis is None else RULES[axis]
        free = tuple(a for a in wanted if a not in used and mesh.shape[a] > 1)
        parts = math.prod(mesh.shape[a] for a in free)
        if dim % parts:
            raise UserError(
                f"{name or 'array'} dim {axis!r} must divide by the mesh axes "
                f"{'*'.join(free)}; got {dim} over {parts}. "
                f"Change the size or set --config.mesh.{free[0]}=1."
            )
        used.update(free)
        entries.append(free if len(free) > 1 else free[0] if free else None)
    return PartitionSpec(*entries)


def tree_shardings(axes: dict, abstract: dict, mesh: Mesh) -> dict:
    """Return the NamedSharding of every parameter from a tree of logical axes."""
    shapes = trees.leaves_by_path(abstract)
    flat_axes = trees.leaves_by_path(axes, is_leaf=lambda x: isinstance(x, tuple))
    assert list(shapes) == list(flat_axes)

    def place(path, leaf):
        name = trees.path_name(path)
        return NamedSharding(mesh, spec(flat_axes[name], leaf.shape, mesh, name))

    return jax.tree_util.tree_map_with_path(place, abstract)


def like_params(tree: Any, params: dict, shardings: dict, default: Any) -> Any:
    """Return shardings for `tree`: those of the parameter a leaf mirrors, or `default`.

    An optimizer state holds copies of the parameter tree under longer paths, so a leaf
    mirrors the parameter whose path ends its own and whose shape it has.
    """
    known = {
        tuple(map(trees.key_of, path)): (leaf.shape, place)
        for (path, leaf), place in zip(
            jax.tree_util.tree_leaves_with_path(params),
            jax.tree.leaves(shardings),
            strict=True,
        )
    }

    def place(path, leaf):
        keys = tuple(map(trees.key_of, path))
        for start in range(len(keys)):
            shape, found = known.get(keys[start:], (None, None))
            if shape == leaf.shape:
                return found
        return default

    return jax.tree_util.tree_map_with_path(place, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding that keeps a whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of `[B, ...]` batches: rows over the data and fsdp axes."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def check_batch(rows: int, mesh: Mesh, thing: str) -> None:
    """Raise UserError when `rows` do not divide over the mesh's batch axes."""
    parts = math.prod(mesh.shape[a] for a in RULES["batch"])
    if rows % parts:
        near = sorted({rows // parts * parts, -(-rows // parts) * parts} - {0})
        raise UserError(
            f"{thing} must divide by data*fsdp of the mesh; got {rows} over {parts}. "
            f"Nearest: {' or '.join(map(str, near))}."
        )


def put_batch(batch: dict[str, np.ndarray], place: NamedSharding) -> dict:
    """Return this process's rows as global arrays on the mesh."""
    return {
        name: jax.make_array_from_process_local_data(place, rows)
        for name, rows in batch.items()
    }


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pin an activation to its logical axes; nothing happens outside a mesh.

    A dim that does not divide is left whole: a batch of one prompt is no mistake.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    kept = [
        axis if axis and dim % _parts(axis, mesh) == 0 else None
        for axis, dim in zip(axes, x.shape, strict=True)
    ]
    return jax.lax.with_sharding_constraint(x, spec(tuple(kept), x.shape, mesh))


def _parts(axis: str, mesh) -> int:
    return math.prod(mesh.shape[name] for name in RULES[axis])
