"""Tests of straight threefry against jax's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from fm_jax.models import draws

DRAWS = {
    "normal": lambda rng: jax.random.normal(rng, (3, 5, 7)),
    "uniform": lambda rng: jax.random.uniform(rng, (11,)),
    "scalar": jax.random.normal,
    "folded": lambda rng: jax.random.normal(jax.random.fold_in(rng, 2**32 - 3), (4,)),
    "bytes": lambda rng: jax.random.bits(rng, (5, 2), "uint8"),
    "keys": lambda rng: jax.random.key_data(jax.random.split(rng, (2, 3))),
    "stacked": lambda rng: jax.vmap(lambda one: jax.random.normal(one, (5, 3)))(
        jax.random.split(rng, 4)
    ),
}


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("seed", [0, 2**31 - 1])
def test_straight_keys_draw_what_jax_draws(name, seed):
    rng = jax.random.key(seed)
    straight = draws.straight(rng)
    assert straight.dtype != rng.dtype
    draw = jax.jit(DRAWS[name])
    np.testing.assert_array_equal(draw(straight), draw(rng))


def test_numbers_do_not_depend_on_the_mesh():
    mesh = jax.make_mesh((2, 4), ("data", "tensor"))
    cut = NamedSharding(mesh, PartitionSpec("tensor", "data"))
    rng = jax.random.key(5)

    def draw(rng):
        return jax.random.normal(draws.straight(rng), (12, 6))

    found = jax.jit(draw, out_shardings=cut)(rng)
    assert found.sharding == cut
    np.testing.assert_array_equal(found, jax.random.normal(rng, (12, 6)))


def test_elements_whose_numbers_are_too_large_are_drawn_by_jax(monkeypatch):
    monkeypatch.setattr(draws, "MOST", 34)
    monkeypatch.setattr(draws, "_hash", None)
    rng = jax.random.key(3)
    found = jax.random.normal(draws.straight(rng), (5, 7))
    np.testing.assert_array_equal(found, jax.random.normal(rng, (5, 7)))


def test_elements_are_numbered_in_row_major_order():
    np.testing.assert_array_equal(
        draws._numbered((3, 1, 5)), jnp.arange(15, dtype="uint32").reshape(3, 1, 5)
    )


def test_keys_of_other_generators_stay():
    rng = jax.random.key(0, impl="rbg")
    assert draws.straight(rng) is rng


def test_another_seed_of_a_straight_key_is_that_of_threefry():
    straight = draws.straight(jax.random.key(7))
    again = jax.random.key(7, impl=jax.random.key_impl(straight))
    np.testing.assert_array_equal(
        jax.random.key_data(again), jax.random.key_data(jax.random.key(7))
    )
