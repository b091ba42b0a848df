"""What attention kernels cost, of which a compiled program's text says only the shapes.

No jax here: a program may be read on another machine than it was compiled on.
"""

import dataclasses
import math
import re

from fm_jax.compiled import text
from fm_jax.compiled.text import Body, Op

# What fused.splash writes beside the name of its kernels.
_PAIRS = re.compile(r"\bpairs_(\d+)_by_(\d+)\b.*?splash_[a-z]+_(fwd|dq|dkv)_")
_SPLASH = {"fwd": 2, "dq": 3, "dkv": 4}  # products of a kernel; scores are made anew
_CUDNN = "__cudnn$fmha"


@dataclasses.dataclass(frozen=True)
class Cost:
    """Products of one execution, in FLOPs, and bytes that it loads more than once.

    A kernel's grid goes over blocks: what it masks in them is worked on too.
    """

    flops: int
    bytes_again: int = 0


def cost(body: Body, op: Op, target: str) -> Cost | None:
    """Return what a custom call to `target` costs; None of other kernels."""
    if target.startswith(_CUDNN):
        return _cudnn(body, op, target)
    found = re.search(_PAIRS, op.attrs)
    return _splash(body, op, *found.groups()) if found else None


def _splash(body: Body, op: Op, pairs: str, block: str, phase: str) -> Cost:
    """Return the cost where each head of a row makes `pairs` scores, in blocks.

    The first wide operands are q, k and v; the last of their dtype is, going back, the
    output's gradient. Going over queries a head loads keys and values again for every
    block of queries, going over keys it loads queries and gradients.
    """
    wide = [place for place in body.inputs(op) if len(place.array.dims) > 2]
    query = next(place for place in wide if place.array.dtype in ("bf16", "f32"))
    same = [p for p in wide if p.array.dtype == query.array.dtype]
    same = [p for p in same if p.array.dims[-1] == query.array.dims[-1]]
    *heads, _, head_dim = query.array.dims
    loaded = [same[0], same[-1]] if phase == "dkv" else same[1:3]
    all_pairs = math.prod(heads) * int(pairs)
    width = query.array.bytes // math.prod(query.array.dims)
    load = all_pairs // int(block) * head_dim * width
    return Cost(
        flops=2 * _SPLASH[phase] * all_pairs * head_dim,
        bytes_again=sum(max(0, load - p.bytes) for p in loaded if p.bytes),
    )


def _cudnn(body: Body, op: Op, target: str) -> Cost:
    scores = op.attr(r'"intermediate_tensor_shape": ?\{[^}]*?"dimensions": ?\[([^\]]*)')
    *heads, queries, keys = text.ints(scores)
    pairs = queries * keys
    if "CAUSAL" in op.attr(r'"mask_type": ?"(\w+)"'):
        pairs = queries * (queries + 1) // 2
        window = int(op.attr(r'"sliding_window_length": ?"?(\d+)') or 0)
        if 0 < window < queries:
            pairs = window * (window + 1) // 2 + (queries - window) * window
    products = 5 if "Backward" in target else 2
    head_dim = body.inputs(op)[0].array.dims[-1]
    return Cost(flops=2 * products * math.prod(heads) * pairs * head_dim)
