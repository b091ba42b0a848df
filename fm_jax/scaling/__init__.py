"""Scaling laws: fitted to a table of runs, checked, and read. Imports no jax."""
