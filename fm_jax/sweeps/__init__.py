"""Many runs from one file: planned, priced, run. Imports no jax."""
