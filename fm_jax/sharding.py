"""The table from logical axes to mesh axes, and arrays placed by it."""

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fm_jax import meshes, trees
from fm_jax.errors import UserError, unknown

CONTEXT = "context"  # the mesh axis that a row's length is cut over
ROWS = ("data", "fsdp", "expert")  # what a batch's rows are cut over when they arrive

# One table. Every mesh axis that is not named for a dim keeps whole copies of it.
RULES: dict[str, tuple[str, ...]] = {
    "rows": ROWS,
    "batch": (*ROWS, CONTEXT),  # rows, or pieces of rows: see cut_rows
    "length": (),
    "embed": ("fsdp",),  # of weights; an activation's embed dim is never cut
    "embed_vector": (),  # norms and biases: fetching them would cost more than they do
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "expert": ("expert",),
    "positions": (),
    "layers": (),
}


FIXED = ("rows", "batch", "length", "head_dim")  # what cut_rows and the ring rely on


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """A mesh and the rules by which arrays lie on it."""

    mesh: Mesh
    rules: Mapping[str, tuple[str, ...]]

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Let activations name their logical axes within the block."""
        token = _ACTIVE.set(self)
        try:
            with jax.set_mesh(self.mesh):
                yield
        finally:
            _ACTIVE.reset(token)

    def size(self, *axes: str) -> int:
        """Return over how many devices the mesh axes cut."""
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def sharding(self, *entries: Any) -> NamedSharding:
        """Return the sharding of a PartitionSpec's entries; none is a whole copy."""
        return NamedSharding(self.mesh, PartitionSpec(*entries))


_ACTIVE: contextvars.ContextVar[Layout | None] = contextvars.ContextVar(
    "layout", default=None
)
_IS_WHOLE: contextvars.ContextVar[bool] = contextvars.ContextVar(
    "is_whole", default=False
)


def layout(mesh: Mesh, overrides: tuple = ()) -> Layout:
    """Return the layout of a mesh; overrides are `(logical axis, mesh axes)` pairs.

    Raises UserError when an override names an axis that does not exist or that the
    program relies on.
    """
    free = RULES.keys() - set(FIXED)
    for logical, axes in overrides:
        if logical not in free:
            raise unknown("mesh.rules axis", logical, free)
        for axis in axes:
            if axis not in meshes.AXES:
                raise unknown(f"mesh.rules mesh axis of {logical!r}", axis, meshes.AXES)
    rules = RULES | dict(overrides)
    for logical in ("heads", "kv_heads", "vocab", "positions"):
        for axis in set(rules[logical]) & set(rules["batch"]):
            if mesh.shape[axis] > 1:
                raise UserError(
                    f"mesh.rules must not cut {logical} over {axis!r}, which cuts rows;"
                    f" got {rules[logical]}. Set --config.mesh.{axis}=1 or use tensor."
                )
    over = [axis for axis in rules["expert"] if mesh.shape[axis] > 1]
    if len({axis in rules["batch"] for axis in over}) > 1:
        raise UserError(
            "mesh.rules must cut expert over axes that all cut rows, or that all do "
            f"not; got {rules['expert']}. Use expert alone."
        )
    if mesh.shape[CONTEXT] > 1 and rules["heads"] != rules["kv_heads"]:
        raise UserError(
            "mesh.rules must give heads and kv_heads the same mesh axes where context "
            f"is cut; got {rules['heads']} and {rules['kv_heads']}."
        )
    return Layout(mesh, rules)


def spec(
    axes: tuple[str | None, ...],
    shape: tuple[int, ...],
    layout: Layout,
    name: str = "array",
) -> PartitionSpec:
    """Return the PartitionSpec of an array from its logical axes.

    Raises UserError when a dim does not divide by its mesh axes or two dims ask for
    the same one, KeyError for a logical name not in the table.
    """
    assert len(axes) == len(shape), (name, axes, shape)
    entries: list = []
    taken: dict[str, str] = {}
    for axis, dim in zip(axes, shape, strict=True):
        wanted = () if axis is None else layout.rules[axis]
        cut = tuple(a for a in wanted if layout.mesh.shape[a] > 1)
        for mesh_axis in cut:
            if mesh_axis in taken:
                raise UserError(
                    f"a mesh axis must cut one dim of an array; got {mesh_axis!r} for "
                    f"dims {taken[mesh_axis]!r} and {axis!r} of {name}. Change "
                    f"mesh.rules or set --config.mesh.{mesh_axis}=1."
                )
            taken[mesh_axis] = axis
        parts = layout.size(*cut)
        if dim % parts:
            near = " or ".join(map(str, _near_divisors(dim, parts)))
            raise UserError(
                f"{name} dim {axis!r} must divide by the mesh axes {'*'.join(cut)}; "
                f"got {dim} over {parts}. Nearest that divide: {near}. Change the size "
                f"or set --config.mesh.{cut[-1]}=1."
            )
        entries.append(cut if len(cut) > 1 else cut[0] if cut else None)
    return PartitionSpec(*entries)


def _near_divisors(dim: int, parts: int) -> list[int]:
    below = max(n for n in range(1, parts + 1) if dim % n == 0)
    above = [n for n in range(parts, dim + 1) if dim % n == 0]
    return [below, *above[:1]]


def tree_shardings(axes: dict, abstract: dict, layout: Layout) -> dict:
    """Return the NamedSharding of every parameter from a tree of logical axes."""
    shapes = trees.leaves_by_path(abstract)
    flat_axes = trees.leaves_by_path(axes, is_leaf=lambda x: isinstance(x, tuple))
    assert list(shapes) == list(flat_axes)

    def place(path, leaf):
        name = trees.path_name(path)
        found = spec(flat_axes[name], leaf.shape, layout, name)
        return NamedSharding(layout.mesh, found)

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


# ---- batches


def check_batch(rows: int, length: int, layout: Layout, thing: str) -> None:
    """Raise UserError when `rows` of `length` tokens do not divide over the mesh."""
    parts = layout.size(*ROWS)
    if rows % parts:
        near = sorted({rows // parts * parts, -(-rows // parts) * parts} - {0})
        raise UserError(
            f"{thing} must divide by data*fsdp*expert of the mesh; got {rows} over "
            f"{parts}. Nearest: {' or '.join(map(str, near))}."
        )
    pieces = layout.size(CONTEXT)
    if pieces > 1 and length % (2 * pieces):
        raise UserError(
            f"data.max_length must divide by 2*context of the mesh; got {length} over "
            f"{2 * pieces}. Nearest: {-(-length // (2 * pieces)) * 2 * pieces}."
        )


def batch_sharding(layout: Layout) -> NamedSharding:
    """Return the sharding of `[B, ...]` batches as they arrive: whole rows."""
    return layout.sharding(ROWS)


def local_rows(rows: int, layout: Layout) -> np.ndarray:
    """Return which of a batch's rows this process's devices hold, ascending."""
    held = batch_sharding(layout).addressable_devices_indices_map((rows,))
    numbers = [np.arange(rows)[index] for index in held.values()]
    return np.unique(np.concatenate(numbers))


def put_batch(batch: dict[str, np.ndarray], rows: int, layout: Layout) -> dict:
    """Return this process's rows (those of `local_rows`) as global arrays."""
    place, held = batch_sharding(layout), local_rows(rows, layout)
    if len(held) == rows:  # all of them
        return {
            name: jax.make_array_from_callback(x.shape, place, x.__getitem__)
            for name, x in batch.items()
        }

    def put(x):
        def piece(index):
            start, stop, _ = index[0].indices(rows)
            first = np.searchsorted(held, start)
            return x[first : first + stop - start]

        shape = (rows, *x.shape[1:])
        return jax.make_array_from_callback(shape, place, piece)

    return {name: put(x) for name, x in batch.items()}


def is_shared(layout: Layout) -> bool:
    """Return whether the mesh has devices of several processes."""
    return len({device.process_index for device in layout.mesh.devices.flat}) > 1


def vote_sharding(layout: Layout) -> NamedSharding:
    """Return the sharding of `[devices]`: a number of each device's own process."""
    return layout.sharding(tuple(layout.mesh.axis_names))


def put_vote(vote: bool, layout: Layout) -> jax.Array:
    """Return `[devices]` int32, of which this process's are 1 or 0 by its own vote."""
    return jax.make_array_from_callback(
        (layout.mesh.size,), vote_sharding(layout), lambda _: np.full(1, vote, np.int32)
    )


def cut_rows(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Cut rows `[B, T]` over the context axis into `[B * C, T / C]` pieces.

    Piece c is chunks c and 2C - 1 - c of the 2C that a row has, so that under a causal
    mask every piece sees as many keys (zigzag: Llama 3, arXiv 2407.21783, 3.3.2). A
    piece is a row to all that looks at one token at a time; attention alone knows which
    pieces belong together. Each device keeps pieces of the rows that it had. What a
    row has but once, `[B]`, each of its pieces has.
    """
    held = _ACTIVE.get()
    num_pieces = 1 if held is None else held.size(CONTEXT)
    if num_pieces == 1:
        return batch
    groups = held.size(*ROWS)
    low = np.arange(num_pieces)
    order = np.stack([low, 2 * num_pieces - 1 - low], axis=1)

    def cut(x):
        rows = len(x)
        if x.ndim == 1:
            x = x.reshape(groups, 1, rows // groups)
            x = jnp.broadcast_to(x, (groups, num_pieces, rows // groups))
            return constrain(x.reshape(rows * num_pieces), "batch")
        length = x.shape[1]
        chunks = x.reshape(
            groups, rows // groups, 2 * num_pieces, length // 2 // num_pieces
        )
        pieces = jnp.moveaxis(chunks[:, :, order], 1, 2)  # group, piece, row, pair, t
        flat = pieces.reshape(rows * num_pieces, length // num_pieces)
        return constrain(flat, "batch", "length")

    return {name: cut(x) for name, x in batch.items()}


def sum_pieces(x: jax.Array) -> jax.Array:
    """Return `[B, ...]` sums over the pieces, `[B * C, ...]`, that `cut_rows` made."""
    held = _ACTIVE.get()
    num_pieces = 1 if held is None else held.size(CONTEXT)
    if num_pieces == 1:
        return x
    by_piece = x.reshape(held.size(*ROWS), num_pieces, -1, *x.shape[1:])
    summed = jnp.sum(by_piece, axis=1).reshape(-1, *x.shape[1:])
    return constrain(summed, "rows", *[None] * (x.ndim - 1))


# ---- inside compiled programs


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pin an activation to its logical axes; nothing happens outside a layout.

    A dim that does not divide is left whole: a batch of one prompt is no mistake.
    """
    held = _ACTIVE.get()
    if held is None or held.mesh.size == 1:
        return x
    kept = tuple(
        axis if axis and dim % held.size(*held.rules[axis]) == 0 else None
        for axis, dim in zip(axes, x.shape, strict=True)
    )
    return jax.lax.with_sharding_constraint(x, spec(kept, x.shape, held))


def cut_over(axis: str) -> tuple[str, ...]:
    """Return the mesh axes that cut a logical axis here."""
    held = _ACTIVE.get()
    if held is None:
        return ()
    return tuple(name for name in held.rules[axis] if held.mesh.shape[name] > 1)


def num_parts(rows: int) -> int:
    """Return over how many devices `rows` of a batch are cut here: 1 if unevenly."""
    held = _ACTIVE.get()
    parts = 1 if held is None else held.size(*held.rules["batch"])
    return 1 if rows % parts else parts


def sum_parts(x: jax.Array, axis: str) -> jax.Array:
    """Return the sum of `[parts, rows, embed]` tables, cut as a weight of `axis` is.

    Each device has made the table of its own rows of a batch. Said outright, for the
    partitioner would bring the whole sum to every device before it cuts it.
    """
    held = _ACTIVE.get()
    if held is None or len(x) == 1:
        return x[0] if len(x) == 1 else jnp.sum(x, axis=0)
    cut = tuple(a for a in held.rules["embed"] if held.mesh.shape[a] > 1)
    over = held.rules["batch"]
    rest = tuple(a for a in over if a not in cut and held.mesh.shape[a] > 1)
    # A classifier's few rows may not divide over what words are cut over.
    is_even = x.shape[1] % held.size(*held.rules[axis]) == 0
    if not set(cut) <= set(over) or not is_even:
        return constrain(jnp.sum(x, axis=0), axis, "embed")

    def add(part):
        total = part[0]
        for name in cut:
            total = jax.lax.psum_scatter(total, name, scatter_dimension=1, tiled=True)
        if cut:
            # Without it XLA adds up whole tables over all micro-batches to talk once.
            total = jax.lax.optimization_barrier(total)
        return jax.lax.psum(total, rest) if rest else total

    return per_device(add, (("batch", axis, None),), (axis, "embed"))(x)


@contextlib.contextmanager
def whole_rows() -> Iterator[None]:
    """Say within the block that rows were not cut, whatever the mesh: as prompts."""
    token = _IS_WHOLE.set(True)
    try:
        yield
    finally:
        _IS_WHOLE.reset(token)


def device() -> jax.Device:
    """Return one of the devices that what is traced here is for; all are alike."""
    held = _ACTIVE.get()
    return jax.devices()[0] if held is None else held.mesh.devices.flat[0]


def is_one_cpu() -> bool:
    """Return whether what is traced here is for a CPU as one device."""
    held = _ACTIVE.get()
    size = jax.device_count() if held is None else held.mesh.size
    return size == 1 and device().platform == "cpu"


def num_pieces() -> int:
    """Return into how many pieces `cut_rows` cuts a row here."""
    held = _ACTIVE.get()
    return 1 if held is None or _IS_WHOLE.get() else held.size(CONTEXT)


def per_device(do: Callable, in_axes: tuple, out_axes: tuple) -> Callable:
    """Return `do` as a function of each device's part of its arguments.

    in_axes, out_axes: the logical axes of each array's dims, or a tuple of mesh axes;
    () for an array that every device gets whole. Within it `jax.lax` collectives run
    over the mesh axes.
    """
    held = _ACTIVE.get()

    @functools.wraps(do)
    def call(*arrays):
        return jax.shard_map(
            do,
            mesh=held.mesh,
            in_specs=tuple(_entries(axes, held) for axes in in_axes),
            out_specs=_entries(out_axes, held),
            check_vma=False,
        )(*arrays)

    return call


def _entries(axes: tuple[str | tuple | None, ...], held: Layout) -> PartitionSpec:
    return PartitionSpec(
        *(held.rules[axis] if isinstance(axis, str) else axis for axis in axes)
    )
