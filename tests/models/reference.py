"""The decoder in NumPy and float64, written from the papers, one row at a time.

Slow and plain on purpose: a loop over layers, heads and queries, a mask that is a list
of keys, rotations as complex numbers.
"""

import jax
import numpy as np

from fm_jax.models.config import ModelConfig


def logits(config: ModelConfig, params, tokens_BT, positions_BT, segment_ids_BT):
    """Return float64 logits [B, T, V]; rows of padding hold nothing of meaning."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    rows = zip(tokens_BT, positions_BT, segment_ids_BT, strict=True)
    return np.stack([_row_logits(config, params, *row) for row in rows])


def _row_logits(config, params, tokens_T, positions_T, segment_ids_T):
    x_TD = params["embedding"][tokens_T]
    if config.positions == "learned":
        x_TD = x_TD + params["position_embedding"][positions_T]
    for layer in range(config.num_layers):
        weights = jax.tree.map(lambda leaf, i=layer: leaf[i], params["blocks"])
        is_local = config.window_pattern[layer % len(config.window_pattern)] == "L"
        window = config.window if is_local else 0
        keys = _keys_seen(segment_ids_T, window)
        x_TD = _block(config, weights, x_TD, positions_T, keys)
    x_TD = _normalise(config, params["final_norm"], x_TD)
    head_VD = params["embedding" if config.tied_embeddings else "head"]
    return _cap(x_TD @ head_VD.T, config.logits_softcap)


def _keys_seen(segment_ids_T, window):
    """Return for each query the keys it sees: its document's, not later, not far."""
    return [
        [
            s
            for s in range(t + 1)
            if segment_ids_T[s] == segment_ids_T[t] and (not window or t - s < window)
        ]
        for t in range(len(segment_ids_T))
    ]


def _block(config, weights, x_TD, positions_T, keys):
    def attention(h_TD):
        return _attention(config, weights["attention"], h_TD, positions_T, keys)

    def mlp(h_TD):
        return _mlp(config, weights["mlp"], h_TD)

    def norm(name, y_TD):
        return _normalise(config, weights[name], y_TD)

    if config.parallel_block:
        h_TD = norm("attention_norm", x_TD)
        return x_TD + attention(h_TD) + mlp(h_TD)
    if config.norm_position == "sandwich":
        inner = attention(norm("attention_norm", x_TD))
        x_TD = x_TD + norm("attention_out_norm", inner)
        return x_TD + norm("mlp_out_norm", mlp(norm("mlp_norm", x_TD)))
    x_TD = x_TD + attention(norm("attention_norm", x_TD))
    return x_TD + mlp(norm("mlp_norm", x_TD))


def _attention(config, weights, h_TD, positions_T, keys):
    q_TNH = _affine(config, weights["query"], h_TD)
    k_TKH = _affine(config, weights["key"], h_TD)
    v_TKH = _affine(config, weights["value"], h_TD)
    if config.qk_norm:
        q_TNH = _normalise(config, weights["query_norm"], q_TNH)
        k_TKH = _normalise(config, weights["key_norm"], k_TKH)
    if config.positions == "rope":
        q_TNH = _rotate(q_TNH, positions_T, config.rope_theta)
        k_TKH = _rotate(k_TKH, positions_T, config.rope_theta)
    out_TNH = np.zeros_like(q_TNH)
    heads_per_key = config.num_heads // config.num_kv_heads
    for n in range(config.num_heads):
        kv = n // heads_per_key
        for t, seen in enumerate(keys):
            scores = k_TKH[seen, kv] @ q_TNH[t, n] / np.sqrt(config.head_dim)
            scores = _cap(scores, config.attention_softcap)
            shares = np.exp(scores - scores.max())
            out_TNH[t, n] = shares @ v_TKH[seen, kv] / shares.sum()
    return _affine(config, weights["out"], out_TNH)


def _mlp(config, weights, h_TD):
    up_TF = _affine(config, weights["up"], h_TD)
    if config.activation in ("swiglu", "geglu"):
        gate_TF = _affine(config, weights["gate"], h_TD)
        bend = _silu if config.activation == "swiglu" else _gelu
        return _affine(config, weights["down"], bend(gate_TF) * up_TF)
    bent_TF = _gelu(up_TF) if config.activation == "gelu" else np.maximum(up_TF, 0) ** 2
    return _affine(config, weights["down"], bent_TF)


def _normalise(config, weights, x):
    if config.norm == "layernorm":
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt(x.var(-1, keepdims=True) + config.norm_epsilon)
        x = x * weights["scale"]
        return x + weights["bias"] if config.use_bias else x
    rms = np.sqrt((x * x).mean(-1, keepdims=True) + config.norm_epsilon)
    return x / rms * weights["scale"]


def _affine(config, weights, x):
    y = np.tensordot(x, weights["kernel"], axes=x.ndim - 1)
    return y + weights["bias"] if config.use_bias else y


def _rotate(x_TNH, positions_T, theta):
    """Multiply the pair (i, i + H/2) as a complex number by e^(i position theta_i)."""
    half = x_TNH.shape[-1] // 2
    pairs = x_TNH[..., :half] + 1j * x_TNH[..., half:]
    speeds = np.array([theta ** (-i / half) for i in range(half)])
    turns = np.exp(1j * np.outer(positions_T, speeds))
    pairs = pairs * turns[:, None, :]
    return np.concatenate([pairs.real, pairs.imag], axis=-1)


def _cap(x, cap):
    return cap * np.tanh(x / cap) if cap else x


def _silu(x):
    return x / (1 + np.exp(-x))


def _gelu(x):
    """Return the tanh form of GELU (arXiv 1606.08415)."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
