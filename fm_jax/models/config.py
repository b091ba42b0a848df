"""ModelConfig: every architecture the decoder can be, as values. Imports no jax."""

import dataclasses

from fm_jax.errors import UserError, unknown

CHOICES = {
    "norm": ("rmsnorm", "layernorm"),
    "norm_position": ("pre", "sandwich"),
    "positions": ("rope", "learned", "none"),
    "activation": ("gelu", "relu2", "swiglu", "geglu"),
    "dtype": ("float32", "bfloat16"),
    "residual_dtype": ("float32", "bfloat16"),
    "remat": ("none", "full", "dots", "names", "offload"),
}
# What the blocks name for remat: products that the backward pass can be spared.
REMAT_NAMES = (
    "query",
    "key",
    "value",
    "mixed",
    "attention_out",
    "mlp_gate",
    "mlp_up",
)
GATED = ("swiglu", "geglu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One decoder's architecture and arithmetic; configs/base.py explains each field.

    A vocab_size of 0 is not known yet: the tokenizer will say.
    Raises UserError on a value or a combination that no decoder has.
    """

    vocab_size: int
    max_length: int
    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    norm: str
    norm_position: str
    norm_epsilon: float
    positions: str
    rope_theta: float
    qk_norm: bool
    window: int
    window_pattern: str
    attention_softcap: float
    logits_softcap: float
    activation: str
    tied_embeddings: bool
    use_bias: bool
    parallel_block: bool
    embed_init_std: float
    init_scale: float
    dtype: str
    residual_dtype: str
    remat: str
    remat_names: tuple[str, ...]

    def __post_init__(self):
        for field, known in CHOICES.items():
            if getattr(self, field) not in known:
                raise unknown(f"model.{field}", getattr(self, field), known)
        for field in (
            "max_length",
            "num_layers",
            "embed_dim",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "mlp_dim",
        ):
            _demand(getattr(self, field) >= 1, field, ">= 1", getattr(self, field))
        for field in ("vocab_size", "window", "attention_softcap", "logits_softcap"):
            _demand(getattr(self, field) >= 0, field, ">= 0", getattr(self, field))
        for field in ("norm_epsilon", "rope_theta", "embed_init_std", "init_scale"):
            _demand(getattr(self, field) > 0, field, "> 0", getattr(self, field))
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"model.num_heads must be a multiple of model.num_kv_heads; got "
                f"{self.num_heads} and {self.num_kv_heads}. "
                f"Set --config.model.num_kv_heads={self.num_heads} for plain heads."
            )
        if self.positions == "rope" and self.head_dim % 2:
            raise UserError(
                f"model.head_dim must be even under rope; got {self.head_dim}. "
                "Change it or set --config.model.positions=learned."
            )
        if set(self.window_pattern) - {"L", "G"} or not self.window_pattern:
            raise UserError(
                "model.window_pattern must be made of L (local) and G (global); got "
                f"{self.window_pattern!r}. Example: LLG."
            )
        for name in self.remat_names:
            if name not in REMAT_NAMES:
                raise unknown("model.remat_names", name, REMAT_NAMES)
        if self.parallel_block and self.norm_position == "sandwich":
            raise UserError(
                "model.norm_position must be 'pre' in a parallel block; got 'sandwich'."
                " Set --config.model.norm_position=pre."
            )

    @property
    def is_gated(self) -> bool:
        """Whether the MLP multiplies by a second, activated projection."""
        return self.activation in GATED

    def windows(self) -> tuple[int, ...]:
        """Return each layer's attention window in keys; 0 sees everything before it."""
        pattern = self.window_pattern
        return tuple(
            self.window if pattern[layer % len(pattern)] == "L" else 0
            for layer in range(self.num_layers)
        )


def _demand(holds: bool, field: str, demand: str, value: object) -> None:
    if not holds:
        raise UserError(f"model.{field} must be {demand}; got {value}.")
