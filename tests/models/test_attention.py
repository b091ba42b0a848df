"""Tests of the attention product, its masks and its cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.models import attention, zoo

LENGTH = 2 * attention.BLOCK


def _inputs(length, num_heads=6, num_kv_heads=2):
    """Return random float32 queries, keys and values, B=2 and H=5."""
    rng = np.random.default_rng(1)
    counts = (num_heads, num_kv_heads, num_kv_heads)
    return [
        rng.standard_normal((2, length, count, 5)).astype(np.float32) * 2
        for count in counts
    ]


def _packed_mask(length):
    """Return a causal mask [2, T, T] of rows with documents, padding and a window."""
    t, s = np.arange(length)[:, None], np.arange(length)
    cuts = np.array([[length // 3, length - 7], [length // 2 + 1, length - 1]])
    segments_BT = (s >= cuts[:, :1]) * 1 + (s >= cuts[:, 1:]) * 1
    same_BTS = segments_BT[:, :, None] == segments_BT[:, None, :]
    return same_BTS & (s <= t) & (t - s < 3 * length // 4)


def _softmax_attention(q_BTNH, k_BSKH, v_BSKH, mask_BTS, softcap):
    """Return attention in float64: a loop over rows and heads, exponentials of seen."""
    out_BTNH = np.zeros(q_BTNH.shape)
    group = q_BTNH.shape[2] // k_BSKH.shape[2]
    q, k, v = (x.astype(np.float64) for x in (q_BTNH, k_BSKH, v_BSKH))
    for b, n in np.ndindex(q.shape[0], q.shape[2]):
        scores_TS = q[b, :, n] @ k[b, :, n // group].T / np.sqrt(q.shape[3])
        if softcap:
            scores_TS = softcap * np.tanh(scores_TS / softcap)
        shares_TS = np.where(mask_BTS[b], np.exp(scores_TS), 0)
        shares_TS /= shares_TS.sum(-1, keepdims=True)
        out_BTNH[b, :, n] = shares_TS @ v[b, :, n // group]
    return out_BTNH


@functools.partial(jax.jit, static_argnames=("softcap", "is_causal"))
def _attend(q_BTNH, k_BSKH, v_BSKH, mask_BTS, *, softcap=0.0, is_causal):
    return attention.attend(
        q_BTNH,
        k_BSKH,
        v_BSKH,
        mask_BTS,
        softcap=softcap,
        dtype=jnp.float32,
        is_causal=is_causal,
    )


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_attend_equals_a_plain_softmax(softcap, is_causal):
    inputs, mask_BTS = _inputs(LENGTH), _packed_mask(LENGTH)
    found = _attend(*inputs, mask_BTS, softcap=softcap, is_causal=is_causal)
    expected = _softmax_attention(*inputs, mask_BTS, softcap)
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-6)


def test_blocks_of_queries_do_not_change_gradients():
    inputs, mask_BTS = _inputs(LENGTH), _packed_mask(LENGTH)
    probe = np.random.default_rng(4).standard_normal(inputs[0].shape)

    def gradients(is_causal):
        def probed(q, k, v):
            return jnp.sum(_attend(q, k, v, mask_BTS, is_causal=is_causal) * probe)

        return jax.jit(jax.grad(probed, argnums=(0, 1, 2)))(*inputs)

    for in_blocks, at_once in zip(gradients(True), gradients(False), strict=True):
        np.testing.assert_allclose(in_blocks, at_once, rtol=0, atol=2e-5)


def test_blocks_never_touch_the_keys_after_them():
    q_BTNH, k_BSKH, v_BSKH = _inputs(LENGTH)
    mask_BTS, block = _packed_mask(LENGTH), attention.BLOCK
    expected = _softmax_attention(q_BTNH, k_BSKH, v_BSKH, mask_BTS, 0.0)
    k_BSKH[:, block:], v_BSKH[:, block:] = np.nan, np.nan
    found = _attend(q_BTNH, k_BSKH, v_BSKH, mask_BTS, is_causal=True)
    np.testing.assert_allclose(found[:, :block], expected[:, :block], rtol=0, atol=5e-6)
    assert np.isnan(found[:, block:]).all()


def test_lengths_that_blocks_do_not_divide_are_taken_whole():
    inputs = _inputs(attention.BLOCK + 9)
    mask_BTS = _packed_mask(attention.BLOCK + 9)
    found = _attend(*inputs, mask_BTS, is_causal=True)
    expected = _softmax_attention(*inputs, mask_BTS, 0.0)
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-6)


def test_queries_that_see_nothing_get_an_average_and_no_nan():
    inputs = _inputs(7)
    mask_BTS = np.tri(7, dtype=bool)[None].repeat(2, axis=0)
    mask_BTS[1, 2:4] = False

    def probed(q, k, v):
        out_BTNH = _attend(q, k, v, mask_BTS, softcap=3.0, is_causal=True)
        return jnp.sum(out_BTNH**2), out_BTNH

    gradients, out_BTNH = jax.jit(jax.grad(probed, argnums=(0, 1, 2), has_aux=True))(
        *inputs
    )
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    mean_KH = inputs[2][1].mean(axis=0)
    for t in (2, 3):
        expected_NH = mean_KH.repeat(3, axis=0)
        np.testing.assert_allclose(out_BTNH[1, t], expected_NH, rtol=0, atol=1e-6)


def test_bfloat16_rounds_the_products_and_not_the_result():
    inputs, mask_BTS = _inputs(11), _packed_mask(11)
    found = attention.attend(
        *inputs, mask_BTS, softcap=0.0, dtype=jnp.bfloat16, is_causal=True
    )
    assert found.dtype == jnp.float32
    assert not np.array_equal(found, found.astype(jnp.bfloat16))
    expected = _softmax_attention(*inputs, mask_BTS, 0.0)
    error = np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2))
    assert 2**-10 < error < 2**-6


def test_a_query_sees_its_document_up_to_itself():
    q_positions, q_segments = [0, 1, 2, 0, 1, 0], [1, 1, 1, 2, 2, 0]
    k_positions, k_segments = [0, 1, 2, 0, 1, 0, 0], [1, 1, 1, 2, 2, 0, 3]
    seen_BTS, back_BTS = attention.visible(
        *(
            jnp.array([values])
            for values in (q_positions, k_positions, q_segments, k_segments)
        )
    )
    for t in range(6):
        for s in range(7):
            same = q_segments[t] == k_segments[s]
            assert seen_BTS[0, t, s] == (same and k_positions[s] <= q_positions[t])
            assert back_BTS[0, t, s] == q_positions[t] - k_positions[s]


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
