"""The step, the loop, and the one place that puts the parts together."""
