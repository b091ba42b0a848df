"""Compiled programs, read."""
