"""Pretrain foundation models from scratch in JAX: one transformer stack, one loop."""

__version__ = "0.1.0"
