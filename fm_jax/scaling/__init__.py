"""Scaling laws: plan runs, run them, fit what came out, predict. Imports no jax."""
