"""Tests of attention chunk by chunk, on one device, against whole scores."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.models import attend, flash
from fm_jax.models.attend import Labels

LENGTH = 3 * attend.BLOCK


def _inputs(num_kv_heads, length=LENGTH):
    rng = np.random.default_rng(3)
    return [
        2 * rng.standard_normal((2, length, count, 5)).astype(np.float32)
        for count in (6, num_kv_heads, num_kv_heads)
    ]


def _labels(length=LENGTH):
    """Return documents of several lengths, and padding at the end of a row."""
    t = np.arange(length)
    starts = np.array([[0, 40, length // 2, length], [0, length - 9, length, length]])
    which_BT = np.sum(t >= starts[:, :, None], axis=1)
    positions_BT = t - np.take_along_axis(starts, which_BT - 1, axis=1)
    which_BT[1, -3:] = 0
    return Labels(positions_BT.astype(np.int32), which_BT.astype(np.int32))


def _whole(q, k, v, labels, window, softcap, dtype=jnp.float32):
    """Return attention with all scores at once."""
    return attend.attend(
        q, k, v, labels, labels, window, softcap=softcap, dtype=dtype, is_causal=False
    )


def _flash(q, k, v, labels, window, softcap, dtype=jnp.float32):
    return flash.attend(q, k, v, labels, window, softcap=softcap, dtype=dtype)


def _gradients(do, inputs, labels, window, softcap, probe):
    def probed(q, k, v, window):
        return jnp.sum(do(q, k, v, labels, window, softcap) * probe)

    return jax.jit(jax.grad(probed, argnums=(0, 1, 2)))(*inputs, window)


@pytest.mark.parametrize("num_kv_heads", [6, 2, 1])
@pytest.mark.parametrize("window, softcap", [(None, 0.0), (50, 0.0), (None, 1.5)])
def test_chunks_give_what_whole_scores_give(num_kv_heads, window, softcap):
    inputs, labels = _inputs(num_kv_heads), _labels()
    real_BT11 = (labels.segments > 0)[:, :, None, None]
    probe = np.random.default_rng(4).standard_normal(inputs[0].shape) * real_BT11
    found = _flash(*inputs, labels, window, softcap)
    expected = _whole(*inputs, labels, window, softcap)
    np.testing.assert_allclose(
        found * real_BT11, expected * real_BT11, rtol=0, atol=5e-6
    )
    every = zip(
        _gradients(_flash, inputs, labels, window, softcap, probe),
        _gradients(_whole, inputs, labels, window, softcap, probe),
        strict=True,
    )
    for ours, theirs in every:
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-5)


def test_no_scores_are_kept_for_the_backward_pass():
    inputs, labels = _inputs(2), _labels()

    def kept(do):
        _, pull = jax.vjp(lambda q, k, v: do(q, k, v, labels, None, 0.0), *inputs)
        return max(leaf.size for leaf in jax.tree.leaves(pull))

    assert kept(_whole) >= 2 * 6 * LENGTH * LENGTH
    assert kept(_flash) <= inputs[0].size


def test_no_array_holds_more_scores_than_a_pair_of_chunks_has(equations):
    inputs, labels = _inputs(2), _labels()
    gradient = functools.partial(
        _gradients, _flash, labels=labels, window=None, softcap=0.0, probe=1.0
    )
    jaxpr = jax.make_jaxpr(lambda *qkv: gradient(qkv))(*inputs)
    sizes = [out.aval.size for e in equations(jaxpr) for out in e.outvars]
    assert max(sizes) <= max(2 * 6 * attend.BLOCK**2, inputs[0].size)


def test_later_chunks_are_never_seen():
    inputs, labels = _inputs(2), _labels()
    before = _flash(*inputs, labels, None, 0.0)[:, : attend.BLOCK]
    for x in inputs:
        x[:, attend.BLOCK :] = np.nan
    found = _flash(*inputs, labels, None, 0.0)
    np.testing.assert_array_equal(found[:, : attend.BLOCK], before)
    assert np.isnan(found[:, attend.BLOCK :]).all()


def test_each_chunk_sees_itself_and_those_before_once(equations):
    inputs, labels = _inputs(2), _labels()
    jaxpr = jax.make_jaxpr(lambda *x: _flash(*x, labels, None, 0.0))(*inputs)
    (loop,) = [e for e in equations(jaxpr) if e.primitive.name == "scan"]
    assert loop.params["length"] == 3 * 4 // 2
    products = [e for e in equations(jaxpr) if e.primitive.name == "dot_general"]
    assert len(products) == 2  # one program for all pairs
