"""A plain PyTorch decoder of GPT-2's shape and its training step, to race against.

Written here, in the manner of nanoGPT: fused causal attention, one product for queries,
keys and values, a tied head, fused AdamW, clipping, and torch.compile if asked for.
"""

import importlib.metadata
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from fm_jax import machine


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width, bias=False) for _ in range(2))
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, -1).transpose(1, 2)
            for part in self.qkv(self.norms[0](x)).split(width, dim=2)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        hidden = F.gelu(self.up(self.norms[1](x)), approximate="tanh")
        return x + self.down(hidden)


class Decoder(nn.Module):
    """Embeddings, blocks, a norm, and the embedding again as head; gives a loss."""

    def __init__(self, *, layers, width, heads, hidden, vocab, length):
        super().__init__()
        self.tokens = nn.Embedding(vocab, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads, hidden) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=False)
        for name, weight in self.named_parameters():
            if weight.dim() < 2:
                continue
            is_last = name.endswith(("out.weight", "down.weight"))
            nn.init.normal_(weight, std=0.02 / math.sqrt(2 * layers if is_last else 1))

    def forward(self, tokens, targets):
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def open_side(spec: dict[str, Any]) -> tuple[Callable[[], None], dict[str, Any]]:
    """Return `spec["steps"]` steps on new random tokens, and what runs them."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(machine.num_cores())
    torch.set_float32_matmul_precision("high" if device == "cuda" else "highest")
    sizes, rows = spec["sizes"], spec["batch_size"]
    net = Decoder(**sizes).to(device)
    vectors = [w for w in net.parameters() if w.dim() < 2]
    matrices = [w for w in net.parameters() if w.dim() > 1]
    groups = [
        {"params": matrices, "weight_decay": spec["weight_decay"]},
        {"params": vectors, "weight_decay": 0.0},
    ]
    rate, betas = spec["learning_rate"], (spec["beta1"], spec["beta2"])
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=betas, fused=True)
    loss_of = torch.compile(net) if spec["side"] == "pytorch_compiled" else net
    rng = np.random.default_rng(0)
    lower = spec["dtype"] == "bfloat16"

    def work():
        for _ in range(spec["steps"]):
            ids = rng.integers(0, sizes["vocab"], (rows, sizes["length"] + 1))
            ids = torch.from_numpy(ids).to(device)
            with torch.autocast(device, torch.bfloat16, enabled=lower):
                loss = loss_of(ids[:, :-1], ids[:, 1:])
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), spec["clip_norm"])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss.item()

    about = {"library": f"torch {importlib.metadata.version('torch')}"}
    return work, about
