"""Where a run's metrics go as well as to metrics.jsonl; none can stop or slow a run."""
