"""The product of rows sorted by group with a matrix for each group.

Legend: M rows, of which the first `sum(sizes)` belong to a group, the others to none; G
groups; K and N the dims of a group's matrix.

On a TPU `jax.lax.ragged_dot` is a kernel that does each row once. Elsewhere (jaxlib
0.10 on CPUs and GPUs), and for the gradient of the matrices on TPUs too, XLA multiplies
all rows with all matrices: G times the work, and as much more memory. There the rows
are done in blocks of one group each, in a loop: at most a block for each group more
than the rows fill, none of which is done twice.
"""

import functools

import jax
import jax.numpy as jnp

from fm_jax.products import Eight, matmul, whole

MOST_ROWS = {"cpu": 128, "other": 512}  # of a block; larger ones waste more


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def product(
    a_MK: jax.Array,
    b_GKN: jax.Array | Eight,
    sizes_G: jax.Array | None,
    dtype: jnp.dtype,
    cut: tuple[tuple[str, ...], ...] = ((), ()),
) -> jax.Array:
    """Return each row times its group's matrix, `[M, N]` in float32; 0 without group.

    sizes_G: the rows of each group; None: all have as many, and no row has none.
    Operands are rounded to `dtype`, in the backward pass too. cut: the mesh axes over
    which the matrices' dims K and N are cut and shall be fetched, within
    `sharding.per_device`: rounded, and again for the backward pass, whose gradient goes
    back as sums in float32, cut the same way. Matrices in eight bits have no gradient.
    """
    return _times(a_MK, _fetched(b_GKN, dtype, cut), sizes_G, dtype, is_turned=False)


def _forward(a_MK, b_GKN, sizes_G, dtype, cut):
    return product(a_MK, b_GKN, sizes_G, dtype, cut), (a_MK, b_GKN, sizes_G)


def _backward(dtype, cut, kept, d_MN):
    a_MK, b_GKN, sizes_G = kept
    whole_GKN = _fetched(b_GKN, dtype, cut)
    d_a_MK = _times(d_MN, whole_GKN, sizes_G, dtype, is_turned=True)
    if isinstance(b_GKN, Eight):
        return d_a_MK.astype(a_MK.dtype), None, None
    d_b_GKN = _outer_products(a_MK, d_MN, sizes_G, dtype, len(b_GKN))
    for dim, axes in enumerate(cut, start=1):
        if axes:
            d_b_GKN = jax.lax.psum_scatter(
                d_b_GKN, axes, scatter_dimension=dim, tiled=True
            )
    return d_a_MK.astype(a_MK.dtype), d_b_GKN.astype(b_GKN.dtype), None


product.defvjp(_forward, _backward)


def _fetched(b_GKN, dtype, cut):
    b_GKN = whole(b_GKN)
    for dim, axes in enumerate(cut, start=1):
        if axes:
            b_GKN = jax.lax.all_gather(b_GKN.astype(dtype), axes, axis=dim, tiled=True)
    return b_GKN


def _times(a_MK, b, sizes_G, dtype, *, is_turned):
    if sizes_G is None:
        b_GKN = jnp.swapaxes(b, 1, 2) if is_turned else b
        a_GRK = a_MK.reshape(len(b), -1, a_MK.shape[1])
        y_GRN = matmul(a_GRK, b_GKN, dtype)
        return y_GRN.reshape(len(a_MK), -1)
    return jax.lax.platform_dependent(
        a_MK,
        b,
        sizes_G,
        tpu=functools.partial(by_kernel, dtype=dtype, is_turned=is_turned),
        cpu=functools.partial(by_blocks, dtype=dtype, is_turned=is_turned),
        default=functools.partial(
            by_blocks, dtype=dtype, is_turned=is_turned, most=MOST_ROWS["other"]
        ),
    )


def by_kernel(a_MK, b, sizes_G, *, dtype, is_turned):
    """Return the product by `jax.lax.ragged_dot`. is_turned: b is `[G, N, K]`."""
    b_GKN = jnp.swapaxes(b, 1, 2) if is_turned else b
    y_MN = jax.lax.ragged_dot(
        a_MK.astype(dtype),
        b_GKN.astype(dtype),
        sizes_G.astype(jnp.int32),
        preferred_element_type=jnp.float32,
    )
    return jnp.where(jnp.arange(len(y_MN))[:, None] < jnp.sum(sizes_G), y_MN, 0)


def by_blocks(a_MK, b, sizes_G, *, dtype, is_turned, most=MOST_ROWS["cpu"]):
    """Return the product block by block. is_turned: b is `[G, N, K]`.

    A block writes the rows after those of its group too, which the next ones put right.
    """
    count, rows = len(a_MK), _block(len(a_MK), len(b), most)
    num_out = b.shape[1 if is_turned else 2]
    over = (((1,), (1 if is_turned else 0,)), ((), ()))
    a_MK = _padded(a_MK, rows, dtype)

    def do(y_MN, block):
        b_KN = jax.lax.dynamic_index_in_dim(b, block["group"], keepdims=False)
        part_RN = jax.lax.dot_general(
            jax.lax.dynamic_slice_in_dim(a_MK, block["start"], rows),
            b_KN.astype(dtype),
            over,
            preferred_element_type=jnp.float32,
        )
        return jax.lax.dynamic_update_slice_in_dim(y_MN, part_RN, block["start"], 0)

    zero_MN = jnp.zeros((count + rows, num_out), jnp.float32)
    y_MN = _each(do, zero_MN, _blocks(sizes_G, count, rows))
    return jnp.where(jnp.arange(count)[:, None] < jnp.sum(sizes_G), y_MN[:count], 0)


def _outer_products(a_MK, d_MN, sizes_G, dtype, num_groups):
    """Return the gradient of the matrices, `[G, K, N]` in float32."""
    if sizes_G is None:
        a_GRK, d_GRN = (x.reshape(num_groups, -1, x.shape[1]) for x in (a_MK, d_MN))
        return matmul(jnp.swapaxes(a_GRK, 1, 2), d_GRN, dtype)
    outer = functools.partial(outer_by_blocks, dtype=dtype)
    return jax.lax.platform_dependent(
        a_MK,
        d_MN,
        sizes_G,
        cpu=functools.partial(outer, most=MOST_ROWS["cpu"]),
        default=functools.partial(outer, most=MOST_ROWS["other"]),
    )


def outer_by_blocks(a_MK, d_MN, sizes_G, *, dtype, most):
    """Return each group's `a.T @ d` over its rows, `[G, K, N]`, block by block."""
    count, groups = len(a_MK), len(sizes_G)
    rows = _block(count, groups, most)
    a_MK, d_MN = (_padded(x, rows, dtype) for x in (a_MK, d_MN))

    def do(sums_GKN, block):
        is_own_R1 = (jnp.arange(rows) < block["left"])[:, None]
        a_RK, d_RN = (
            jnp.where(
                is_own_R1, jax.lax.dynamic_slice_in_dim(x, block["start"], rows), 0
            )
            for x in (a_MK, d_MN)
        )
        over = (((0,), (0,)), ((), ()))
        part_KN = jax.lax.dot_general(
            a_RK, d_RN, over, preferred_element_type=jnp.float32
        )
        return sums_GKN.at[block["group"]].add(part_KN)

    zero_GKN = jnp.zeros((groups, a_MK.shape[1], d_MN.shape[1]), jnp.float32)
    return _each(do, zero_GKN, _blocks(sizes_G, count, rows))


def _block(count: int, groups: int, most: int) -> int:
    """Return the rows of a block: a power of 2, about twice what a group has."""
    rows = 1
    while rows < most and rows * groups < 2 * count:
        rows *= 2
    return rows


def _padded(x, rows, dtype):
    return jnp.pad(x.astype(dtype), ((0, rows), (0, 0)))


def _blocks(sizes_G, count, rows):
    """Return each block's group, first row, rows left in the group, and if it is one.

    As many as there can be, the real ones first.
    """
    num_blocks = min(-(-count // rows) + len(sizes_G) - 1, count)
    of_group_G = -(-sizes_G // rows)
    ends_G = jnp.cumsum(of_group_G)
    index = jnp.arange(num_blocks)
    group = jnp.searchsorted(ends_G, index, side="right")
    group = jnp.minimum(group, len(sizes_G) - 1)
    within = (index - (ends_G - of_group_G)[group]) * rows
    return {
        "group": group,
        "start": (jnp.cumsum(sizes_G) - sizes_G)[group] + within,
        "left": sizes_G[group] - within,
        "is_real": index < ends_G[-1],
    }


def _each(do, carry, blocks):
    def step(carry, block):
        skip = lambda carry, block: carry  # noqa: E731
        return jax.lax.cond(block["is_real"], do, skip, carry, block), None

    return jax.lax.scan(step, carry, blocks)[0]
