"""Tests of fused attention: kernels in interpret mode or lowered, and their choice."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as jax_cudnn

from fm_jax import meshes, sharding
from fm_jax.models import attend, attention, fused, zoo
from fm_jax.models.attend import Labels

SINKS_N = np.array([-1.0, 0.5, 2.0, 4.0, -30.0, 30.0], np.float32)
PLAIN = {"sinks": None, "softcap": 0.0}


def _inputs(num_kv_heads, length, rows=2):
    rng = np.random.default_rng(3)
    return [
        rng.standard_normal((rows, length, num_heads, 8)).astype(np.float32)
        for num_heads in (6, num_kv_heads, num_kv_heads)
    ]


def _labels(length, rows=2):
    """Return documents that begin elsewhere in every row, and padding at one's end."""
    t = np.arange(length)
    begins = np.array([[0, 40 + 9 * row, length // 2 + row] for row in range(rows)])
    which_BT = np.sum(t >= begins[:, :, None], axis=1)
    positions_BT = t - np.take_along_axis(begins, which_BT - 1, axis=1)
    which_BT[1, -3:] = 0
    return Labels(positions_BT.astype(np.int32), which_BT.astype(np.int32))


def _whole(q, k, v, sinks, labels, window, softcap=0.0):
    how = {"sinks": sinks, "softcap": softcap, "dtype": jnp.float32}
    return attend.attend(q, k, v, labels, window or None, **how)


def _assert_same(do, theirs, inputs, sinks, labels):
    """Assert that outputs and gradients agree where tokens are no padding."""
    real_BT11 = (labels.segments > 0)[:, :, None, None]
    probe = np.random.default_rng(4).standard_normal(inputs[0].shape) * real_BT11

    def both(do):
        def probed(q, k, v, sinks):
            out = do(q, k, v, sinks)
            return jnp.sum(out * probe), out

        of = (0, 1, 2) if sinks is None else (0, 1, 2, 3)
        return jax.jit(jax.grad(probed, argnums=of, has_aux=True))(*inputs, sinks)

    (found, out), (expected, their_out) = both(do), both(theirs)
    np.testing.assert_allclose(
        out * real_BT11, their_out * real_BT11, rtol=0, atol=5e-6
    )
    for ours, theirs_d in zip(found, expected, strict=True):
        assert np.abs(theirs_d).max() > 0.5
        np.testing.assert_allclose(ours, theirs_d, rtol=0, atol=3e-5)


# Splash.


@pytest.mark.parametrize(
    "num_kv_heads, length, window, softcap, sinks",
    [
        (6, 128, 0, 0.0, None),
        (2, 300, 50, 0.0, SINKS_N),
        (1, 256, 128, 0.0, None),
        (2, 1024, 129, 1.5, None),
    ],
    ids=["heads", "padded-window-sinks", "one-key-head", "tiles-softcap"],
)
def test_splash_gives_what_whole_scores_give(
    num_kv_heads, length, window, softcap, sinks
):
    labels = _labels(length)

    def splash(q, k, v, sinks):
        how = {"sinks": sinks, "softcap": softcap, "interpret": True}
        return fused.splash(q, k, v, labels, window, **how)

    def whole(q, k, v, sinks):
        return _whole(q, k, v, sinks, labels, window, softcap)

    _assert_same(splash, whole, _inputs(num_kv_heads, length), sinks, labels)


def _mesh():
    return meshes.make(dict.fromkeys(meshes.AXES, 1) | {"data": 4, "tensor": 2})


@pytest.fixture
def interpreted(monkeypatch):
    """Let a CPU choose splash, and interpret it, whatever the dtype."""
    monkeypatch.setattr(fused, "choose", lambda *_, **__: fused.SPLASH)
    splash = functools.partial(fused.splash, interpret=True)
    monkeypatch.setitem(fused._KERNELS, fused.SPLASH, splash)


@pytest.mark.parametrize("window", [None, 1 << 30, 50], ids=["none", "far", "near"])
def test_devices_that_share_rows_and_heads_give_the_same(window, interpreted):
    inputs, labels = _inputs(2, 128, rows=4), _labels(128, rows=4)
    layout = sharding.layout(_mesh())
    how = {"kernel": fused.SPLASH, "windows": (0, 50), "softcap": 0.0}

    @jax.jit
    def shared(window):
        traced = None if window is None else jnp.int32(window)
        how_here = how | {"sinks": SINKS_N, "dtype": jnp.float32}
        return fused.attend(*inputs, labels, traced, **how_here)

    with layout.active():
        found = shared(window)
    real_BT11 = (labels.segments > 0)[:, :, None, None]
    expected = _whole(*inputs, SINKS_N, labels, window)
    np.testing.assert_allclose(
        found * real_BT11, expected * real_BT11, rtol=0, atol=5e-6
    )
    assert found.sharding.spec[0] is not None
    assert found.sharding.spec[2] == "tensor"


@pytest.mark.parametrize("side, block, window", [(1, 8, 3), (5, 4, 6), (5, 4, 0)])
def test_tiles_are_those_with_something_to_see(side, block, window):
    back = np.subtract.outer(np.arange(side * block), np.arange(side * block))
    seen = (back >= 0) & (back < (window or side * block))
    tiles = seen.reshape(side, block, side, block).any(axis=(1, 3))
    assert fused._num_tiles(side, block, window) == tiles.sum()


@pytest.mark.parametrize(
    "length, tiles",
    [(128, (128, 128)), (129, (256, 128)), (1024, (1024, 256)), (8192, (8192, 512)),
     (2560, (2560, 512)), (2176, (2176, 128))],
)  # fmt: skip
def test_rows_are_padded_to_lanes_and_cut_by_what_divides_them(length, tiles):
    assert fused._tiles(length) == tiles


# cuDNN's.


@pytest.fixture
def cudnn(monkeypatch):
    """Let jax lower for cuDNN, of which it asks the version, where there is none."""
    monkeypatch.setattr(jax_cudnn, "check_cudnn_version", lambda: 91_100)


@pytest.mark.parametrize("window", [0, 50])
@pytest.mark.parametrize("documents", ["one", "many"])
def test_what_cudnn_is_told_is_the_mask(documents, window, monkeypatch):
    asked = jax.nn.dot_product_attention

    def by_xla(*args, implementation, **kwargs):
        assert implementation == "cudnn"
        return asked(*args, implementation="xla", **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    labels = _labels(128)
    if documents == "one":
        segments_BT = np.minimum(labels.segments, 1)
        positions_BT = np.tile(np.arange(128, dtype=np.int32), (2, 1))
        labels = Labels(positions_BT, segments_BT)

    def ours(q, k, v, _):
        return fused.cudnn(q, k, v, labels, window, **PLAIN)

    def whole(q, k, v, _):
        return _whole(q, k, v, None, labels, window)

    _assert_same(ours, whole, _inputs(2, 128), None, labels)


def test_a_gpu_is_given_cudnns_kernels_with_and_without_masks(cudnn):
    inputs = [x.astype(jnp.bfloat16) for x in _inputs(2, 128)]
    labels = _labels(128)

    def both(q, k, v):
        def do(q, k, v):
            return fused.cudnn(q, k, v, labels, 32, **PLAIN)

        out, pull = jax.vjp(do, q, k, v)
        return pull(out)

    traced = jax.jit(both).trace(*inputs)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    called = set(re.findall(r"@__cudnn\$fmha(\w+)", text))
    ways = {"Softmax", "ScaleBiasSoftmax"}
    assert called == ways | {f"{way}Backward" for way in ways}
    assert set(re.findall(r"mask_type\W+22\W+22(\w+)", text)) == {"CAUSAL"}
    # Grouped queries: no key is repeated for each of its queries.
    assert "tensor<2x128x2x8xbf16>" in text
    # No float32 score, whole or in part.
    assert not re.search(r"tensor<(\d+x){2,}128x128xf32>", text)


# The choice.

LLAMA = {
    "dtype": "bfloat16",
    "length": 4096,
    "head_dim": 128,
    "is_alibi": False,
    "softcap": 0.0,
    "has_sinks": False,
}
H100 = {"platform": "gpu", "capability": 9.0}


@pytest.mark.parametrize(
    "changed, on_tpu, on_h100",
    [
        ({}, "splash", "cudnn"),
        ({"dtype": "float32"}, "", ""),
        ({"is_alibi": True}, "", ""),
        ({"softcap": 50.0}, "splash", ""),
        ({"has_sinks": True}, "splash", ""),
        ({"head_dim": 60}, "splash", ""),
        ({"head_dim": 320}, "splash", ""),
        ({"length": 4095}, "splash", ""),
        ({"length": 64}, "", "cudnn"),
    ],
)
def test_a_kernel_is_chosen_where_it_says_the_same(changed, on_tpu, on_h100):
    assert fused.choose("tpu", **LLAMA | changed) == on_tpu
    assert fused.choose(**H100, **LLAMA | changed) == on_h100


def test_other_devices_have_no_kernel():
    assert fused.choose("cpu", **LLAMA) == ""
    assert fused.choose("gpu", **LLAMA) == ""  # AMD's
    assert fused.choose("gpu", capability=8.0, **LLAMA) == ""


class _Gpu:
    platform = "gpu"

    def __init__(self, capability):
        self.compute_capability = capability


def test_a_device_says_what_it_can_do():
    assert fused.device_of(_Gpu("9.0")) == H100
    assert fused.device_of(_Gpu("gfx942")) == {"platform": "gpu", "capability": 0.0}
    here = {"platform": "cpu", "capability": 0.0}
    assert fused.device_of(jax.devices()[0]) == here


def test_rows_or_heads_that_are_cut_unevenly_have_no_kernel(model_config):
    config = model_config(dtype="bfloat16")
    tpu = {"platform": "tpu", "capability": 0.0}
    mesh = _mesh()
    whole_heads = sharding.layout(mesh, (("kv_heads", ()),))
    with sharding.layout(mesh).active():
        assert attention.way(config, rows=8, length=128, on=tpu) == "splash"
        assert attention.way(config, rows=6, length=128, on=tpu) == "blocks"
    with whole_heads.active():
        assert attention.way(config, rows=8, length=128, on=tpu) == "blocks"


# In a model.


def _batch():
    rng = np.random.default_rng(0)
    tokens_BT = rng.integers(0, 30, (2, 128))
    return tokens_BT, *_labels(128)


@pytest.mark.parametrize("remat", ["none", "names"])
def test_a_model_of_windows_and_groups_is_the_same_with_the_kernel(
    remat, model_config, random_params, interpreted, monkeypatch
):
    sizes = {"num_heads": 4, "num_kv_heads": 2, "num_layers": 3, "remat": remat}
    config = model_config(**sizes, window=50, window_pattern="LLG")
    model = zoo.build(config)
    params, (tokens, positions, segments) = random_params(model.abstract), _batch()

    def grads():
        def loss(params):
            x_BTD, _ = model.hidden(params, tokens, positions, segments)
            return jnp.sum(jnp.sin(x_BTD) * (segments > 0)[:, :, None])

        return jax.jit(jax.grad(loss))(params)

    found = grads()
    monkeypatch.setattr(fused, "choose", lambda *_, **__: "")
    for ours, theirs in zip(*map(jax.tree.leaves, (found, grads())), strict=True):
        scale = np.abs(theirs).max()
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * scale)


@pytest.mark.parametrize("remat, is_run_again", [("names", False), ("full", True)])
def test_remat_that_keeps_what_is_mixed_runs_splash_forward_once(
    remat, is_run_again, model_config, interpreted
):
    model = zoo.build(model_config(remat=remat, remat_names=("mixed",)))
    tokens, positions, segments = _batch()

    def loss(params):
        return jnp.sum(model.hidden(params, tokens, positions, segments)[0])

    compiled = jax.jit(jax.grad(loss)).lower(model.abstract).compile()
    again = r'op_name="[^"]*transpose\(jvp[^"]*splash_mha_KERNEL_'
    text = compiled.as_text()
    assert bool(re.search(again.replace("KERNEL", "fwd"), text)) == is_run_again
    assert re.search(again.replace("KERNEL", "dkv"), text)
