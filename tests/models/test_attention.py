"""Tests of windows in a whole model and of the cache of keys and values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.models import attention, zoo


@pytest.mark.parametrize(
    "window, pattern, expected", [(3, "L", 3), (1, "L", 1), (3, "G", 11)]
)
def test_a_window_counts_the_query_itself(
    window, pattern, expected, model_config, random_params
):
    config = model_config(num_layers=1, window=window, window_pattern=pattern)
    model = zoo.build(config)
    params = random_params(model.abstract)
    positions_BT, segments_BT = np.arange(11)[None], np.ones((1, 11), int)
    # Each row is the same but for one token, each time another one.
    tokens_BT = np.tile(np.arange(11), (12, 1))
    tokens_BT[np.arange(11), np.arange(11)] += 20

    @jax.jit
    def hidden(params):
        return model.hidden(
            params,
            tokens_BT,
            np.repeat(positions_BT, 12, axis=0),
            np.repeat(segments_BT, 12, axis=0),
        )[0]

    x_BTD = np.asarray(hidden(params))
    moved_ST = np.any(x_BTD[:11] != x_BTD[11], axis=-1)
    t, s = np.arange(11), np.arange(11)[:, None]
    np.testing.assert_array_equal(moved_ST, (s <= t) & (t - s < expected))


def test_an_empty_cache_has_a_slot_for_each_token_of_each_layer(model_config):
    cache = attention.empty_cache(model_config(dtype="bfloat16"), 5, 13)
    assert cache["k"].shape == cache["v"].shape == (3, 5, 13, 2, 6)
    assert cache["k"].dtype == cache["v"].dtype == jnp.bfloat16
    assert cache["slot"] == 0 and not cache["segments"].any()


def test_claimed_slots_are_labelled_in_the_order_of_the_calls(model_config):
    cache = attention.empty_cache(model_config(), 2, 5)
    first_BT, second_BT = jnp.array([[0, 1], [0, 0]]), jnp.array([[2], [1]])
    cache = attention.claim_slots(cache, first_BT, jnp.array([[1, 1], [0, 1]]))
    cache = attention.claim_slots(cache, second_BT, jnp.array([[1], [1]]))
    assert cache["slot"] == 3
    np.testing.assert_array_equal(
        cache["positions"], [[0, 1, 2, 0, 0], [0, 0, 1, 0, 0]]
    )
    np.testing.assert_array_equal(cache["segments"], [[1, 1, 1, 0, 0], [0, 1, 1, 0, 0]])
