"""Comparing methods of fine-tuning on one base: many runs, paired by their seeds."""
