"""Attention by fused kernels: splash on TPUs, cuDNN's on NVIDIA GPUs.

They hold no scores in main memory (FlashAttention, arXiv 2205.14135) and skip what a
causal mask hides. Tokens of one document follow one another in a row, so these kernels
may count by slots where `attend.visible` counts by positions. Legend: W keys of a
window, 0 for no window.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from fm_jax.models.attend import Labels, visible
from fm_jax.sharding import cut_over, num_parts, per_device

SPLASH, CUDNN = "splash", "cudnn"
LANES = 128  # rows are padded to whole tiles of a TPU
BLOCK = 512  # tokens of a tile of scores at most, in each direction


def choose(
    platform: str,
    *,
    capability: float = 0.0,
    dtype: str,
    length: int,
    head_dim: int,
    is_alibi: bool,
    softcap: float,
    has_sinks: bool,
) -> str:
    """Return which kernel gives what `attend.attend` gives, "" where none does.

    platform: as jax names it. capability: CUDA's of the GPU, 0 where there is none;
    before Hopper's 9.0 cuDNN has no masks by row in its backward pass. float32 is not
    what the makers tune for, nor what cuDNN takes.
    """
    if dtype != "bfloat16" or is_alibi:
        return ""
    if platform == "tpu":
        return SPLASH if length >= LANES else ""
    is_known = capability >= 9 and not softcap and not has_sinks
    fits = head_dim <= 256 and head_dim % 8 == 0 and length % 2 == 0
    return CUDNN if is_known and fits else ""


def device_of(device: jax.Device) -> dict[str, str | float]:
    """Return what `choose` must know of a device: `platform` and `capability`."""
    try:
        capability = float(getattr(device, "compute_capability", 0))
    except ValueError:  # AMD's are words
        capability = 0.0
    return {"platform": device.platform, "capability": capability}


def is_cut_evenly(rows: int) -> bool:
    """Return whether each device has whole rows, and the key heads of its queries."""
    is_even = num_parts(rows) > 1 or not cut_over("batch")
    return is_even and cut_over("heads") == cut_over("kv_heads")


def attend(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    labels: Labels,
    window: jax.Array | int | None,
    *,
    kernel: str,
    windows: tuple[int, ...],
    sinks: jax.Array | None,
    softcap: float,
    dtype: jnp.dtype,
) -> jax.Array:
    """Return what `attend.attend` gives, in `dtype`, by the kernel that was chosen.

    windows: those that layers have, 0 for none; `window` is one of them. Rows must be
    cut evenly (`is_cut_evenly`). Remat knows the output as `mixed`.
    """
    heads = ("batch", "length", "heads", "head_dim")
    kv_heads = ("batch", "length", "kv_heads", "head_dim")
    axes = [heads, kv_heads, kv_heads, ("batch", "length"), ("batch", "length")]
    arrays = [*(x.astype(dtype) for x in (q_BTNH, k_BTKH, v_BTKH)), *labels]
    if sinks is not None:
        axes, arrays = [*axes, ("heads",)], [*arrays, sinks]
    is_traced = isinstance(window, jax.Array)
    if is_traced:
        axes, arrays = [*axes, ()], [*arrays, window]

    def do(q, k, v, positions, segments, *others):
        found = {"sinks": None} if sinks is None else {"sinks": others[0]}
        whole = Labels(positions, segments)
        one = functools.partial(
            _KERNELS[kernel], q, k, v, whole, softcap=softcap, **found
        )
        return _of_window(one, others[-1] if is_traced else window, windows, q.shape[1])

    if any(map(cut_over, ("batch", "heads"))):
        do = per_device(do, in_axes=tuple(axes), out_axes=heads)
    return do(*arrays)


def _of_window(do: Callable, window, windows: tuple[int, ...], length: int):
    """Return `do(window)`, whose window must be known when the kernel is made.

    A scan over layers knows it only as it runs: then both are there, and one runs.
    """
    if not isinstance(window, jax.Array):
        return do(window if window and window < length else 0)
    known = sorted({w if w < length else 0 for w in windows})
    if len(known) == 1:
        return do(known[0])
    everything, local = known
    return jax.lax.cond(window == local, lambda: do(local), lambda: do(everything))


# ---- splash


def splash(
    q_BTNH, k_BTKH, v_BTKH, labels, window: int, *, sinks, softcap, interpret=False
) -> jax.Array:
    """Return attention by jax's kernel for TPUs; rows of any length of 1 or more.

    A row is padded at its end, to what no earlier token sees.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernels,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as masks,
    )

    length, num_heads = q_BTNH.shape[1:3]
    padded, block = _tiles(length)
    square = (padded, padded)
    mask = masks.CausalMask(square)
    if window:
        mask = masks.LocalMask(square, (window - 1, 0), 0)
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * num_heads),
        block_sizes=kernels.BlockSizes(**dict.fromkeys(_BLOCKS, block)),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap or None,
        residual_checkpoint_name="mixed",
        interpret=interpret,
    )

    def one(q_TNH, k_TKH, v_TKH, segments_T):
        ids = kernels.SegmentIds(segments_T, segments_T)
        heads_first = (jnp.swapaxes(x, 0, 1) for x in (q_TNH, k_TKH, v_TKH))
        return jnp.swapaxes(kernel(*heads_first, ids, sinks), 0, 1)

    def pad(x):
        return jnp.pad(x, [(0, 0), (0, padded - length)] + [(0, 0)] * (x.ndim - 2))

    rows = map(pad, (q_BTNH, k_BTKH, v_BTKH, labels.segments))
    pairs = _num_tiles(padded // block, block, window) * block**2
    # For compiled/kernels.py: the program's text says only shapes.
    with jax.named_scope(f"pairs_{pairs}_by_{block}"):
        return jax.vmap(one)(*rows)[:, :length]


_BLOCKS = (
    *("block_q", "block_kv", "block_kv_compute"),
    *("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute"),
    *("block_q_dq", "block_kv_dq"),
)


def _tiles(length: int) -> tuple[int, int]:
    """Return the length that a row is padded to, and the block that it is cut by.

    Small blocks waste less of what is masked, large ones load keys less often.
    """
    padded = -(-length // LANES) * LANES
    block = LANES
    while 2 * block <= min(BLOCK, padded // 4) and padded % (2 * block) == 0:
        block *= 2
    return padded, block


def _num_tiles(side: int, block: int, window: int) -> int:
    """Return how many of side x side tiles of scores are not masked as a whole."""
    back = side if not window else min(side, (window - 2 + block) // block + 1)
    return sum(min(row, back) for row in range(1, side + 1))


# ---- cuDNN


def cudnn(q_BTNH, k_BTKH, v_BTKH, labels, window: int, *, sinks, softcap) -> jax.Array:
    """Return attention by cuDNN's kernel for NVIDIA GPUs.

    It knows causal masks and windows, but no segments: where a row holds more than one
    document it is given the mask of each row as a bias. Padding behind a document sees
    that document, and what it gives is of no use to anyone.
    """
    assert sinks is None and not softcap
    out_BTNH = _cudnn(window, q_BTNH, k_BTKH, v_BTKH, labels)
    return checkpoint_name(out_BTNH, "mixed")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cudnn(window, q_BTNH, k_BTKH, v_BTKH, labels):
    """Return attention; the backward pass keeps the arguments alone.

    Left to autodiff, a layer would keep what both branches need, masks among it.
    """
    return _either(window, labels, lambda do: do(q_BTNH, k_BTKH, v_BTKH))


def _cudnn_forward(window, *arguments):
    return _cudnn(window, *arguments), arguments


def _cudnn_backward(window, arguments, d_out_BTNH):
    *qkv, labels = arguments
    d_qkv = _either(window, labels, lambda do: jax.vjp(do, *qkv)[1](d_out_BTNH))
    return (*d_qkv, None)


_cudnn.defvjp(_cudnn_forward, _cudnn_backward)


def _either(window, labels, use):
    """Return `use` of attention over one document a row, or over any documents."""
    how = {"scale": 1.0, "is_causal": True, "implementation": "cudnn"}

    def one_document():
        near = {"local_window_size": (window - 1, 0)} if window else {}
        return use(functools.partial(jax.nn.dot_product_attention, **how, **near))

    def any_documents():
        seen_B1TS = visible(labels, labels, window or None)[:, None]
        attention = functools.partial(jax.nn.dot_product_attention, **how)
        return use(functools.partial(attention, mask=seen_B1TS))

    segments_BT = labels.segments
    is_one = (segments_BT == segments_BT[:, :1]) | (segments_BT == 0)
    return jax.lax.cond(jnp.all(is_one), one_document, any_documents)


_KERNELS = {SPLASH: splash, CUDNN: cudnn}
