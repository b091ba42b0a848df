"""Fine-tuning: what trains, what is held, heads, preferences, probes."""
