"""Digests of arrays, for what a storage may change without a word.

A digest is a sum over elements, so that it is the same however an array is cut over
devices, and each adds up its own part. It says that what was read is what was saved,
not that what was saved was right.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax import trees

WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
SPREAD = 0x9E3779B1  # 2**32 over the golden ratio: neighbours get far-off factors


def of(tree: Any) -> dict[str, int]:
    """Return `{path name: digest}` of a tree of arrays, each below 2**32."""
    found = trees.leaves_by_path(_of_leaves(tree))
    return {path: int(np.asarray(value)) for path, value in found.items()}


def part(elements: np.ndarray, first: int) -> int:
    """Return what elements add to their array's digest, on the host.

    first: how many elements stand before them, in row-major order; they follow each
    other. The digest is the sum over all parts, modulo 2**32.
    """
    kind = f"uint{8 * elements.dtype.itemsize}"
    words = np.ravel(elements).view(kind).astype(np.uint32)
    place = np.arange(first, first + words.size, dtype=np.uint64).astype(np.uint32)
    place *= np.uint32(2 * SPREAD % 2**32)
    place += np.uint32(1)
    return int(np.sum(words * place, dtype=np.uint32))


def changed(before: dict[str, int], after: dict[str, int]) -> list[str]:
    """Return the paths in both of which the digests differ."""
    return [path for path in after if before.get(path, after[path]) != after[path]]


@jax.jit
def _of_leaves(tree):
    return jax.tree.map(_digest, tree)


def _digest(x: jax.Array) -> jax.Array:
    """Return the sum over elements of their bits times an odd number of their place.

    In 32 bits, which wrap: an odd factor has an inverse, so one element that changes
    always shows; of other changes one in 2**32 does not.
    """
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    words = jax.lax.bitcast_convert_type(x, WORDS[x.dtype.itemsize]).astype(jnp.uint32)
    place = functools.reduce(
        lambda place, dim: (
            place * jnp.uint32(x.shape[dim] % 2**32)
            + jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim)
        ),
        range(x.ndim),
        jnp.zeros(x.shape, jnp.uint32),
    )
    return jnp.sum(words * (place * jnp.uint32(SPREAD) * 2 + 1), dtype=jnp.uint32)
