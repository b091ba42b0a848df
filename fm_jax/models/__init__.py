"""The decoder: its values, its layers, what it counts."""
