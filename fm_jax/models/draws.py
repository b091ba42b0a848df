"""Threefry drawn straight: jax's own numbers by a program that a CPU likes.

Initial weights are drawn by threefry 2x32 (Salmon et al. 2011, "Parallel random
numbers: as easy as 1, 2, 3"), a hash of a key and of each element's number: what a
weight is follows from its place in the whole array, whatever the mesh, the device, the
compiler and what is vmapped. jax promises none of that of XLA's own generators, `rbg`
and `unsafe_rbg`: under vmap they draw other numbers, and on a CPU, though they compile
faster, they run slower. jax compiles threefry for a CPU as a loop, which writes whole
arrays in each of its turns; here its rounds stand in a row and fuse into the one pass
that writes the weights, which halves the time and needs no memory beside them.
"""

import math

import jax
import jax.numpy as jnp
from jax.extend import random as extended

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = 0x1BD11BDA
THREEFRY = "threefry2x32"
MOST = 2**32  # elements whose numbers are of 32 bits


def straight(rng: jax.Array) -> jax.Array:
    """Return a key that draws what `rng` draws, where that is a key of threefry.

    Of normal and uniform float32 numbers and of keys, that is. Under
    jax_threefry_partitionable, without which numbers depend on the mesh.
    """
    is_partitionable = jax.config.jax_threefry_partitionable
    if jax.random.key_impl(rng) != THREEFRY or not is_partitionable:
        return rng
    return jax.random.wrap_key_data(jax.random.key_data(rng), impl=_IMPL)


def _hash(key, high, low):
    """Return two words for each number of two words, all uint32, in twenty rounds."""
    words = (key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(PARITY))
    a, b = high + words[0], low + words[1]
    for turn in range(5):
        for by in ROTATIONS[turn % 2]:
            a = a + b
            b = a ^ ((b << by) | (b >> (32 - by)))
        a = a + words[(turn + 1) % 3]
        b = b + words[(turn + 2) % 3] + jnp.uint32(turn + 1)
    return a, b


def _numbered(shape):
    """Return the number of each element, uint32, in row-major order."""
    number, stride = jnp.zeros(shape, jnp.uint32), 1
    for dim in reversed(range(len(shape))):
        place = jax.lax.broadcasted_iota(jnp.uint32, shape, dim)
        number, stride = number + place * jnp.uint32(stride), stride * shape[dim]
    return number


def _random_bits(key, bit_width, shape):
    if bit_width != 32 or math.prod(shape) > MOST:
        theirs = jax.random.wrap_key_data(key, impl=THREEFRY)
        return jax.random.bits(theirs, shape, f"uint{bit_width}")
    a, b = _hash(key, jnp.uint32(0), _numbered(shape))
    return a ^ b


def _split(key, shape):
    return jnp.stack(_hash(key, jnp.uint32(0), _numbered(shape)), axis=-1)


def _fold_in(key, data):
    return jnp.stack(_hash(key, jnp.uint32(0), jnp.asarray(data, jnp.uint32)))


def _seed(seed):
    return jax.random.key_data(jax.random.key(seed, impl=THREEFRY))


_IMPL = extended.define_prng_impl(
    key_shape=(2,),
    seed=_seed,
    split=_split,
    random_bits=_random_bits,
    fold_in=_fold_in,
    name="fm_jax_straight_threefry2x32",
    tag="fms",
)
