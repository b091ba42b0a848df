"""Tests of attention in blocks and in chunks, on one device, against whole scores."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.models import attend, flash
from fm_jax.models.attend import Labels

LENGTH = 3 * attend.BLOCK


def _inputs(num_kv_heads, length=LENGTH):
    """Return queries, keys and values: of fewer dims, as under ALiBi."""
    rng = np.random.default_rng(3)
    return [
        rng.standard_normal((2, length, *dims)).astype(np.float32)
        for dims in ((6, 7), (num_kv_heads, 7), (num_kv_heads, 5))
    ]


def _labels(length=LENGTH):
    """Return documents of several lengths, and padding at the end of a row."""
    t = np.arange(length)
    starts = np.array([[0, 40, length // 2, length], [0, length - 9, length, length]])
    which_BT = np.sum(t >= starts[:, :, None], axis=1)
    positions_BT = t - np.take_along_axis(starts, which_BT - 1, axis=1)
    which_BT[1, -3:] = 0
    return Labels(positions_BT.astype(np.int32), which_BT.astype(np.int32))


SINKS_N = np.array([-1.0, 0.5, 2.0, 4.0, -30.0, 30.0], np.float32)


def _whole(q, k, v, sinks, labels, window, softcap):
    """Return attention by its formula: all scores at once, gradients by autodiff."""
    times = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, times, axis=2) for x in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k, precision="highest")
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    seen_BTS = attend.visible(labels, labels, window)
    scores = jnp.where(seen_BTS[:, None], scores, -1e30)
    if sinks is not None:
        column = jnp.broadcast_to(sinks[:, None, None], (*scores.shape[:3], 1))
        scores = jnp.concatenate([scores, column], axis=-1)
    probs = jax.nn.softmax(scores, axis=-1)[..., : k.shape[1]]
    return jnp.einsum("bnts,bsnh->btnh", probs, v, precision="highest")


def _blocks(q, k, v, sinks, labels, window, softcap):
    scores = {"sinks": sinks, "softcap": softcap, "dtype": jnp.float32}
    return attend.attend(q, k, v, labels, window, **scores)


def _flash(q, k, v, sinks, labels, window, softcap):
    scores = {"sinks": sinks, "softcap": softcap, "dtype": jnp.float32}
    return flash.attend(q, k, v, labels, window, **scores)


def _gradients(do, inputs, sinks, labels, window, softcap, probe):
    def probed(q, k, v, sinks, window):
        return jnp.sum(do(q, k, v, sinks, labels, window, softcap) * probe)

    of = (0, 1, 2) if sinks is None else (0, 1, 2, 3)
    return jax.jit(jax.grad(probed, argnums=of))(*inputs, sinks, window)


@pytest.mark.parametrize("do", [_blocks, _flash])
@pytest.mark.parametrize("num_kv_heads", [6, 2, 1])
@pytest.mark.parametrize(
    "window, softcap, sinks",
    [(None, 0.0, None), (50, 0.0, SINKS_N), (None, 1.5, None), (None, 1.5, SINKS_N)],
    ids=["plain", "window-sinks", "softcap", "softcap-sinks"],
)
def test_both_give_what_whole_scores_give(num_kv_heads, window, softcap, sinks, do):
    inputs, labels = _inputs(num_kv_heads), _labels()
    real_BT11 = (labels.segments > 0)[:, :, None, None]
    probe = np.random.default_rng(4).standard_normal((2, LENGTH, 6, 5)) * real_BT11
    found = do(*inputs, sinks, labels, window, softcap)
    expected = _whole(*inputs, sinks, labels, window, softcap)
    assert found.shape == probe.shape
    np.testing.assert_allclose(
        found * real_BT11, expected * real_BT11, rtol=0, atol=5e-6
    )
    every = zip(
        _gradients(do, inputs, sinks, labels, window, softcap, probe),
        _gradients(_whole, inputs, sinks, labels, window, softcap, probe),
        strict=True,
    )
    for ours, theirs in every:
        assert np.abs(theirs).max() > 0.5
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-5)


def test_no_scores_are_kept_for_the_backward_pass():
    inputs, labels = _inputs(2), _labels()

    def kept(do):
        _, pull = jax.vjp(lambda *x: do(*x, labels, None, 0.0), *inputs, SINKS_N)
        return max(leaf.size for leaf in jax.tree.leaves(pull))

    assert kept(_whole) >= 2 * 6 * LENGTH * LENGTH
    assert max(kept(_blocks), kept(_flash)) <= inputs[0].size


def test_no_array_holds_more_scores_than_a_pair_of_chunks_has(equations):
    inputs, labels = _inputs(2), _labels()
    gradient = functools.partial(
        _gradients,
        _flash,
        sinks=SINKS_N,
        labels=labels,
        window=None,
        softcap=0.0,
        probe=1.0,
    )
    jaxpr = jax.make_jaxpr(lambda *qkv: gradient(qkv))(*inputs)
    sizes = [out.aval.size for e in equations(jaxpr) for out in e.outvars]
    assert max(sizes) <= max(2 * 6 * attend.BLOCK**2, inputs[0].size)


def test_later_chunks_are_never_seen():
    inputs, labels = _inputs(2), _labels()
    before = _flash(*inputs, None, labels, None, 0.0)[:, : attend.BLOCK]
    for x in inputs:
        x[:, attend.BLOCK :] = np.nan
    found = _flash(*inputs, None, labels, None, 0.0)
    np.testing.assert_array_equal(found[:, : attend.BLOCK], before)
    assert np.isnan(found[:, attend.BLOCK :]).all()


def test_each_chunk_sees_itself_and_those_before_once(equations):
    inputs, labels = _inputs(2), _labels()
    jaxpr = jax.make_jaxpr(lambda *x: _flash(*x, None, labels, None, 0.0))(*inputs)
    (loop,) = [e for e in equations(jaxpr) if e.primitive.name == "scan"]
    assert loop.params["length"] == 3 * 4 // 2
    products = [e for e in equations(jaxpr) if e.primitive.name == "dot_general"]
    assert len(products) == 2  # one program for all pairs
